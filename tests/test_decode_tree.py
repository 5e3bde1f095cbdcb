"""Trees of drafts, against slow decoders that share none of their code."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from slow_trees import (
    cut_passes,
    logits_by_training,
    logits_of_case,
    slow_exact,
    slow_tree_decoder,
    slow_typical,
    softmax,
)
from test_decode import (
    NEW,
    VOCAB,
    Letters,
    case,
    expected,
    init,
    on_mesh,
    one_device,
    tiny,
)

from mtp_jax.config import MeshConfig
from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.cache import chain, decode_trunk, make_cache
from mtp_jax.decode.decode_model import build, unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import RandomKeys, Sampling, sampling_arrays
from mtp_jax.decode.decoders.token_tree import default_tree
from mtp_jax.decode.decoders.tree import Tree
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.head_passes import extend, read_first
from mtp_jax.decode.programs import Programs, Prompts
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import make_mesh, spec

TREES = {
    "built in": None,
    "chain": [[0], [0, 0], [0, 0, 0]],
    # Not the most likely first, a parent whose only child is unlikely, unsorted.
    "crooked": [[2, 1, 0], [1], [2], [2, 1], [0], [0, 3], [2, 0], [0, 3, 1]],
    "deeper than the heads": [[0, 0, 0, 0, 0], [0], [0, 0], [0, 0, 0], [0, 0, 0, 0]],
}


@pytest.mark.parametrize(
    "n,layers,name", [(2, 3, "crooked"), *((4, 5, name) for name in TREES)]
)
def test_the_text_is_plains_and_the_passes_are_a_slow_tree_decoders(
    n, layers, name, tree_file
):
    c = case(n, layers)
    decoder = Tree(tree_file(TREES[name]) if TREES[name] else "")
    results = c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=decoder)
    paths = TREES[name] or default_tree(n - 1).paths[1:]
    paths = [p for p in paths if len(p) < n]
    accepted = set()
    for i, (result, text) in enumerate(zip(results, c.texts, strict=True)):
        assert (result.tokens, result.finish) == expected(text, c.eos_id)
        assert result.deviations is None
        made = len(result.tokens) + (result.finish == "eos")
        assert 1 <= result.tokens_per_forward <= n
        if i % 3:  # the slow decoder is slow
            continue
        tokens, counts, _ = slow_tree_decoder(
            logits_of_case(n, layers), c.prompts[i], paths, slow_exact, made
        )
        assert tokens[:made] == text[:made]
        passes, accepted_F = cut_passes(counts, made)
        assert result.forwards == passes
        shares = [np.mean(accepted_F > d) if passes > 1 else 0.0 for d in range(n - 1)]
        np.testing.assert_allclose(result.accepted_by_head, shares)
        accepted |= set(accepted_F.tolist())
    assert max(accepted) > 0 and (n == 2 or len(accepted) > 1)


def test_a_wider_tree_accepts_at_least_what_its_first_candidates_do():
    c = case(4, 5)
    passes = {
        name: sum(
            r.forwards
            for r in c.generator.generate(
                c.prompts, max_new_tokens=NEW, decoder=decoder
            )
        )
        for name, decoder in [("tree", "tree"), ("chain", "blockwise")]
    }
    assert passes["tree"] < passes["chain"]


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_typical_departs_where_a_slow_typical_decoder_does(temperature):
    c = case(4, 5)
    results = c.generator.generate(
        c.prompts,
        max_new_tokens=NEW,
        decoder="typical",
        sampling=Sampling(temperature=temperature),
    )
    paths = default_tree(3).paths[1:]
    deviations = 0
    for i, result in enumerate(results):
        if i % 2 and temperature == 1.0:  # the slow decoder is slow
            continue
        made = len(result.tokens) + (result.finish == "eos")
        tokens, counts, deviated = slow_tree_decoder(
            logits_of_case(4, 5), c.prompts[i], paths, slow_typical(temperature), made
        )
        assert (result.tokens, result.finish) == expected(tokens, c.eos_id)
        assert result.deviations == sum(deviated[:made])
        assert result.forwards == cut_passes(counts, made)[0]
        deviations += result.deviations
    assert deviations > 0


def test_typical_deviations_end_with_the_stop_string():
    c, hot = case(4, 5), Sampling(temperature=1.0)
    settings = {"max_new_tokens": NEW, "decoder": "typical", "sampling": hot}
    whole = c.generator.generate(c.prompts, **settings)
    i = max(range(len(whole)), key=lambda i: whole[i].deviations)
    stop = whole[i].text[:2]
    stopped = c.generator.generate(c.prompts, stop=[stop], **settings)[i]
    assert (stopped.finish, stopped.text) == ("stop", "")
    assert stopped.deviations <= 2 < whole[i].deviations


def test_typical_without_temperature_is_the_exact_tree():
    c = case(4, 5)
    typical, tree = (
        c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=name)
        for name in ("typical", "tree")
    )
    assert {r.deviations for r in typical} == {0}
    assert [r.tokens for r in typical] == [r.tokens for r in tree]
    assert [r.forwards for r in typical] == [r.forwards for r in tree]


@pytest.mark.parametrize("limit", [1, 3])
def test_a_tree_does_not_go_past_the_limit(limit):
    c = case(4, 5)
    for r, text in zip(
        c.generator.generate(c.prompts, max_new_tokens=limit, decoder="tree"),
        c.texts,
        strict=True,
    ):
        assert (r.tokens, r.finish) == expected(text, c.eos_id, limit)


def test_stop_strings_end_a_tree_where_they_end_plain():
    c = case(4, 5)
    letters = Letters(c.eos_id)
    whole = [letters.decode(expected(t, c.eos_id)[0]) for t in c.texts]
    stops = [s for s in (whole[0][5:7], whole[3][10:13], whole[-1][3:5]) if s]
    tree, plain = (
        c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=name, stop=stops)
        for name in ("tree", "plain")
    )
    assert [(r.text, r.finish) for r in tree] == [(r.text, r.finish) for r in plain]
    assert sum(r.finish == "stop" for r in tree) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["tree", "typical"])
def test_the_mesh_does_not_change_the_text(decoder):
    c, mesh = case(4, 5), make_mesh(MeshConfig(fsdp=4, tensor=2))
    settings = {
        "max_new_tokens": NEW,
        "decoder": decoder,
        "sampling": Sampling(temperature=0.0 if decoder == "tree" else 1.0),
    }
    generator = Generator(c.cfg, init(c.cfg, mesh), Letters(c.eos_id), mesh)
    # Five prompts: rows have to be added for the batch to fill the mesh.
    results = generator.generate(c.prompts[:5], **settings)
    one = c.generator.generate(c.prompts[:5], **settings)
    for name in ("tokens", "forwards", "deviations"):
        assert [getattr(r, name) for r in results] == [getattr(r, name) for r in one]


def test_a_model_with_one_head_has_nothing_to_make_a_tree_of():
    c = case(1, 2)
    for name in ("tree", "typical"):
        with pytest.raises(UserError, match=f"{name} drafts .* the model has 1"):
            c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=name)


def fresh_cache(cfg, params, tokens_BT, heads):
    """Keys and values of whole texts, read at once."""
    b, t = tokens_BT.shape
    model = build(cfg, params)
    cache = make_cache(cfg, heads, b, t)
    start_B = jnp.zeros(b, jnp.int32, out_sharding=spec("batch"))
    new = chain(tokens_BT, start_B)
    trunk_BTD, cache = decode_trunk(model, new, cache)
    _, source_BTX, cache = read_first(model, trunk_BTD, new, cache)
    return extend(model, source_BTX, new, tokens_BT, cache)


@pytest.mark.parametrize("name", ["speculative", "tree", "typical"])
def test_caches_are_those_of_reading_the_text_again(name):
    c = case(4, 5)
    rows = [np.concatenate([[0], p]).astype(np.int32) for p in c.prompts]
    with jax.set_mesh(one_device()):
        params = unstack(c.cfg, init(c.cfg, one_device()))
        programs, accepted = Programs(c.cfg, eos_id=VOCAB), set()
        batch = DecodeBatch(
            programs, params, DECODERS[name](), rows, 40, Sampling(temperature=0.7)
        )
        batch.begin()
        # Fewer heads now and then: drafts of the others are not verified.
        for depth in (4, 4, 2, 4, 2, 4, 4, 2):
            state, before_B = batch._state, np.array(batch._state.length_B)
            advance = programs.advance(DECODERS[name](), params, depth, state)
            batch._state = advance(params, state, np.int32(1))
            accepted |= set((np.array(batch._state.length_B) - before_B - 1).tolist())
        state = batch._state
        again = jax.jit(functools.partial(fresh_cache, c.cfg, heads=4))(
            params, state.tokens_BE
        )
    assert accepted == {0, 1, 2, 3}
    layers = zip(
        [*state.cache.k_BGSK, *state.cache.v_BGSK],
        [*again.k_BGSK, *again.v_BGSK],
        strict=True,
    )
    for kept_BGSK, again_BGSK in layers:
        for b, length in enumerate(np.asarray(state.length_B)):
            np.testing.assert_allclose(
                np.asarray(kept_BGSK)[b, :, : length - 1],
                np.asarray(again_BGSK)[b, :, : length - 1],
                atol=4e-6,
            )


def distribution_by_training(cfg, params, prompt, sampling, length):
    """Probabilities of all continuations by head 1, {tokens: float}."""
    logits_of, vocab = logits_by_training(cfg, params), range(cfg.vocab_size)
    distribution = {(): 1.0}
    for _ in range(length):
        rows = [[0, *prompt, *text] for text in distribution]
        logits_BV = logits_of(rows)[0].astype(np.float64)
        longer = {}
        for (text, p), row, logits_V in zip(
            distribution.items(), rows, logits_BV, strict=True
        ):
            seen_V = np.isin(vocab, row)
            by_V = np.where(logits_V > 0, 1 / sampling.repetition_penalty,
                            sampling.repetition_penalty)  # fmt: skip
            logits_V = np.where(seen_V, logits_V * by_V, logits_V)
            q_V = softmax(logits_V / sampling.temperature)
            longer |= {(*text, v): p * q_V[v] for v in vocab}
        distribution = longer
    return distribution


def distribution_of_decoder(cfg, params, decoder, prompt, sampling, length):
    """The distribution of a decoder, run with every outcome of its draws.

    And how many drafts a forward pass found right, the set of all.
    """
    vocab, n, start = cfg.vocab_size, cfg.n_future_tokens, 1 + len(prompt)
    draws = 1 + (length - 1) * n  # one for the first token, n for each forward pass
    forced = np.array(list(itertools.product(range(vocab), repeat=draws)), np.int32)
    b = len(forced)
    row = np.array([0, *prompt], np.int32)
    by_row = NamedSharding(one_device(), jax.P(("replica", "fsdp")))
    put = functools.partial(jax.device_put, device=by_row)
    prompts = Prompts(
        tokens_BP=on_mesh(np.tile(row, (b, 1))),
        length_B=put(np.full(b, start, np.int32)),
        limit_B=put(np.full(b, start + length, np.int32)),
        done_B=put(np.zeros(b, bool)),
        sampling=sampling_arrays(sampling, vocab),
        keys=RandomKeys(
            put(np.zeros((b, 2), np.uint32)),
            put(forced[:, :1]),
            put(np.zeros(b, np.float32)),
        ),
    )
    model = build(cfg, params)
    begin, _ = Programs(cfg, eos_id=vocab).begin(decoder, params, prompts, 32, 32)
    state, _ = begin(params, prompts)
    step = jax.jit(functools.partial(decoder.step, model, depth=n))
    for i in range(length - 1):
        now = put(forced[:, 1 + i * n : 1 + (i + 1) * n])
        keys = dataclasses.replace(state.keys, forced_BJ=now)
        state = step(dataclasses.replace(state, keys=keys))
    assert np.all(state.done_B)
    distribution = {}
    texts = np.asarray(state.tokens_BE)[:, start : start + length]
    for text, log_prob in zip(texts, np.asarray(state.keys.log_prob_B), strict=True):
        distribution[tuple(text)] = distribution.get(tuple(text), 0.0) + np.exp(
            np.float64(log_prob)
        )
    return distribution, set(
        np.asarray(state.accepted_BE)[:, start : start + length].ravel()
    )


@pytest.mark.parametrize("paths", [None, [[1], [2], [1, 0], [1, 2], [2, 0]]])
def test_sampled_trees_have_the_law_of_head_1(paths, tree_file):
    cfg, prompt = tiny(3, 4, vocab_size=3), [1, 2]
    sampling = Sampling(temperature=0.8, repetition_penalty=1.3)
    with jax.set_mesh(one_device()):
        given = init(cfg, one_device())
        params = unstack(cfg, given)
        right = distribution_by_training(cfg, given, prompt, sampling, length=3)
        decoder = Tree(tree_file(paths) if paths else "")
        distribution, accepted = distribution_of_decoder(
            cfg, params, decoder, prompt, sampling, length=3
        )
    assert accepted == {0, 1, 2}
    assert abs(sum(distribution.values()) - 1) < 1e-5
    for text, p in right.items():
        assert abs(distribution.get(text, 0.0) - p) < 1e-6
