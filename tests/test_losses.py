"""Targets, losses and gradients against slow definitions that share no code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import (
    TINY,
    mesh_of,
    placed_batch,
    placed_params,
    random_params,
    tiny_config,
)

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.decode.decoders.state import most_likely
from mtp_jax.loss import batch_loss
from mtp_jax.loss.metrics import summarize
from mtp_jax.loss.targets import future_targets, target_counts
from mtp_jax.loss.weights import StepWeights, head_weights
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.train_step import make_gradients

ROWS, T = 32, 16
MESHES = {
    "one device": (1, 1, 1),
    "fsdp": (1, 8, 1),
    "fsdp x tensor": (1, 4, 2),
    "all axes": (2, 2, 2),
    "sequence": (1, 1, 1, 8),
    "fsdp x tensor x sequence": (1, 2, 2, 2),
    "fsdp x tensor x vocab": (1, 2, 2, 1, 2),
    "sequence x vocab": (1, 1, 1, 2, 4),
}
KINDS = {"packed": (3, 4), "unpacked": (1, 0)}  # documents a row, padding
# Layers, the loss, and what it makes of the heads; every n has a loss of its own.
CASES = {
    1: (3, LossConfig(), [1]),
    2: (4, LossConfig(head_decay=0.5, z_loss=0.01), [1, 0.5]),
    4: (5, LossConfig(head_weights=(0.5, 2, 0, 1)), [0.5, 2, 0, 1]),
    8: (9, LossConfig(), [1] * 8),
}


def config_of(n, form="fused", chunk_tokens=0, **of_model):
    layers, loss, _ = CASES[n]
    return dataclasses.replace(
        tiny_config(num_layers=layers, n_future_tokens=n, **of_model),
        loss=loss,
        compute=ComputeConfig(head_loss=form, chunk_tokens=chunk_tokens),
    )


def rows_of(kind, n):
    documents, padding = KINDS[kind]
    return naive.packed_rows(
        np.random.default_rng(n),
        ROWS,
        T + n,
        TINY.vocab_size,
        n_documents=documents,
        padding=padding,
    )


@functools.cache
def expected(n):
    """Loss and gradients of all logits at once, in float64, by kind of rows."""
    cfg = config_of(n)
    _, of_loss, weights = CASES[n]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        params = random_params(cfg.model)

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(*args):
        return naive.loss(cfg.model, *args, weights, of_loss.z_loss, xp=jnp)

    found = {}
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        for kind in KINDS:
            rows = rows_of(kind, n)
            target_and_valid = naive.targets(rows["tokens"], rows["segments"], n)
            inputs = [rows[k][:, :-n] for k in ("tokens", "segments", "positions")]
            result = value_and_grad(params64, inputs, *target_and_valid)
            found[kind] = jax.device_get(result)
    return found


# Tokens of a device's chunk: a divisor of what it has, a number that is none, all.
CHUNKS = (16, 5, 0)
ALL = [
    (form, n, accumulation, mesh, chunk_tokens)
    for form in ("fused", "remat", "naive")
    for n in CASES
    for accumulation in (1, 4)
    for mesh in MESHES
    for chunk_tokens in (CHUNKS if form != "naive" else (0,))
]
# Each takes a compilation, so of most kinds there are a few, of which every second is
# slow; `--every_case` takes all.
USUAL = [
    case if i % 22 else pytest.param(case, marks=pytest.mark.slow)
    for i, case in enumerate(ALL)
    if i % 11 == 0 or (case[:2] == ("fused", 4) and case[-1] == 5)
]


def pytest_generate_tests(metafunc):
    if "form_case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every_case")
        metafunc.parametrize("form_case", ALL if every else USUAL, ids=str)


def gradients_of(cfg, rows_by_kind, accumulation):
    gradients = jax.jit(make_gradients(cfg))
    params = placed_params(cfg.model, random_params(cfg.model))
    return {
        kind: jax.device_get(gradients(params, placed_batch(rows, accumulation)))
        for kind, rows in rows_by_kind.items()
    }


def test_loss_and_gradients_are_those_of_all_logits_at_once(form_case):
    form, n, accumulation, mesh, chunk_tokens = form_case
    cfg = config_of(n, form, chunk_tokens)
    rows_by_kind = {kind: rows_of(kind, n) for kind in KINDS}
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        found = gradients_of(cfg, rows_by_kind, accumulation)

    for kind, (loss, sums, grads) in found.items():
        expected_loss, expected_grads = expected(n)[kind]
        rows = rows_by_kind[kind]
        _, valid_NBT = naive.targets(rows["tokens"], rows["segments"], n)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_array_equal(sums.count_N, valid_NBT.sum(axis=(1, 2)))
        jax.tree.map_with_path(assert_near, grads, expected_grads)


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    cfg = config_of(2, "fused", 0, param_dtype="bfloat16")
    rows = {name: np.tile(x, (16, 1)) for name, x in rows_of("packed", 2).items()}
    with jax.set_mesh(mesh_of(1, 1, 1)):
        _, _, at_once = gradients_of(cfg, {"": rows}, 1)[""]
        _, _, one_by_one = gradients_of(cfg, {"": rows}, len(rows["tokens"]))[""]

    near = functools.partial(assert_near, tolerance=0.01)
    jax.tree.map_with_path(near, one_by_one["trunk"], at_once["trunk"])


@pytest.mark.parametrize(
    "mesh", ["one device", "fsdp x tensor", "fsdp x tensor x vocab"]
)
@pytest.mark.parametrize("form", ["fused", "remat", "naive"])
def test_gradients_in_bfloat16_are_those_in_float64_to_its_rounding(form, mesh):
    cfg = config_of(4, form, 5, compute_dtype="bfloat16")
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        found = gradients_of(cfg, {"packed": rows_of("packed", 4)}, 1)

    loss, _, grads = found["packed"]
    expected_loss, expected_grads = expected(4)["packed"]
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-3)
    near = functools.partial(assert_near, tolerance=0.08)
    jax.tree.map_with_path(near, grads, expected_grads)


@pytest.mark.parametrize("form", ["fused", "remat"])
def test_chunks_add_up_in_float32(one_device, form):
    by_chunk = [
        gradients_of(
            config_of(4, form, chunk_tokens, compute_dtype="bfloat16"),
            {"packed": rows_of("packed", 4)},
            1,
        )["packed"][2]["w_unembedding"]
        for chunk_tokens in (1, 0)
    ]

    # 512 chunks added up in bfloat16 would be off by several percent.
    assert_near("w_unembedding", *by_chunk, tolerance=2e-3)


def weighted_loss(form):
    """A function of the unembedding alone, and a place to take its derivatives at."""
    cfg = config_of(2, form)
    _, build = model_builder(cfg.model)
    params = placed_params(cfg.model, random_params(cfg.model))
    rows = {name: x[0] for name, x in placed_batch(rows_of("packed", 2), 1).items()}

    def loss(w_unembedding):
        model = build({**params, "w_unembedding": w_unembedding})
        return batch_loss.batch_loss(
            model, rows, StepWeights(jnp.ones(2)), LossConfig(z_loss=0.01), cfg.compute
        )[0]

    return loss, params["w_unembedding"]


@pytest.mark.parametrize("form", ["remat", "naive"])
def test_remat_and_naive_have_derivatives_of_every_kind(one_device, form):
    loss, w_VD = weighted_loss(form)
    along_VD = jnp.ones_like(w_VD)

    _, slope = jax.jit(lambda w: jax.jvp(loss, (w,), (along_VD,)))(w_VD)
    _, bend_VD = jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (along_VD,)))(w_VD)

    grad = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope, jnp.sum(grad(w_VD)), rtol=1e-4, atol=1e-4)
    step = 1e-2
    difference = (grad(w_VD + step) - grad(w_VD - step)) / (2 * step)
    assert_near("second", bend_VD, difference, tolerance=0.01)


def test_fused_says_what_it_cannot_give(one_device):
    loss, w_VD = weighted_loss("fused")

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (w_VD,), (w_VD,))
    with pytest.raises(NotImplementedError, match=r"config\.compute\.head_loss"):
        jax.jvp(jax.grad(loss), (w_VD,), (w_VD,))
    with pytest.raises(NotImplementedError, match=r"config\.compute\.head_loss"):
        jax.grad(lambda w: jnp.sum(jax.grad(loss)(w)))(w_VD)


@pytest.mark.parametrize("form", ["fused", "remat", "naive"])
def test_sums_are_the_same_with_and_without_gradients(one_device, form):
    cfg = config_of(4, form, 5)
    _, build = model_builder(cfg.model)
    params = placed_params(cfg.model, random_params(cfg.model))
    rows = {name: x[0] for name, x in placed_batch(rows_of("packed", 4), 1).items()}

    sums = jax.jit(lambda p: batch_loss.head_sums(build(p), rows, cfg.compute))(params)

    expected_sums = gradients_of(cfg, {"packed": rows_of("packed", 4)}, 1)["packed"][1]
    there = {name: x for name, x in vars(expected_sums).items() if x is not None}
    assert len(there) == 5
    for name, x in there.items():
        np.testing.assert_allclose(getattr(sums, name), x, rtol=1e-6, err_msg=name)


def assert_near(path, x, y, tolerance=1e-5):
    """Equal to a part of the norm of what is expected."""
    assert x.shape == y.shape, path
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path
    assert np.linalg.norm(y) > 0 or y.size == 0, path


def test_the_microbatches_above_hold_different_numbers_of_targets():
    for n in CASES:
        rows = rows_of("packed", n)

        _, valid_NBT = naive.targets(rows["tokens"], rows["segments"], n)

        counts = valid_NBT[-1].reshape(4, -1).sum(axis=1)
        assert len(set(counts.tolist())) > 1, n
        assert counts.sum() > 0, n


def test_a_batch_of_padding_has_no_loss_and_no_gradient(one_device):
    cfg = config_of(2)
    params = placed_params(cfg.model, random_params(cfg.model))
    rows = {name: np.zeros_like(x) for name, x in rows_of("packed", 2).items()}

    loss, sums, grads = jax.jit(make_gradients(cfg))(params, placed_batch(rows, 1))

    assert loss == 0
    np.testing.assert_array_equal(sums.count_N, [0, 0])
    assert all((x == 0).all() for x in jax.tree.leaves(jax.device_get(grads)))
    assert all(np.isfinite(x).all() for x in summarize(sums).values())


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("documents", [1, 3])
def test_targets_are_the_tokens_ahead_in_the_same_document(n, documents):
    rows = naive.packed_rows(
        np.random.default_rng(n), 4, T + n, 32, n_documents=documents, padding=4
    )

    targets_NBT, valid_NBT = future_targets(rows["tokens"], rows["segments"], n)
    count_N = target_counts(rows["segments"], n)

    expected_NBT, expected_valid_NBT = naive.targets(
        rows["tokens"], rows["segments"], n
    )
    np.testing.assert_array_equal(valid_NBT, expected_valid_NBT)
    np.testing.assert_array_equal(
        targets_NBT[expected_valid_NBT], expected_NBT[expected_valid_NBT]
    )
    np.testing.assert_array_equal(count_N, expected_valid_NBT.sum(axis=(1, 2)))
    assert targets_NBT.shape == (n, 4, T)


def test_targets_stop_at_document_ends_and_at_padding():
    tokens_BS = np.array([[10, 11, 12, 20, 21, 22, 0, 0]], np.int32)
    segments_BS = np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32)

    targets_NBT, valid_NBT = future_targets(tokens_BS, segments_BS, 2)

    np.testing.assert_array_equal(targets_NBT[0, 0], [11, 12, 20, 21, 22, 0])
    np.testing.assert_array_equal(valid_NBT[0, 0], [1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(valid_NBT[1, 0], [1, 0, 0, 1, 0, 0])


def test_a_row_too_short_for_the_last_head_is_refused_with_the_remedy():
    row = np.ones((1, 3), np.int32)

    with pytest.raises(ValueError, match="rows must hold seq_len \\+ n tokens"):
        future_targets(row, row, 3)


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [1, 1, 1]),
        ({"head_decay": 0.5}, [1, 0.5, 0.25]),
        ({"head_weights": (0.2, 0.0, 3.0)}, [0.2, 0, 3]),
    ],
)
def test_head_weights_are_uniform_decaying_or_listed(fields, weights):
    weights_N = head_weights(LossConfig(**fields), 3)

    assert weights_N.dtype == np.float32
    np.testing.assert_allclose(weights_N, weights, rtol=1e-6)


def test_the_most_likely_token_is_the_first_of_equals():
    logits_BTV = np.array(
        [[[0.0, 3, 3, 1], [-2, -1, -3, -1], [5, 0, 0, 5]]], np.float32
    )

    tokens_BT = most_likely(logits_BTV)

    np.testing.assert_array_equal(tokens_BT, np.argmax(logits_BTV, axis=-1))
