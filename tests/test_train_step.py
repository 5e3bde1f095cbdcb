"""The step against AdamW in NumPy, and what it promises of states and metrics."""

import dataclasses
import functools
import math

import jax
import naive
import numpy as np
import optax
import pytest
from models import TINY, mesh_of, placed_batch

from mtp_jax.config import Config, OptimConfig, TrainConfig
from mtp_jax.training.optim import learning_rate
from mtp_jax.training.train_step import make_gradients, make_init, make_step

STEPS, WARMUP = 6, 2
CFG = Config(
    model=TINY,
    optim=OptimConfig(
        peak_lr=0.02, warmup_steps=WARMUP, decay_ratio=0.1, eps=1e-3, clip_norm=1.9
    ),
    train=TrainConfig(steps=STEPS, accumulation=2),
)
ALL_AXES = (2, 2, 2)


@functools.cache
def compiled(make, shape):
    """`make(CFG)` on a mesh of that shape."""
    assert jax.sharding.get_mesh() == mesh_of(*shape)
    return jax.jit(make(CFG)) if make is make_gradients else make(CFG)


@pytest.fixture
def all_axes():
    with jax.set_mesh(mesh_of(*ALL_AXES)):
        yield


def fresh_state(shape=ALL_AXES):
    return compiled(make_init, shape)(jax.random.key(0))


def batch_of(seed, length=12):
    rng = np.random.default_rng(seed)
    rows = naive.packed_rows(rng, 16, length, TINY.vocab_size, padding=2)
    rows["hash"] = rng.integers(2**31, 2**32, (16, 2), dtype=np.uint32)
    return placed_batch(rows, CFG.train.accumulation)


def step(state, batch, shape=ALL_AXES):
    return compiled(make_step, shape)(state, batch)


def with_param(state, name, value):
    """The state with one parameter full of a value."""
    x = state.params[name]
    full = jax.device_put(np.full(x.shape, value, x.dtype), x.sharding)
    return dataclasses.replace(state, params={**state.params, name: full})


def test_every_layer_of_every_parameter_learns_and_moves(all_axes):
    state = fresh_state()
    before = jax.device_get(state.params)

    state, _ = step(state, batch_of(0))

    after = jax.device_get(state.params)
    momentum = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    for path, x in jax.tree.leaves_with_path(before):
        y, learnt = (
            functools.reduce(lambda tree, key: tree[key.key], path, tree)
            for tree in (after, momentum)
        )
        stacked = path[0].key in ("trunk", "heads")
        for i in range(len(x)) if stacked else [slice(None)]:
            assert (learnt[i] != 0).any(), (path, i)
            assert (x[i] != y[i]).any(), (path, i)


def test_three_steps_are_those_of_adamw_in_numpy(all_axes):
    state, gradients = fresh_state(), compiled(make_gradients, ALL_AXES)
    params = leaves64(state.params)
    first = {name: np.zeros_like(x) for name, x in params.items()}
    second = {name: np.zeros_like(x) for name, x in params.items()}
    optim, norms = CFG.optim, []

    for k in range(1, 4):
        batch = batch_of(k)
        loss, _, grads = gradients(state.params, batch)
        grads, before = leaves64(grads), leaves64(state.params)
        state, metrics = step(state, batch)
        norms.append(math.sqrt(sum((x**2).sum() for x in grads.values())))
        np.testing.assert_allclose(metrics["grad_norm"], norms[-1], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        for name, x in params.items():
            grad = grads[name] * min(1, optim.clip_norm / norms[-1])
            first[name] = optim.b1 * first[name] + (1 - optim.b1) * grad
            second[name] = optim.b2 * second[name] + (1 - optim.b2) * grad**2
            mean = first[name] / (1 - optim.b1**k)
            square = second[name] / (1 - optim.b2**k)
            update = mean / (np.sqrt(square) + optim.eps)
            if name.split(".")[-1].startswith("w_"):
                update = update + optim.weight_decay * x
            params[name] = x - expected_rate(k) * update
            np.testing.assert_allclose(
                leaves64(state.params)[name] - before[name],
                params[name] - x,
                atol=2e-6,
                err_msg=name,
            )

    assert min(norms) < optim.clip_norm < max(norms)


def leaves64(tree):
    """Arrays by the names that lead to them."""
    return {
        ".".join(key.key for key in path): np.asarray(x, np.float64)
        for path, x in jax.tree.leaves_with_path(jax.device_get(tree))
    }


def expected_rate(k):
    """Learning rate of step k, counted from 1."""
    peak, end = CFG.optim.peak_lr, CFG.optim.peak_lr * CFG.optim.decay_ratio
    if k <= WARMUP:
        return peak * k / WARMUP
    done = (k - WARMUP) / (STEPS - WARMUP)
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def test_learning_rate_warms_up_and_ends_on_its_last_value():
    schedule = learning_rate(CFG.optim, STEPS)

    rates = [float(schedule(count)) for count in range(STEPS)]

    peak = CFG.optim.peak_lr
    np.testing.assert_allclose(rates, [expected_rate(k + 1) for k in range(STEPS)])
    np.testing.assert_allclose(rates[0], peak / WARMUP)
    np.testing.assert_allclose(rates[WARMUP - 1], peak)
    np.testing.assert_allclose(rates[-1], peak * CFG.optim.decay_ratio)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    schedule = learning_rate(OptimConfig(peak_lr=1.0, warmup_steps=100), 10)

    rates = [float(schedule(count)) for count in range(10)]

    np.testing.assert_allclose(rates, np.arange(1, 11) / 100, rtol=1e-6)


def test_the_state_is_donated(all_axes):
    state = fresh_state()

    new_state, _ = step(state, batch_of(0))

    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new_state))


