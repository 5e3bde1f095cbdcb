"""Forms of layers, as families of models have them, against loops in NumPy."""

import dataclasses
import functools

import jax
import naive
import numpy as np
import pytest
from forms import FORMS
from models import (
    mesh_of,
    placed_batch,
    placed_params,
    random_params,
)
from test_config import edited
from test_decode import Letters
from test_decode_kinds import params_of
from test_model import ours, packed, theirs
from usual_cases import named

from mtp_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    LayerConfig,
    RopeConfig,
    as_tree,
    config_from_json,
    config_to_json,
    freeze,
)
from mtp_jax.decode.cpu import native
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.flops import train_flops
from mtp_jax.model.rope import frequencies
from mtp_jax.model.sizes import equal_models, sizes_of
from mtp_jax.training.train_step import make_gradients

NEW, LONGEST = 24, 32
PROMPTS = [[1, 5, 9], [], [3, 3, 7, 2, 8, 8, 1]]


@pytest.mark.parametrize("name", FORMS)
def test_logits_of_every_head_are_those_of_the_loops(name, one_device):
    params, rows = random_params(FORMS[name]), packed()

    logits_NBTV = ours(FORMS[name], params, rows)

    expected_NBTV = theirs(FORMS[name], params, rows)
    np.testing.assert_allclose(logits_NBTV, expected_NBTV, atol=1e-4)
    plain = dataclasses.replace(FORMS[name], rope=RopeConfig(), layer=FORMS[name].layer)
    if FORMS[name].rope != RopeConfig():  # the positions are of those that differ
        assert np.abs(theirs(plain, params, rows) - expected_NBTV).max() > 1e-2


SPLIT = ["norms after, of all heads, linear", "one window"]


@pytest.mark.parametrize("name", named(FORMS, SPLIT))
def test_meshes_do_not_change_loss_and_gradients(name):
    """The loss is that of the loops, and gradients are those of one device."""
    model = FORMS[name]
    cfg = Config(
        model=model,
        data=DataConfig(seq_len=16, batch_size=4),
        compute=ComputeConfig(attention="xla", remat="dots"),
    )
    rows = naive.packed_rows(np.random.default_rng(1), 4, 18, 32, padding=3)
    found = []
    for mesh in (mesh_of(), mesh_of(fsdp=2, tensor=2, sequence=2)):
        with jax.set_mesh(mesh):
            params = random_params(model)
            batch = placed_batch(rows, 1)
            placed = placed_params(model, params)
            loss, _, grads = jax.jit(make_gradients(cfg))(placed, batch)
            found.append((float(loss), jax.device_get(grads)))

    target_NBT, valid_NBT = naive.targets(rows["tokens"], rows["segments"], 2)
    inputs = [rows[x][:, :16] for x in ("tokens", "segments", "positions")]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    weights = cfg.loss.head_weights or (1.0, 1.0)
    exact = naive.loss(model, params, inputs, target_NBT, valid_NBT, weights)
    assert found[0][0] == pytest.approx(exact, rel=1e-5)
    assert found[1][0] == pytest.approx(exact, rel=1e-5)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found[0][1]),
        jax.tree.leaves(found[1][1]),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4, err_msg=str(path))
        assert np.abs(one).max() > 0, path


