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
from models import mesh_of, placed_batch, placed_params, random_params, tiny_config

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
            cfg.loss, logits_NBTV, teacher_NBTV, target_NBT, valid_NBT, WEIGHTS, jnp,
            jax.lax.stop_gradient,
        )  # fmt: skip

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return jax.device_get(jax.jit(value_and_grad)(params64))


def assert_near(path, x, y, tolerance=1e-5):
    assert x.shape == y.shape, path
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), path
    assert np.linalg.norm(y) > 0 or y.size == 0, path


# The others, each of which takes ten seconds, are slow.
USUAL = {("kl", 0, 1), ("tv", 2, 0), ("e2e", 0, 3), ("hard, smooth", 1, 2)}


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