@pytest.mark.parametrize(
    ("name", "value"), [("norm", np.nan), ("w_unembedding", 3e38), ("norm", np.inf)]
)
def test_a_step_that_is_not_finite_changes_no_parameter(name, value, all_axes):
    state, metrics = step(fresh_state(), batch_of(0))
    good = jax.device_get(state.params[name])
    state = with_param(state, name, value)
    before = jax.device_get((state.params, state.opt_state))

    bad_steps = []
    for k in range(2):
        state, metrics = step(state, batch_of(k))
        bad_steps.append(int(metrics["bad_steps"]))
    after = jax.device_get((state.params, state.opt_state))

    assert bad_steps == [1, 2]
    assert state.bad_steps == 2
    assert state.step == 3
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)

    repaired = jax.device_put(good, state.params[name].sharding)
    state = dataclasses.replace(state, params={**state.params, name: repaired})
    state, metrics = step(state, batch_of(2))

    assert state.bad_steps == metrics["bad_steps"] == 0
    assert (jax.device_get(state.params[name]) != good).any()
    np.testing.assert_allclose(metrics["lr"], expected_rate(2), rtol=1e-6)


def test_metrics_are_those_of_the_batch(all_axes):
    state, batch = fresh_state(), batch_of(0)

    _, metrics = step(state, batch)

    rows = {name: np.asarray(x).reshape(16, -1) for name, x in batch.items()}
    _, valid_NBT = naive.targets(rows["tokens"], rows["segments"], 2)
    assert set(metrics) == {
        "loss",
        "loss_N",
        "accuracy_N",
        "accepted_N",
        "accept_length",
        "grad_norm",
        "lr",
        "bad_steps",
        "tokens",
        "hash",
    }
    assert metrics["tokens"] == valid_NBT[0].sum()
    np.testing.assert_allclose(metrics["loss"], metrics["loss_N"].sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["lr"], expected_rate(1), rtol=1e-6)


def test_the_hash_of_a_batch_is_the_sum_of_its_rows_without_carry(all_axes):
    batch = batch_of(0)

    _, metrics = step(fresh_state(), batch)

    rows = np.asarray(batch["hash"]).reshape(16, 2)
    total = [sum(int(x) for x in column) for column in rows.T]
    assert metrics["hash"].dtype == np.uint32
    assert np.asarray(metrics["hash"]).tolist() == [x % 2**32 for x in total]
    assert min(total) > 2**32


def test_steps_count_and_carry_the_key_along(all_axes):
    state = fresh_state()
    key = np.array(state.key)

    for k in range(3):
        assert state.step == k
        state, _ = step(state, batch_of(k))

    np.testing.assert_array_equal(state.key, key)


def test_the_step_compiles_once(all_axes, caplog):
    once, state = make_step(CFG), fresh_state()
    batches = [batch_of(k) for k in range(3)]

    with jax.log_compiles():
        for batch in batches:
            state, _ = once(state, batch)

    compiled_programs = [
        record.getMessage().split(" with ")[0]
        for record in caplog.records
        if record.getMessage().startswith("Compiling ")
    ]
    assert compiled_programs == ["Compiling jit(step)"]


def test_the_mesh_changes_neither_the_parameters_nor_the_losses():
    found = []
    for shape in [(1, 1, 1), ALL_AXES, (1, 2, 2, 2), (2, 2, 1, 2)]:
        with jax.set_mesh(mesh_of(*shape)):
            state, run_losses = fresh_state(shape), []
            initial = jax.device_get(state.params)
            for k in range(3):
                state, metrics = step(state, batch_of(k, length=14), shape)
                run_losses.append(jax.device_get(metrics["loss_N"]))
        found.append((initial, run_losses))

    expected_initial, expected_losses = found.pop(0)
    for initial, run_losses in found:
        np.testing.assert_allclose(run_losses, expected_losses, rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, initial, expected_initial)


def test_learning_one_batch_by_heart_lowers_every_loss(all_axes):
    state, batch, found = fresh_state(), batch_of(0), []

    for _ in range(STEPS):
        state, metrics = step(state, batch)
        found.append(np.asarray(metrics["loss_N"]))

    assert (found[-1] < 0.97 * found[0]).all(), found


def test_two_hundred_guarded_steps_neither_compile_nor_touch_the_host(one_device):
    step_fn, state, batch = (
        make_step(CFG),
        make_init(CFG)(jax.random.key(0)),
        batch_of(0),
    )
    state, _ = step_fn(state, batch)
    compiled = []

    def listen(event, *_, **__):
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)

    try:
        with jax.transfer_guard("disallow"):
            for _ in range(200):
                state, metrics = step_fn(state, batch)
                jax.block_until_ready(metrics)
        assert compiled == []
        jax.jit(lambda x: x * 3 + 1)(state.step)
        assert compiled  # so the listener hears what there is to hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

    assert int(state.step) == 201
