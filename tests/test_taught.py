"""What heads are taught beyond cross entropy: losses and gradients of whole models.

Against all logits at once in float64, by automatic differentiation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import naive_heads
import naive_losses
import numpy as np
import pytest
from head_cases import model_of
from models import (
    TINY,
    mesh_of,
    placed_batch,
    placed_params,
    random_params,
    tiny_config,
)
from test_grouping import depth

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.training.train_step import make_gradients

ROWS, T, N = 16, 16, 3
PARALLEL = "parallel, own tables and norms"
WEIGHTS = (1.0, 0.5, 2.0)
LOSSES = {
    kind: LossConfig(kind=kind, soft_mix=0.7, head_weights=WEIGHTS, z_loss=0.01)
    for kind in ("kl", "rkl", "tv", "nla", "lk", "e2e")
}
LOSSES["hard, smooth"] = LossConfig(
    label_smoothing=0.1, head_z_loss=(0.0, 0.02, 0.01), head_weights=WEIGHTS
)
LOSSES["tv alone"] = LossConfig(kind="tv", head_weights=WEIGHTS)
LOSSES["e2e, one waits"] = LossConfig(
    kind="e2e", soft_mix=0.7, head_weights=(1.0, 0.5, 0.0)
)
MESHES = {
    "one device": (1, 1, 1),
    "fsdp x tensor": (1, 4, 2),
    "sequence": (1, 1, 1, 4),
    "all axes": (1, 2, 2, 2),
}


def config_of(loss, model, chunk_tokens=5):
    return dataclasses.replace(
        tiny_config(),
        model=model,
        loss=LOSSES[loss],
        compute=ComputeConfig(chunk_tokens=chunk_tokens),
    )


def rows_of(kind):
    documents, padding = {"packed": (3, 4), "unpacked": (1, 0)}[kind]
    rng = np.random.default_rng(4)
    return naive.packed_rows(
        rng, ROWS, T + N, 32, n_documents=documents, padding=padding
    )


def taught_logits(logits_NBTV, xp):
    """Head 1's logits at the position where it predicts the token of each head."""
    pad = lambda i: [(0, 0), (0, i), (0, 0)]  # noqa: E731
    return xp.stack(
        [xp.pad(logits_NBTV[0][:, i:], pad(i)) for i in range(len(logits_NBTV))]
    )


@functools.cache
def expected(loss, name, kind):
    cfg = config_of(loss, model_of(name, N))
    with jax.set_mesh(mesh_of(1, 1, 1)):
        params = random_params(cfg.model)
    rows = rows_of(kind)
    target_NBT, valid_NBT = naive.targets(rows["tokens"], rows["segments"], N)
    inputs = [rows[k][:, :-N] for k in ("tokens", "segments", "positions")]
    before_NBT = np.concatenate([target_NBT[:1], target_NBT[:-1]])

    @jax.value_and_grad
    def value_and_grad(params):
        logits_NBTV = naive_heads.all_logits(
            cfg.model, params, inputs, before_NBT, xp=jnp
        )
        teacher_NBTV = jax.lax.stop_gradient(taught_logits(logits_NBTV, jnp))
        return naive_losses.total(
            cfg.loss, logits_NBTV, teacher_NBTV, target_NBT, valid_NBT,
            cfg.loss.head_weights, jnp, jax.lax.stop_gradient,
        )  # fmt: skip

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return jax.device_get(jax.jit(value_and_grad)(params64))


def assert_near(path, x, y, tolerance=1e-5):
    assert x.shape == y.shape, path
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path
    assert np.linalg.norm(y) > 0 or y.size == 0, path


