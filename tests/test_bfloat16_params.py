"""Parameters of bfloat16 train like float32 ones: nothing that AdamW adds is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, placed_batch

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.config import CheckpointConfig, Config, OptimConfig, TrainConfig
from mtp_jax.training.train_step import make_gradients, make_init, make_step
from mtp_jax.training.wide import join, split

KEY = jax.random.key(0)


def config(param_dtype="bfloat16", **optim):
    model = dataclasses.replace(
        TINY, param_dtype=param_dtype, compute_dtype="bfloat16", d_ff=64
    )
    return Config(
        model=model,
        optim=OptimConfig(**{"peak_lr": 3e-3, "warmup_steps": 1, **optim}),
        train=TrainConfig(steps=100),
    )


def batch_of(seed, rows=16, length=34):
    """Rows that count up by 1 or 2, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    steps = np.arange(length) * rng.integers(1, 3, (rows, 1))
    tokens = (rng.integers(0, 4, (rows, 1)) + steps) % TINY.vocab_size
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = {
        "tokens": tokens.astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": positions,
        "hash": np.zeros((rows, 2), np.uint32),
    }
    return placed_batch(batch, 1)


def wide(state):
    """The float32 weights of a state."""
    return jax.device_get(join(state.params, state.rounded_off))


def test_a_float32_is_a_bfloat16_near_it_and_what_that_lacks():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = [0, 1, 0x80000000, 0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F80FFFF]
    x = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    x = x[np.abs(x) < 3e38]  # larger ones round to infinity

    upper, lower = split(jnp.asarray(x), "bfloat16")

    np.testing.assert_array_equal(
        np.asarray(join(upper, lower)).view(np.uint32), x.view(np.uint32)
    )
    nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    off = np.abs(np.asarray(upper, np.float64) - x.astype(np.float64))
    assert (off == np.abs(nearest - x.astype(np.float64))).all()
    assert split(x, "float32")[1] is None and join(x, None) is x


def test_an_update_too_small_for_bfloat16_is_kept(one_device):
    cfg = config(peak_lr=1e-5, weight_decay=0.1, eps=1e-3)
    state, batch = make_init(cfg)(KEY), batch_of(0)
    before = wide(state)
    grads = jax.device_get(jax.jit(make_gradients(cfg))(state.params, batch)[2])
    norm = np.sqrt(
        sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    )

    state, metrics = make_step(cfg)(state, batch)

    def expected(path, weight, grad):
        grad = grad.astype(np.float64) * min(1.0, 1.0 / norm)
        decay = 0.1 * weight if path[-1].key.startswith("w_") else 0.0
        return weight - 1e-5 * (grad / (np.abs(grad) + 1e-3) + decay)

    after = jax.tree.map_with_path(expected, before, grads)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-7),
        wide(state),
        after,
    )
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_the_loss_curve_is_that_of_float32(one_device):
    curves, norms = {}, {}
    for param_dtype in ("float32", "bfloat16"):
        cfg = config(param_dtype, peak_lr=3e-4, b2=0.999)
        step, state = make_step(cfg), make_init(cfg)(KEY)
        losses = []
        for k in range(100):
            state, metrics = step(state, batch_of(k))
            losses.append(float(metrics["loss"]))
        curves[param_dtype] = losses
        norms[param_dtype] = wide(state)["trunk"]["norm_mlp"]

    fell = curves["float32"][0] - curves["float32"][-1]
    off = np.abs(np.subtract(curves["bfloat16"], curves["float32"]))
    assert fell > 0.5 and off.max() < 0.02 * fell
    moved = np.abs(norms["float32"] - 1)
    assert moved.max() > 1e-3
    np.testing.assert_allclose(norms["bfloat16"], norms["float32"], atol=1e-3)


def test_a_bad_step_leaves_all_bits_as_they_were(one_device):
    cfg = config()
    state = make_init(cfg)(KEY)
    bad = {**state.params, "norm": jnp.full_like(state.params["norm"], jnp.nan)}
    state = dataclasses.replace(state, params=bad)
    before = jax.device_get((state.params["w_embedding"], state.rounded_off))

    state, metrics = make_step(cfg)(state, batch_of(0))

    assert int(metrics["bad_steps"]) == 1
    after = jax.device_get((state.params["w_embedding"], state.rounded_off))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_weight_takes_twelve_bytes_of_the_state_in_either_dtype(one_device):
    for param_dtype in ("float32", "bfloat16"):
        shapes = jax.eval_shape(make_init(config(param_dtype)), KEY)
        weights = sum(x.size for x in jax.tree.leaves(shapes.params))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        assert 0 <= held - 12 * weights < 100


def test_a_state_of_before_goes_on_with_its_weights_and_moments(one_device, tmp_path):
    """Earlier versions saved moments of bfloat16, and nothing that was rounded off."""
    cfg = config()
    state, _ = make_step(cfg)(make_init(cfg)(KEY), batch_of(0))

    def narrow(x):
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    old = dataclasses.replace(
        state, opt_state=jax.tree.map(narrow, state.opt_state), rounded_off=None
    )
    wanted = jax.device_get((old.params, old.opt_state))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, old, {})
    checkpoints.wait()

    abstract = abstract_items(jax.eval_shape(make_init(cfg), KEY))
    _, items, _ = restore_newest(checkpoints, abstract)
    found = state_from_items(items)

    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), wanted[0])
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, x.dtype)),
        jax.device_get(found.opt_state),
        wanted[1],
    )
    assert all(not x.any() for x in jax.tree.leaves(found.rounded_off))
    types = [jax.tree.map(lambda x: x.dtype, s) for s in (found, state)]
    assert types[0] == types[1]
    _, metrics = make_step(cfg)(found, batch_of(1))
    assert np.isfinite(float(metrics["loss"]))


def test_a_state_with_its_rounding_comes_back_bit_by_bit(one_device, tmp_path):
    cfg = config()
    state, _ = make_step(cfg)(make_init(cfg)(KEY), batch_of(0))
    wanted = wide(state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.wait()

    abstract = abstract_items(jax.eval_shape(make_init(cfg), KEY))
    _, items, _ = restore_newest(checkpoints, abstract)

    checkpoints.close()
    found = wide(state_from_items(items))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
