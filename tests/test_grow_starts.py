"""Where new heads begin: maps, biases and gains, against NumPy and the loss itself."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
from grown_models import (
    ONE,
    T,
    Text,
    V,
    grown_of,
    heads_of,
    losses,
    of_targets,
    outputs,
)
from models import mesh_of, placed_batch, placed_params, random_params
from usual_cases import named

from mtp_jax.config import Config, DataConfig, OptimConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.data.batches import open_sources
from mtp_jax.growth import counts, gains, ridge, starts, token_map
from mtp_jax.growth.starts import started
from mtp_jax.growth.text import FitText
from mtp_jax.training.train_step import make_init, make_step


def test_a_start_by_frequencies_has_the_loss_of_the_frequencies(one_device):
    _, after, grown = grown_of(ONE, 3, "unigram", heads_of(markov_rank=2))
    text = Text(after)

    found = losses(after, grown, text)

    inside = text.tokens[text.segments > 0]
    p_V = (np.bincount(inside, minlength=V) + 0.5) / (len(inside) + V / 2)
    for head in (1, 2):
        expected = []
        for rows in text.rows():
            zero = np.zeros((3, *rows["tokens"][:, :T].shape, V)) + np.log(p_V)
            nll, valid = of_targets(zero, rows, 3)
            expected += list(nll[head][valid[head]])
        assert found[head] == pytest.approx(np.mean(expected), abs=1e-4)


def test_a_bias_of_full_rank_is_the_law_of_pairs():
    text = Text(ONE)
    made = counts.Counts.of(text)
    pairs = np.zeros((V, V))
    for rows in text.rows():
        for t, s in zip(rows["tokens"], rows["segments"], strict=True):
            for i in range(len(t) - 1):
                pairs[t[i], t[i + 1]] += s[i] == s[i + 1] > 0
    p_V = made.unigram()
    law_VV = (pairs + 8.0 * p_V) / (pairs.sum(1, keepdims=True) + 8.0)

    w_in, w_out = counts.bias_of(made, V + 1, pairs=True)

    found_VV = scipy.special.softmax(w_in @ w_out.T, axis=1)
    np.testing.assert_allclose(found_VV, law_VV, rtol=1e-6)
    few_in, few_out = counts.bias_of(made, 6, pairs=True)
    assert few_in.shape == (V, 6)
    cut_VV = scipy.special.log_softmax(few_in @ few_out.T, axis=1)
    unigram = -(pairs * np.log(p_V)).sum()
    assert -(pairs * np.log(law_VV)).sum() < -(pairs * cut_VV).sum() < unigram


def test_maps_of_linear_heads_are_those_of_numpy(one_device):
    params, after, grown = grown_of(ONE, 3, "ridge", heads_of(kind="linear"))
    scale_D = np.asarray(params["norm"], float)
    for i in (1, 2):  # by how many tokens head 1 is read later
        pairs = []
        for rows in Text(after).rows():
            tokens, segments = rows["tokens"][:, :T], rows["segments"][:, :T]
            unit_BTD = outputs(ONE, params, tokens, segments)[0][0] / scale_D
            ok = (segments[:, :-i] == segments[:, i:]) & (segments[:, i:] > 0)
            pairs.append((unit_BTD[:, :-i][ok], unit_BTD[:, i:][ok]))
        x, y = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        r = 1e-3 * np.sum(x * x) / 16
        expected = np.linalg.inv(x.T @ x + r * np.eye(16)) @ x.T @ y

        found = grown["heads"]["w_map"][i - 1]
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def learned():
    """Parameters of an ordinary model that has learned the chain of `Text`."""
    cfg = Config(model=ONE, optim=OptimConfig(peak_lr=0.02, warmup_steps=5))
    batches = [
        rows | {"hash": np.zeros((8, 2), np.uint32)} for rows in Text(ONE).rows()
    ]
    with jax.set_mesh(mesh_of()):
        state, step = make_init(cfg)(jax.random.key(0)), make_step(cfg)
        for i in range(200):
            state, metrics = step(state, placed_batch(batches[i % 3], 1))
        assert metrics["loss_N"][0] < 1.3
        return jax.device_get(state.params)


KINDS = ["parallel", "causal", "linear", "serial"]


@pytest.mark.parametrize("kind", named(KINDS, ["causal", "linear"]))
def test_a_start_by_ridge_is_below_the_frequencies(one_device, learned, kind):
    after = regrown_config(ONE, 3, heads_of(kind=kind))
    text, params = Text(after), placed_params(ONE, learned)
    copied, fitted = (
        losses(after, started(ONE, after, params, start, text, 3), text)
        for start in ("copy", "ridge")
    )

    frequencies = np.log(V)  # all tokens are as frequent
    assert max(fitted[1:]) < frequencies - 0.1
    assert min(copied[1:] - fitted[1:]) > 0.1


def test_gains_are_at_the_bottom_of_the_loss(one_device):
    _, after, grown = grown_of(ONE, 2, "copy", heads_of(kind="linear"))
    text = Text(after)

    found = gains.best_gains(after, grown, text, 1)

    def loss(gain):
        scaled = grown["norm"].at[1].set(gain * grown["norm"][0])
        return losses(after, grown | {"norm": scaled}, text)[1]

    tried = scipy.optimize.minimize_scalar(loss, bounds=(0, 2), method="bounded")
    [gain] = found.of_heads
    assert loss(gain) == pytest.approx(tried.fun, abs=1e-3)
    assert found.loss == pytest.approx(tried.fun, abs=2e-2)  # of the grid
    assert found.of_bias == 1.0


def test_gains_of_heads_and_of_a_bias_are_found_together(one_device):
    heads = heads_of(kind="linear", markov_rank=V)
    _, after, grown = grown_of(ONE, 3, "counts", heads)
    # Three times too large, so that the best is within the numbers that are tried.
    grown |= {"w_markov_out": 3.0 * grown["w_markov_out"]}
    text = Text(after)

    found = gains.best_gains(after, grown, text, 1, of_bias=True)

    def loss(of):
        scaled = grown["norm"] * np.array([1.0, *of[:2]], np.float32)[:, None]
        bias = {"norm": scaled, "w_markov_out": of[2] * grown["w_markov_out"]}
        return losses(after, grown | bias, text)[1:].sum()

    best = [*found.of_heads, found.of_bias]
    tried = scipy.optimize.minimize(loss, best, method="Nelder-Mead").fun
    assert loss(best) == pytest.approx(tried, abs=2e-2)
    assert 0 < found.of_bias < 1 and loss([*found.of_heads, 1.0]) > tried + 0.1


def test_a_token_map_is_the_least_squares_of_all_heads():
    d, rng = 5, np.random.default_rng(2)
    z_NTZ, y_NTD = rng.normal(size=(2, 60, 2 * d)), rng.normal(size=(2, 60, d))
    # One matrix for both heads: columns of the first's f, the second's f, and e.
    of_f = scipy.linalg.block_diag(*z_NTZ[..., :d])
    design = np.concatenate([of_f, np.concatenate(z_NTZ[..., d:])], axis=1)
    expected = np.linalg.lstsq(design, np.concatenate(y_NTD))[0][2 * d :]

    grams = np.einsum("ntx,nty->nxy", z_NTZ, z_NTZ)
    crosses = np.einsum("ntx,ntd->nxd", z_NTZ, y_NTD)
    found = token_map.solve_token_map(grams, crosses)

    np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3)  # but for a ridge


@pytest.mark.parametrize(
    ("rank", "vocab"), [(4, V), (16, V), (20, V), (4, 12), (12, 12)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_token_map_is_the_best_of_its_rank(one_device, rank, vocab, tied):
    heads = heads_of(kind="linear", markov_rank=rank)
    cfg = regrown_config(dataclasses.replace(ONE, vocab_size=vocab), 3, heads)
    cfg = dataclasses.replace(cfg, tie_embeddings=tied)
    params = placed_params(cfg, random_params(cfg))
    rng = np.random.default_rng(4)
    map_DD, count_V = rng.normal(size=(16, 16)), rng.uniform(0, 50, vocab)

    found = token_map.bias_of_map(cfg, params, map_DD, count_V)

    w_in, w_out = (np.asarray(w, float) for w in found)
    out = params["w_embedding" if tied else "w_unembedding"]
    whole = np.asarray(params["w_embedding"], float) @ map_DD
    whole = whole * np.asarray(params["norm"], float)[0] @ np.asarray(out, float).T
    row_V1 = np.sqrt(count_V + 1.0)[:, None]
    u, s, vt = np.linalg.svd(row_V1 * whole, full_matrices=False)
    expected = (u[:, :rank] * s[:rank] @ vt[:rank]) / row_V1
    np.testing.assert_allclose(
        w_in @ w_out.T, expected, atol=2e-4 * np.abs(whole).max()
    )
    assert w_in.shape == w_out.shape == (vocab, rank)
    assert np.all(np.any(w_in != 0, axis=0))


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("parallel", "embeddings"), ("linear", "counts"), ("linear", "embeddings")],
)
def test_a_bias_begins_as_what_tells_more_of_text_that_is_kept_apart(
    one_device, learned, monkeypatch, kind, chosen
):
    after = regrown_config(ONE, 3, heads_of(kind=kind, markov_rank=8))
    text, params = Text(after), placed_params(ONE, learned)
    spoiled = {"counts": "bias_of_map", "embeddings": "bias_of"}[chosen]
    rng = np.random.default_rng(0)
    noise = 3.0 * rng.normal(size=(2, V, 8)).astype(np.float32)
    monkeypatch.setattr(starts, spoiled, lambda *_, **__: (noise[0], noise[1]))

    grown = started(ONE, after, params, "ridge", text, 3)

    apart = text.parted()[1]
    without = regrown_config(ONE, 3, heads_of(kind=kind))
    plain = started(ONE, without, params, "ridge", text.parted()[0], 3)
    assert (losses(after, grown, apart) < losses(without, plain, apart))[1:].all()
    w_in = np.asarray(grown["w_markov_in"])
    assert not np.allclose(w_in, noise[0], atol=0.1)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_text_that_is_kept_apart_is_not_that_of_the_fit(story, corpus_dir, weights):
    sources = (story, str(corpus_dir)) if weights else (story,)
    data = DataConfig(sources=sources, weights=weights, seq_len=16, batch_size=4)
    model = dataclasses.replace(ONE, vocab_size=256)
    cfg = Config(model=model, data=data)
    text = FitText(cfg, open_sources(cfg), mesh_of(), 100_000)  # 50 times the story

    parts = [{row.tobytes() for rows in part.rows() for row in rows["tokens"]}
             for part in text.parted()]  # fmt: skip

    assert len(parts[0]) > 5 * len(parts[1]) > 0 and not parts[0] & parts[1]
    once = FitText(cfg, text.corpora, mesh_of(), 640)
    assert [part.part for part in once.parted()] == [(0, 9), (9, 10)]


def test_solutions_of_ridge_have_no_gradient():
    rng = np.random.default_rng(0)
    f, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 3))

    w = ridge.solve(f.T @ f, f.T @ y)

    r = 1e-3 * np.trace(f.T @ f) / 6
    np.testing.assert_allclose(f.T @ (f @ w - y) + r * w, 0, atol=1e-9)


@pytest.mark.parametrize("unembedding", named(["shared", "own"], ["own"]))
def test_a_bias_from_embeddings_is_the_same_on_a_mesh(monkeypatch, unembedding):
    heads = heads_of(kind="linear", markov_rank=4, unembedding=unembedding)
    after = regrown_config(ONE, 3, heads)
    monkeypatch.setattr(starts, "bias_of", _noise)
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(mesh_of(*shape)):
            params = placed_params(ONE, random_params(ONE))
            grown = started(ONE, after, params, "ridge", Text(after), 3)
            w_in, w_out = (np.asarray(grown[f"w_markov_{x}"]) for x in ("in", "out"))
            found.append((w_in @ w_out.T, grown["heads"]["w_map"], grown["norm"]))

    for one, several in zip(*found, strict=True):
        np.testing.assert_allclose(several, one, rtol=2e-2, atol=2e-3)


def _noise(counts, rank, pairs):
    noise = np.random.default_rng(0).normal(size=(2, V, rank))
    return tuple(3.0 * noise.astype(np.float32))