def test_extra_targets_are_further_losses_of_the_one_head(one_device):
    """Of the same logits, over the targets that lie in the document and the row."""
    model = dataclasses.replace(TINY, n_future_tokens=1)
    loss = LossConfig(extra_targets=(0.5, 0.25))
    cfg = dataclasses.replace(tiny_config(), model=model, loss=loss)
    rows = naive.packed_rows(np.random.default_rng(2), ROWS, T + 1, 32, padding=3)
    params = random_params(model)

    placed = placed_params(model, params)
    found = jax.jit(make_gradients(cfg))(placed, placed_batch(rows, 2))

    segments_BS, s = rows["segments"], T + 1
    here_BT = segments_BS[:, :T]
    target_3BT, valid_3BT = np.zeros((2, 3, ROWS, T), np.int32)
    for j in range(3):
        stop = s - j - 1
        cut = np.s_[:, : min(T, stop)]
        later = np.s_[:, j + 1 : j + 1 + min(T, stop)]
        target_3BT[j][cut] = rows["tokens"][later]
        valid_3BT[j][cut] = (segments_BS[later] == here_BT[cut]) & (here_BT[cut] != 0)
    inputs = [rows[k][:, :-1] for k in ("tokens", "segments", "positions")]

    @jax.value_and_grad
    def value_and_grad(params):
        logits_1BTV = naive_heads.all_logits(model, params, inputs, None, xp=jnp)
        log_p_BTV = jax.nn.log_softmax(logits_1BTV[0])
        total = 0.0
        for weight, target, valid in zip(
            (1.0, 0.5, 0.25), target_3BT, valid_3BT, strict=True
        ):
            hit = jnp.take_along_axis(log_p_BTV, target[..., None], -1)[..., 0]
            total -= weight * jnp.sum(valid * hit) / valid.sum()
        return total

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        value, expected_grads = jax.device_get(jax.jit(value_and_grad)(params64))
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    jax.tree.map_with_path(assert_near, jax.device_get(found[2]), expected_grads)


@pytest.mark.parametrize("mesh", ["one device", "all axes"])
def test_an_entropy_mask_trains_heads_up_to_the_end_of_a_group(mesh):
    model = model_of("linear, own norms", N)
    loss = LossConfig(mask="entropy", mask_threshold=0.3)
    cfg = dataclasses.replace(tiny_config(), model=model, loss=loss)
    rows, params = rows_of("packed"), None
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        params = random_params(model)
        placed = placed_params(model, params)
        found = jax.device_get(
            jax.jit(make_gradients(cfg))(placed, placed_batch(rows, 1))
        )

    target_NBT, valid_NBT = naive.targets(rows["tokens"], rows["segments"], N)
    inputs = [rows[k][:, :-N] for k in ("tokens", "segments", "positions")]

    @jax.value_and_grad
    def value_and_grad(params, keep_NBT):
        logits_NBTV = naive_heads.all_logits(model, params, inputs, target_NBT, xp=jnp)
        log_p_NBTV = jax.nn.log_softmax(logits_NBTV)
        hit = jnp.take_along_axis(log_p_NBTV, target_NBT[..., None], -1)[..., 0]
        mean_N = jnp.sum(valid_NBT, axis=(1, 2), keepdims=True)
        return -jnp.sum(keep_NBT * hit / mean_N)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        first_BTV = naive_heads.all_logits(model, params64, inputs, target_NBT)[0]
        p_BTV = naive_losses.softmax(first_BTV, np)
        entropy_BT = -(p_BTV * np.log(p_BTV)).sum(-1)
        depth_BT = np.array(
            [depth(e, s, 0.3) for e, s in zip(entropy_BT, inputs[1], strict=True)]
        )
        keep_NBT = valid_NBT & (np.arange(N)[:, None, None] <= depth_BT)
        value, expected_grads = jax.device_get(
            jax.jit(value_and_grad)(params64, keep_NBT)
        )
    assert 0.2 < keep_NBT[2].sum() / valid_NBT[2].sum() < 0.95
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    jax.tree.map_with_path(assert_near, found[2], expected_grads)


# The others, each of which takes ten seconds, are slow.
USUAL = {("kl", 0, 1), ("tv", 2, 0), ("e2e", 0, 3), ("hard, smooth", 1, 2)}
USUAL |= {("e2e, one waits", 0, 1)}


def cases():
    names = [PARALLEL, "residual", "causal", "serial, shared, one cache"]
    for i, loss in enumerate(LOSSES):
        for j, name in enumerate(names):
            for k, mesh in enumerate(MESHES):
                usual = (loss, j, k) in USUAL
                marks = [] if usual else [pytest.mark.slow]
                if usual or (i + j + k) % 3 == 0:
                    yield pytest.param(loss, name, mesh, 1 + i % 2, marks=marks)


@pytest.mark.parametrize(("loss", "name", "mesh", "accumulation"), list(cases()))
def test_losses_and_gradients_are_those_of_all_logits(loss, name, mesh, accumulation):
    cfg = config_of(loss, model_of(name, N))
    for kind in ("packed", "unpacked"):
        with jax.set_mesh(mesh_of(*MESHES[mesh])):
            params = placed_params(cfg.model, random_params(cfg.model))
            batch = placed_batch(rows_of(kind), accumulation)
            found, _, grads = jax.device_get(
                jax.jit(make_gradients(cfg))(params, batch)
            )

        value, expected_grads = expected(loss, name, kind)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        jax.tree.map_with_path(assert_near, grads, expected_grads)
