"""Models with more, fewer or other heads than before: what stays."""

import dataclasses

import foreign
import jax
import numpy as np
import pytest
from grown_models import ONE, T, Text, V, grown_of, heads_of, outputs
from models import TINY, mesh_of, placed_batch, placed_params, random_params
from usual_cases import cases

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.config import Config, HeadsConfig, OptimConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.errors import UserError
from mtp_jax.growth.grow import grow
from mtp_jax.growth.starts import check_start, started
from mtp_jax.growth.states import carried, new_state
from mtp_jax.run.import_model import import_model
from mtp_jax.training.train_step import make_init, make_step

KINDS = ("parallel", "linear", "residual", "causal", "anticausal", "serial")


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


FIELDS = {"plain": {}, "deep": {"layers": 2}, "serial": {"kind": "serial"}}


@pytest.mark.parametrize("fields", cases(FIELDS, ["deep"]))
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


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (heads_of(kind="residual", markov_rank=4), "residual heads have not"),
        (heads_of(kind="serial", shared=True), "one set of weights"),
    ],
)
def test_maps_that_heads_cannot_hold_are_refused_before_text_is_read(heads, message):
    with pytest.raises(UserError, match=message):
        check_start(ONE, regrown_config(ONE, 3, heads), "ridge")


def test_growing_is_the_same_on_a_mesh():
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(mesh_of(*shape)):
            _, _, grown = grown_of(ONE, 3, "copy", heads_of())
            found.append(jax.device_get(grown))

    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_bias_of_a_rank_that_devices_do_not_divide_is_on_fewer_shards(tmp_path):
    config = foreign.CONFIGS["mistral"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))
    import_model(folder, tmp_path / "one", tokenizer="bytes")
    sections = {"heads": {"kind": "linear", "markov_rank": 6}}

    grow(tmp_path / "one", tmp_path / "two", heads=2, start="copy", sections=sections)

    one, two = (restore_model(tmp_path / name) for name in ("one", "two"))
    assert (one.mesh.shape["fsdp"], two.mesh.shape["fsdp"]) == (8, 2)
    assert two.params["w_markov_in"].shape == (foreign.V, 6)
    np.testing.assert_array_equal(one.params["w_embedding"], two.params["w_embedding"])