def said(cfg, params):
    """The most likely next tokens by loops, of a text."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def call(row):
        tokens_BT = np.array([row])
        positions_BT = np.arange(len(row))[None]
        logits_NBTV = naive.all_logits(
            cfg, params, tokens_BT, 0 * tokens_BT + 1, positions_BT
        )
        return logits_NBTV[0, 0]

    return call


@functools.cache
def greedy(name):
    """Parameters, and greedy texts by loops that no near-tie decides."""
    cfg = dataclasses.replace(FORMS[name], vocab_size=16)
    with jax.set_mesh(mesh_of()):
        params = params_of(cfg)
    say, rows = said(cfg, params), [[0, *prompt] for prompt in PROMPTS]
    for row in rows:
        for _ in range(NEW):
            logits_V = say(row)[-1]
            top, second = np.sort(logits_V)[-1:-3:-1]
            assert top - second > 1e-4
            row.append(int(np.argmax(logits_V)))
    texts = [row[1 + len(p) :] for row, p in zip(rows, PROMPTS, strict=True)]
    return cfg, params, texts


def kernels_cases():
    """Each form with one of the kernels, the other pairs slow."""
    for i, name in enumerate(FORMS):
        for j, kernels in enumerate(["own", "xla", "two devices"]):
            marks = [] if (i + j) % 3 == 0 else [pytest.mark.slow]
            yield pytest.param(name, kernels, marks=marks)


@pytest.mark.parametrize(("name", "kernels"), list(kernels_cases()))
def test_greedy_texts_are_those_of_the_loops_drafted_or_not(name, kernels, monkeypatch):
    if kernels == "own" and not native.serves("float32"):
        pytest.skip("no C++ compiler here")
    if kernels == "xla":
        monkeypatch.setattr(native, "serves", lambda dtype: False)
    cfg, params, texts = greedy(name)
    mesh = mesh_of(tensor=2) if kernels == "two devices" else mesh_of()
    with jax.set_mesh(mesh):
        params = placed_params(cfg, params)
    generator = Generator(cfg, params, Letters(eos_id=16), mesh)
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]

    passes = []
    for decoder in ("plain", "blockwise", "tree"):
        found = generator.generate(prompts, max_new_tokens=NEW, decoder=decoder)
        assert [result.tokens for result in found] == texts, decoder
        passes.append(sum(result.forwards for result in found))
    assert passes[1] < passes[0]


@pytest.mark.parametrize("name", FORMS)
def test_sizes_are_those_of_the_parameters(name, one_device):
    cfg = FORMS[name]

    params = random_params(cfg)

    sizes = sizes_of(cfg)
    assert sizes.total == sum(x.size for x in jax.tree.leaves(params))
    in_heads = sum(x.size for x in jax.tree.leaves(params["heads"]))
    assert sizes.heads == in_heads


def test_arithmetic_of_windows_is_that_of_the_pairs_that_are_read():
    t, windows = 400, (0, 30, 100)
    model = dataclasses.replace(FORMS["one window"], layer=LayerConfig(windows=windows))
    cfg = Config(model=model, data=DataConfig(seq_len=t))

    of_all = dataclasses.replace(
        cfg, model=dataclasses.replace(model, layer=LayerConfig())
    )
    fewer = train_flops(of_all).total - train_flops(cfg).total

    def pairs(window):
        return sum(min(i + 0.5, window or t) for i in range(t)) / t

    # Two products of K entries a pair, 2 FLOPs an entry, three passes; two heads.
    width = model.num_query_heads * model.d_head
    saved = sum(pairs(0) - pairs(w) for w in (0, 30, 100, 100))
    assert fewer == pytest.approx(3 * 4 * width * saved, rel=1e-3)
    assert equal_models(cfg).training > 1


def test_frequencies_of_yarn_and_llama3_keep_fast_pairs_and_slow_the_others():
    for scaling in ("yarn", "llama3"):
        rope = RopeConfig(scaling=scaling, factor=8.0, original_context=4096)
        plain = 10_000.0 ** (-np.arange(0, 128, 2) / 128)

        found = frequencies(rope, 128, 10_000.0)

        np.testing.assert_allclose(found[:10], plain[:10])
        np.testing.assert_allclose(found[-8:], plain[-8:] / 8)
        assert np.all(np.diff(found) < 0)


def test_a_config_of_before_is_the_same_model():
    written = config_to_json(Config())
    del written["layer"], written["rope"]

    assert config_from_json(written, "old") == Config()


def test_forms_go_through_files():
    cfg = Config(model=FORMS["norms of each head, yarn"])

    assert freeze(as_tree(cfg)) == cfg
    assert config_from_json(config_to_json(cfg), "new") == cfg


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer__windows": (1, 2)}, "config.layer.windows has 2 values"),
        ({"layer__windows": (-1,)}, "a window is at least 1"),
        ({"layer__qk_norm": "both"}, "config.layer.qk_norm is 'both'"),
        ({"rope__factor": 2.0}, "config.rope.scaling is none"),
        ({"rope__scaling": "yarn"}, "config.rope.original_context"),
        ({"rope__scaling": "linear", "rope__factor": 0.5}, "at least 1"),
        (
            {"rope__scaling": "llama3", "rope__original_context": 8,
             "rope__low_freq_factor": 4.0},
            "config.rope.low_freq_factor (4.0)",
        ),
        (
            {"rope__scaling": "yarn", "rope__original_context": 8,
             "rope__beta_slow": 40.0},
            "config.rope.beta_slow (40.0)",
        ),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_are_refused(fields, named):
    with pytest.raises(UserError) as refused:
        freeze(edited(**fields))

    assert named in str(refused.value)


def test_a_longer_trunk_has_the_window_of_its_last_layer():
    model = FORMS["biases of queries, keys, values; some windows"]

    longer = model.resized(num_layers=6, n_future_tokens=2)
    with_one_head = model.resized(num_layers=4, n_future_tokens=1)

    assert model.layer.windows == (0, 3, 5)
    assert longer.trunk_windows == (0, 3, 3, 3) and longer.heads_window == 5
    assert with_one_head.layer.windows == (0, 3, 3, 5)
    assert model.keep_heads(1).layer == model.layer
