"""Low-rank updates of a frozen trunk, against the matrices that they add up to."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from grown_models import Text
from models import TINY, mesh_of, placed_batch, placed_params, random_params

from mtp_jax.config import Config, OptimConfig
from mtp_jax.errors import UserError
from mtp_jax.growth.states import restored_state
from mtp_jax.training.lora import merged
from mtp_jax.training.train_step import make_gradients, make_step, state_of

MODEL = dataclasses.replace(TINY, num_layers=4)
FROZEN = ("trunk", "embedding", "unembedding", "norms")
LORA = OptimConfig(
    peak_lr=0.02, warmup_steps=1, frozen=FROZEN, lora_rank=2, lora_alpha=3.0
)


def rows():
    found = next(Text(MODEL).rows())
    return found | {"hash": np.zeros((len(found["tokens"]), 2), np.uint32)}


def by_hand(params):
    """The trunk with its updates, in NumPy."""
    trunk, updates = params["trunk"], params["lora"]
    layers, d, h, k = trunk["w_q"].shape
    found = {name: np.array(x) for name, x in trunk.items() if name != "mlp"}
    found["mlp"] = {name: np.array(x) for name, x in trunk["mlp"].items()}
    for i in range(layers):
        for name in ("w_q", "w_k", "w_v", "w_o"):
            shape = trunk[name].shape[1:]
            rows = h * k if name == "w_o" else d
            a = np.asarray(updates[name]["a"][i]).reshape(rows, 2)
            b = np.asarray(updates[name]["b"][i]).reshape(2, -1)
            found[name][i] += 3.0 / 2 * (a @ b).reshape(shape)
        for name in ("w_gate", "w_up", "w_down"):
            pair = {x: np.asarray(y[i]) for x, y in updates["mlp"][name].items()}
            found["mlp"][name][i] += 3.0 / 2 * pair["a"] @ pair["b"]
    return found


def trained(shape, steps=3):
    """Parameters before and after steps, and the loss of the next one."""
    cfg = Config(model=MODEL, optim=LORA)
    with jax.set_mesh(mesh_of(*shape)):
        wide = placed_params(MODEL, random_params(MODEL))
        key = jax.random.key_data(jax.random.key(3))
        state = jax.jit(lambda p: state_of(cfg, p, key))(wide)
        before = jax.device_get(state.params)
        step = make_step(cfg)
        for _ in range(steps):
            state, metrics = step(state, placed_batch(rows(), 1))
        after = jax.device_get(state.params)
        _, metrics = step(state, placed_batch(rows(), 1))
    return before, after, float(metrics["loss"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
def test_a_trunk_with_updates_is_the_trunk_of_their_sum(shape):
    before, after, loss = trained(shape)

    for name in ("trunk", "w_embedding", "w_unembedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    assert np.any(after["lora"]["mlp"]["w_up"]["b"])
    plain = Config(model=MODEL)
    with jax.set_mesh(mesh_of()):
        sums = jax.device_get(merged(LORA, jax.tree.map(jax.numpy.asarray, after)))
        expected = by_hand(after)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            sums["trunk"],
            expected,
        )
        placed = placed_params(MODEL, sums)
        found, _, _ = make_gradients(plain)(placed, placed_batch(rows(), 1))
    assert float(found) == pytest.approx(loss, rel=1e-5)
    assert np.abs(sums["trunk"]["w_q"] - before["trunk"]["w_q"]).max() > 1e-3


def test_a_run_begins_with_the_trunk_as_it_is():
    before, _, _ = trained((1, 1, 1), steps=1)

    with jax.set_mesh(mesh_of()):
        sums = merged(LORA, before)

    jax.tree.map(np.testing.assert_array_equal, sums["trunk"], before["trunk"])
    assert "lora" not in sums


def test_gradients_are_those_of_the_chain_rule(one_device):
    """With W' = W + s A B, the gradient of B is s A^T dW', and of A s dW' B^T."""
    _, after, _ = trained((1, 1, 1))
    cfg = Config(model=MODEL, optim=LORA)
    batch = placed_batch(rows(), 1)
    updates = jax.tree.map(jax.numpy.asarray, after["lora"])
    plain = {name: x for name, x in after.items() if name != "lora"}
    params = {**placed_params(MODEL, plain), "lora": updates}

    _, _, grads = make_gradients(cfg)(params, batch)

    _, _, whole = make_gradients(Config(model=MODEL))(merged(LORA, params), batch)
    for i in range(2):
        dw = np.asarray(whole["trunk"]["mlp"]["w_up"][i])
        pair = {x: np.asarray(y[i]) for x, y in after["lora"]["mlp"]["w_up"].items()}
        found = grads["lora"]["mlp"]["w_up"]
        close = {"rtol": 1e-3, "atol": 1e-6}
        np.testing.assert_allclose(found["b"][i], 1.5 * pair["a"].T @ dw, **close)
        np.testing.assert_allclose(found["a"][i], 1.5 * dw @ pair["b"].T, **close)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 2}, 'put "trunk" into'),
        ({"lora_rank": -1}, "lora_rank"),
        ({"frozen": ("lora",)}, "frozen has lora"),
        ({"lora_rank": 2, "frozen": ("trunk",), "lora_alpha": 0.0}, "lora_alpha"),
    ],
)
def test_updates_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**fields)


def test_a_run_of_updates_does_not_go_on_with_other_heads_and_says_why(tmp_path):
    there = pathlib.Path(__file__).parent / "data" / "run_format_0" / "run"
    shutil.copytree(there, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "20" / "_CHECKPOINT_METADATA"
    written = json.loads(file.read_text())
    written["custom_metadata"]["config"]["optim"]["lora_rank"] = 2
    file.write_text(json.dumps(written))

    with pytest.raises(UserError, match=r"lora_rank=2.*Leave --keep_optimizer out"):
        restored_state(tmp_path / "run", types.SimpleNamespace(step=20))
