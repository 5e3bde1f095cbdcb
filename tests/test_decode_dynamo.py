"""DynaMo's decoders, against their algorithm in NumPy and plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letter_counts import V, dense_ratios, ngrams
from models import all_logits
from test_decode import Letters, init, on_mesh, one_device, tiny

from mtp_jax.config import MeshConfig
from mtp_jax.data import ngram_counts
from mtp_jax.decode import programs as decode_programs
from mtp_jax.decode.batch import _prompts
from mtp_jax.decode.decode_model import build, unstack
from mtp_jax.decode.decoders.dynamo import Dynamo, blur, otsu
from mtp_jax.decode.decoders.dynamo_exact import DynamoExact
from mtp_jax.decode.decoders.sampling import RandomKeys, Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import make_mesh

N, NEW = 3, 18
LENGTHS = (0, 1, 3, 4, 7)
EOS = 5


def slow_blur(x):
    for axis in range(x.ndim):
        y = np.pad(
            x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)], "reflect"
        )
        parts = [np.take(y, range(i, i + x.shape[axis]), axis) for i in range(3)]
        x = 0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
    return x


def slow_otsu(x):
    """The threshold with the least variance within the two classes."""
    x = np.sort(x.reshape(-1).astype(np.float64))

    def within(i):
        return i * x[:i].var() + (x.size - i) * x[i:].var()

    return x[min(range(1, x.size), key=within)]


def test_blur_and_otsu_are_what_they_are_called():
    rng = np.random.default_rng(0)
    for shape in [(9,), (5, 5), (3, 3, 3), (2, 2)]:
        x = np.exp(3 * rng.normal(size=shape)).astype(np.float32)
        np.testing.assert_allclose(blur(jnp.asarray(x)), slow_blur(x), rtol=1e-5)
        np.testing.assert_allclose(otsu(jnp.asarray(x)), slow_otsu(x), rtol=1e-5)
    assert otsu(jnp.ones((1, 1))) == 1.0
    np.testing.assert_array_equal(blur(jnp.ones((4, 4))), np.ones((4, 4)))


@dataclasses.dataclass(frozen=True)
class Case:
    cfg: object
    generator: Generator
    params: object
    prompts: list[np.ndarray]
    logits: object  # of rows of tokens, [N, B, T, V]


@functools.cache
def case(n=N, vocab=V, eos_id=EOS):
    cfg, mesh = tiny(n, n + 1, vocab_size=vocab), one_device()
    params = init(cfg, mesh)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, vocab, k).astype(np.int32) for k in LENGTHS]
    with jax.set_mesh(mesh):
        _, of = model_builder(cfg)
        sharper = {**params, "norm": 4 * params["norm"]}

    @jax.jit
    def said(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        # Larger: initial weights predict too evenly for thresholds to matter.
        return 4 * all_logits(of(params), tokens_BT, 0 * tokens_BT, positions_BT)

    def logits(rows):
        tokens_BT = np.zeros((len(rows), 32), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
        with jax.set_mesh(mesh):
            return np.asarray(said(params, on_mesh(tokens_BT)), np.float64)

    generator = Generator(cfg, sharper, Letters(eos_id), mesh)
    return Case(cfg, generator, sharper, prompts, logits)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slow_run(probs_NV, seen, threshold, cells, penalty):
    """Greedy tokens of one forward pass, by the algorithm as it is written."""
    pair, after = dense_ratios(3)
    for m in range(len(probs_NV), 1, -1):
        k = min(50, V, int(cells ** (1 / m) + 1e-9))
        ids = [np.argsort(-p, kind="stable")[:k] for p in probs_NV[:m]]
        joint = np.ones(())
        for i in range(m):
            joint = joint[..., None] * probs_NV[i][ids[i]]
        ratio = pair[np.ix_(ids[0], ids[1])]
        if m == 3:
            ratio = ratio[..., None] + after[np.ix_(*ids)]
        corrected = joint * np.exp(ratio)
        if threshold == 0 and not corrected.any():
            corrected = joint
        joint = corrected / max(1.0, corrected.sum())
        joint[joint <= threshold ** (m - 1)] = 0
        joint[joint < slow_otsu(slow_blur(joint))] = 0
        for cell in np.ndindex(joint.shape):
            run = [int(ids[i][r]) for i, r in enumerate(cell)]
            again = sum(x in seen or x in run[:i] for i, x in enumerate(run))
            joint[cell] /= penalty**again
        if (joint > threshold ** (m - 1)).any():
            cell = np.unravel_index(joint.argmax(), joint.shape)
            return [int(ids[i][r]) for i, r in enumerate(cell)]
    return None


def slow_text(c, prompt, threshold, cells, penalty):
    """Runs of tokens, and how many depart, of one text."""
    row, runs, deviated = [0, *map(int, prompt)], [], 0
    start = len(row)

    def alone(logits_V, text):
        seen = np.isin(np.arange(V), text)
        less = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        return int(np.where(seen, less, logits_V).argmax())

    while len(row) - start < NEW and EOS not in row[start:]:
        logits_NV = c.logits([row])[:, 0, len(row) - 1]
        run = slow_run(softmax(logits_NV), set(row), threshold, cells, penalty)
        run = run or [alone(logits_NV[0], row)]
        if EOS in run:
            run = run[: run.index(EOS) + 1]
        run = run[: NEW - (len(row) - start)]
        for token in run:
            logits_V = c.logits([row])[0, 0, len(row) - 1]
            deviated += token != alone(logits_V, row)
            row.append(token)
        runs.append(run)
    return runs, deviated


@pytest.mark.parametrize("threshold,cells,penalty", [(0.3, 729, 1.2), (0.0, 64, 1.0)])
def test_greedy_texts_are_those_of_the_algorithm(
    counts_file, threshold, cells, penalty
):
    c = case()
    decoder = Dynamo(counts=counts_file, threshold=threshold, cells=cells)
    results = c.generator.generate(
        c.prompts,
        max_new_tokens=NEW,
        decoder=decoder,
        sampling=Sampling(repetition_penalty=penalty),
    )
    lengths, deviations = set(), 0
    for result, prompt in zip(results, c.prompts, strict=True):
        runs, deviated = slow_text(c, prompt, threshold, cells, penalty)
        tokens = [t for run in runs for t in run]
        assert result.tokens == [t for t in tokens if t != EOS]
        assert result.forwards == len(runs)
        heads = [i + 1 for run in runs for i in range(len(run))]
        assert result.heads == heads[: len(result.tokens)]
        assert result.deviations == deviated
        lengths |= {len(run) for run in runs[:-1]}
        deviations += deviated
    # Threshold 0 always gives n tokens, but for the end of a text.
    assert lengths == {N} if threshold == 0 else {1} < lengths
    assert deviations > 0


def test_threshold_one_is_plain(counts_file):
    c = case()
    decoder = Dynamo(counts=counts_file, threshold=1.0)
    results, plain = (
        c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=which)
        for which in (decoder, "plain")
    )
    for result, expected in zip(results, plain, strict=True):
        assert result.tokens == expected.tokens
        assert result.tokens_per_forward == 1.0
        assert result.deviations == 0


@pytest.mark.slow
def test_the_mesh_does_not_change_what_is_drawn(counts_file):
    c, mesh = case(), make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = init(c.cfg, mesh)
    with jax.set_mesh(mesh):
        params = {**params, "norm": 4 * params["norm"]}
    other = Generator(c.cfg, params, Letters(EOS), mesh)
    settings = {
        "max_new_tokens": 9,
        "decoder": Dynamo(counts=counts_file, threshold=0.1),
        "sampling": Sampling(temperature=0.7, repetition_penalty=1.1, seed=3),
    }
    # Four rows on both: draws are by the place in the batch.
    one, many = (g.generate(c.prompts[:4], **settings) for g in (c.generator, other))
    assert [r.tokens for r in one] == [r.tokens for r in many]
    assert [r.deviations for r in one] == [r.deviations for r in many]
    assert [r.forwards for r in one] == [r.forwards for r in many]


def distribution_of_texts(c, prompt, count, sampling):
    """The distribution of the next tokens by head 1 alone, an axis a token."""
    vocab = c.cfg.vocab_size
    distribution = np.ones(())
    for length in range(count):
        rows = [[0, *prompt, *text] for text in np.ndindex((vocab,) * length)]
        logits_RV = np.concatenate(
            [c.logits(rows[i : i + 64])[0, :, len(rows[0]) - 1] for i in
             range(0, len(rows), 64)]
        )  # fmt: skip
        probs_RV = softmax(logits_RV / sampling.temperature)
        distribution = distribution[..., None] * probs_RV.reshape(
            (vocab,) * (length + 1)
        )
    return distribution


def branched(state, outcomes):
    """Every row once for each outcome of draws among so many, and these outcomes."""
    forced = np.array(list(np.ndindex(*outcomes)), np.int32)
    b = state.length_B.shape[0]

    def repeated(x):
        more = np.repeat(np.asarray(x), len(forced), axis=0) if x.ndim else x
        return jax.device_put(more, x.sharding)

    sampling = state.sampling
    state = jax.tree.map(repeated, dataclasses.replace(state, sampling=None))
    keys = dataclasses.replace(
        state.keys, forced_BJ=jnp.asarray(np.tile(forced, (b, 1)))
    )
    return dataclasses.replace(state, sampling=sampling, keys=keys)


@pytest.mark.parametrize(
    "n,vocab,tokens,steps",
    [(2, 4, 3, 2), pytest.param(3, 3, 2, 1, marks=pytest.mark.slow)],
    ids=["n2", "n3"],
)
def test_the_exact_variant_has_the_law_of_head_1(tmp_path, n, vocab, tokens, steps):
    ngram_counts.save(ngrams(vocab=vocab), tmp_path / "counts")
    decoder = DynamoExact(counts=str(tmp_path / "counts"), candidates=vocab - 1)
    c = case(n, vocab, eos_id=-1)  # no text ends early
    # Log probabilities add up in float32: of flat distributions they stay exact.
    prompt, sampling = c.prompts[2] % vocab, Sampling(temperature=1.25)
    m = n - 1
    with jax.set_mesh(one_device()):
        params = unstack(c.cfg, c.params)
        params["tables"] = jax.device_put(
            decoder.tables("letters", vocab), jax.NamedSharding(one_device(), jax.P())
        )
        first = (vocab,) * n  # what head 1 says, and the drafts
        rows = [np.append(0, prompt).astype(np.int32)] * vocab**n
        prompts = _prompts(rows, tokens, sampling, 0, params)
        forced = jnp.asarray(list(np.ndindex(first)), jnp.int32)
        keys = RandomKeys(prompts.keys.key_B2, forced, jnp.zeros(len(rows)))
        prompts = dataclasses.replace(prompts, keys=keys)
        begin = decode_programs._begin(c.cfg, decoder, (-1,), 16, 16, alone=False)
        state, _ = begin(params, prompts)
        step = jax.jit(
            lambda params, state: decoder.step(build(c.cfg, params), state, n)
        )
        for _ in range(steps):
            # Coins, what head 1 says in the end, and the drafts.
            state = step(params, branched(state, (2,) * m + (vocab,) * n))
        texts = np.asarray(state.tokens_BE)[:, len(rows[0]) :][:, :tokens]
        probs = np.exp(np.asarray(state.keys.log_prob_B, np.float64))
    assert np.asarray(state.length_B).min() == len(rows[0]) + tokens
    distribution = np.zeros((vocab,) * tokens)
    np.add.at(distribution, tuple(texts.T), probs)
    np.testing.assert_allclose(distribution.sum(), 1, atol=1e-6)
    expected = distribution_of_texts(c, prompt.tolist(), tokens, sampling)
    np.testing.assert_allclose(distribution, expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"cells": 0}, "cells is 0"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Dynamo(**{"counts": "some", **changes})


def test_counts_must_be_given():
    for kind in (Dynamo, DynamoExact):
        with pytest.raises(UserError, match="counts is empty"):
            kind()
        assert kind(alpha=0.0).tables("letters", V) is None
        with pytest.raises(UserError, match="nowhere cannot be read"):
            kind(counts="nowhere").tables("letters", V)
