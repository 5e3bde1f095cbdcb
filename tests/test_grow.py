"""Models with more, fewer or other heads than before: what stays, where heads begin."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.optimize
from models import TINY, mesh_of, placed_batch, placed_params, random_params

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, DataConfig, HeadsConfig, OptimConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.growth import counts, gains, ridge
from mtp_jax.growth.starts import started
from mtp_jax.growth.states import carried, new_state
from mtp_jax.training.train_step import make_init, make_step

ONE = dataclasses.replace(TINY, num_layers=4, n_future_tokens=1)
KINDS = ("parallel", "linear", "residual", "causal", "anticausal", "serial")
T, V = 24, TINY.vocab_size


def heads_of(**fields):
    return HeadsConfig(**({"norm": "own"} | fields))


class Text:
    """Rows of a chain in which the next token is often the last one plus 1 or 2."""

    def __init__(self, model, rows=8, batches=3):
        self.config = Config(model=model)
        rng = np.random.default_rng(5)
        s = T + model.n_future_tokens
        steps = rng.choice([1, 2, 7], p=[0.6, 0.3, 0.1], size=(batches, rows, s))
        self.tokens = (np.cumsum(steps, axis=2) % V).astype(np.int32)
        self.segments = np.ones_like(self.tokens)
        self.segments[:, 0, 9:] = 2
        self.segments[:, 1, -5:] = 0

    def rows(self):
        for tokens, segments in zip(self.tokens, self.segments, strict=True):
            starts = np.diff(segments, prepend=0, axis=1) != 0
            index = np.arange(segments.shape[1])
            first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
            positions = (index - first).astype(np.int32)
            yield {"tokens": tokens, "segments": segments, "positions": positions}

    def batches(self):
        for rows in self.rows():
            yield placed_batch(rows, 1)


def grown_of(before, n, start, heads, seed=0, text=True):
    """Config and parameters of a model grown from random ones; the mesh is set."""
    params = placed_params(before, random_params(before, seed))
    after = regrown_config(before, n, heads)
    return params, after, started(before, after, params, start, Text(after), 3)


def outputs(cfg, params, tokens, segments):
    """Hidden states and logits of every head, NumPy."""
    config = Config(model=cfg, data=DataConfig(sources=("corpus",)))
    mesh = jax.sharding.get_mesh()
    model = Restored(config, params, mesh, 0, ByteTokenizer())
    return [np.asarray(x) for x in head_outputs(model, tokens, segments)]


def losses(cfg, params, text):
    """The mean loss of each head on all rows, by the logits, float64."""
    n, total, count = cfg.n_future_tokens, 0.0, 0.0
    for rows in text.rows():
        tokens, segments = rows["tokens"], rows["segments"]
        _, logits_NBTV = outputs(cfg, params, tokens, segments)
        nll, valid = of_targets(logits_NBTV[:, :, :T].astype(float), rows, n)
        total += (nll * valid).sum((1, 2))
        count += valid.sum((1, 2))
    return total / count


def of_targets(logits_NBTV, rows, n):
    tokens, segments = rows["tokens"], rows["segments"]
    target = np.stack([tokens[:, i : i + T] for i in range(1, n + 1)])
    there = np.stack([segments[:, i : i + T] for i in range(1, n + 1)])
    valid = (there == segments[None, :, :T]) & (there > 0)
    own = np.take_along_axis(logits_NBTV, target[..., None], -1)[..., 0]
    return scipy.special.logsumexp(logits_NBTV, axis=-1) - own, valid


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["random", "copy"])
def test_head_1_is_the_same_to_the_bit(one_device, kind, start):
    params, after, grown = grown_of(ONE, 3, start, heads_of(kind=kind))
    tokens = np.random.default_rng(1).integers(0, V, (2, T))

    _, before_NBTV = outputs(ONE, params, tokens, None)
    _, after_NBTV = outputs(after, grown, tokens, None)

    assert len(after_NBTV) == 3
    np.testing.assert_array_equal(before_NBTV[0], after_NBTV[0])
    if start == "random" and kind != "residual":
        assert not np.array_equal(after_NBTV[0], after_NBTV[2])


@pytest.mark.parametrize("kind", ["linear", "residual", "serial"])
def test_a_copy_of_these_kinds_says_what_head_1_says(one_device, kind):
    _, after, grown = grown_of(ONE, 3, "copy", heads_of(kind=kind))
    if kind == "serial":  # without its layers
        quiet = grown["heads"]["layers"]
        quiet = {**quiet, "w_o": 0 * quiet["w_o"]}
        quiet["mlp"] = {**quiet["mlp"], "w_down": 0 * quiet["mlp"]["w_down"]}
        grown = {**grown, "heads": {**grown["heads"], "layers": quiet}}
    tokens = np.random.default_rng(1).integers(0, V, (2, T))

    _, logits_NBTV = outputs(after, grown, tokens, None)

    np.testing.assert_allclose(logits_NBTV[1], logits_NBTV[0], atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"layers": 2}, {"kind": "serial"}])
def test_there_and_back_is_the_same_model(one_device, fields):
    layers = fields.get("layers", 1)
    before = dataclasses.replace(ONE, num_layers=3 + layers)
    params = placed_params(before, random_params(before))
    cfg, there = before, params

    for n in (4, 2, 1):
        after = regrown_config(cfg, n, heads_of(**fields))
        there = started(cfg, after, there, "copy", None, 0)
        cfg = after
    back = regrown_config(cfg, 1, HeadsConfig())
    there = started(cfg, back, there, "copy", None, 0)

    assert back == before
    jax.tree.map(np.testing.assert_array_equal, there, params)


def test_heads_that_are_there_stay_and_new_ones_are_copies(one_device):
    before = dataclasses.replace(TINY, num_layers=4, n_future_tokens=2)
    params, _, grown = grown_of(before, 4, "copy", HeadsConfig())

    for name in ("w_q", "norm_mlp"):
        was, now = params["heads"][name], grown["heads"][name]
        np.testing.assert_array_equal(now[:2], was)
        np.testing.assert_array_equal(now[2], was[0])


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


@pytest.mark.parametrize("kind", ["parallel", "causal", "linear", "serial"])
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

    [found] = gains.best_gains(after, grown, text, 1)

    def loss(gain):
        scaled = grown["norm"].at[1].set(gain * grown["norm"][0])
        return losses(after, grown | {"norm": scaled}, text)[1]

    tried = scipy.optimize.minimize_scalar(loss, bounds=(0, 2), method="bounded")
    assert loss(found) == pytest.approx(tried.fun, abs=1e-3)


def test_solutions_of_ridge_have_no_gradient():
    rng = np.random.default_rng(0)
    f, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 3))

    w = ridge.solve(f.T @ f, f.T @ y)

    r = 1e-3 * np.trace(f.T @ f) / 6
    np.testing.assert_allclose(f.T @ (f @ w - y) + r * w, 0, atol=1e-9)


def test_moments_go_with_what_they_are_of(one_device):
    cfg = Config(model=ONE, optim=OptimConfig(warmup_steps=2))
    after = dataclasses.replace(cfg, model=regrown_config(ONE, 3, heads_of()))
    rows = next(Text(ONE).rows()) | {"hash": np.zeros((8, 2), np.uint32)}
    state, _ = make_step(cfg)(make_init(cfg)(jax.random.key(0)), placed_batch(rows, 1))
    params = started(ONE, after.model, state.params, "copy", None, 0)

    found, about = carried(cfg, after, (state, {"rows": 8}), params)

    adam, was = found.opt_state[1][0], state.opt_state[1][0]
    assert int(found.step) == int(adam.count) == 1
    assert about == {"rows": 8}
    path = np.concatenate([was.mu["trunk"]["w_q"], was.mu["heads"]["w_q"]])
    now = np.concatenate([adam.mu["trunk"]["w_q"], adam.mu["heads"]["w_q"][:1]])
    np.testing.assert_array_equal(now, path)
    assert not np.any(adam.nu["heads"]["w_q"][1:])
    np.testing.assert_array_equal(adam.nu["norm"][0], was.nu["norm"])
    fresh = new_state(after, params)
    assert int(fresh.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(fresh.opt_state))


@pytest.mark.parametrize(
    ("before", "n", "start", "heads", "message"),
    [
        (ONE, 5, "copy", heads_of(kind="anticausal"), "5 anticausal heads"),
        (ONE, 4, "copy", heads_of(kind="anticausal"), "need 4 of the 4 layers"),
        (ONE, 2, "copy", heads_of(layers=4), "4 layers each need 4 of the 4 layers"),
        (ONE, 3, "ridge", HeadsConfig(), "config.heads.norm=own"),
        (ONE, 3, "unigram", heads_of(), "markov_rank is 0"),
        (ONE, 3, "ridge", heads_of(kind="residual"), "residual heads have not"),
        (ONE, 3, "ridge", heads_of(kind="causal", shared=True), "one set of weights"),
        (TINY, 3, "copy", heads_of(kind="linear"), "make it a model of one head"),
        (TINY, 3, "copy", heads_of(markov_rank=4), "make it a model of one head"),
    ],
)
def test_heads_that_cannot_be_are_refused(one_device, before, n, start, heads, message):
    with pytest.raises(UserError, match=message):
        grown_of(before, n, start, heads)


def test_growing_is_the_same_on_a_mesh():
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(mesh_of(*shape)):
            _, _, grown = grown_of(ONE, 3, "copy", heads_of())
            found.append(jax.device_get(grown))

    jax.tree.map(np.testing.assert_array_equal, *found)
