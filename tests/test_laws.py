"""Losses between laws and their gradients, in float64, against finite differences."""

import functools

import jax
import jax.numpy as jnp
import naive_losses
import numpy as np
import pytest
from models import mesh_of

from mtp_jax.loss import laws
from mtp_jax.parallel.sharding import spec

C, V = 5, 12
SHARDS = [1, 2, 4]
KINDS = ["kl", "rkl", "tv", "nla", "lk"]


def logits(seed, size=1.5):
    return size * np.random.default_rng(seed).normal(size=(C, V))


def found(kind, student, teacher, shards):
    """Loss and gradient by the chunk's arithmetic, in float64."""
    by_vocab = spec(None, "vocab")

    def local(student_Cv, teacher_Cv):
        student, teacher = laws.law_of(student_Cv), laws.law_of(teacher_Cv)
        alpha_C = laws.acceptance(student, teacher)
        loss_C, d_Cv = laws.soft_loss(kind, student, teacher, alpha_C)
        return loss_C, d_Cv, alpha_C

    with jax.enable_x64(True), jax.set_mesh(mesh_of(tensor=shards)):
        placed = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), by_vocab))
            for x in (student, teacher)
        ]
        run = jax.shard_map(
            local,
            in_specs=(by_vocab, by_vocab),
            out_specs=(spec(None), by_vocab, spec(None)),
        )
        return jax.device_get(jax.jit(run)(*placed))


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_finite_differences(kind, shards):
    student, teacher = logits(1), logits(2)

    loss_C, d_CV, alpha_C = found(kind, student, teacher, shards)

    assert loss_C.dtype == d_CV.dtype == np.float64
    naive = functools.partial(naive_losses.soft, kind, teacher=teacher)
    share = np.exp(-3 * alpha_C)  # a constant of the lk loss
    fixed = functools.partial(naive, constant=lambda _: share)
    np.testing.assert_allclose(loss_C, naive(student), rtol=1e-12)
    slope_CV, h = np.zeros((C, V)), 1e-6
    for v in range(V):
        step = h * np.eye(V)[v]
        slope_CV[:, v] = (fixed(student + step) - fixed(student - step)) / (2 * h)
    np.testing.assert_allclose(d_CV, slope_CV, atol=1e-8)
    assert np.abs(slope_CV).max() > 0.01
    p, q = (naive_losses.softmax(x, np) for x in (student, teacher))
    np.testing.assert_allclose(alpha_C, np.minimum(p, q).sum(1), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_far_from_the_teachers_has_finite_gradients(kind):
    student, teacher = logits(1, 300.0), logits(2, 300.0)

    loss_C, d_CV, _ = found(kind, student, teacher, 1)

    assert np.isfinite(loss_C).all() and np.isfinite(d_CV).all()


def test_the_entropy_of_a_law_is_its_mean_surprise():
    x_CV = logits(3)
    by_vocab = spec(None, "vocab")
    with jax.enable_x64(True), jax.set_mesh(mesh_of(tensor=2)):
        placed = jax.device_put(
            x_CV, jax.NamedSharding(jax.sharding.get_mesh(), by_vocab)
        )
        run = jax.shard_map(
            lambda x: laws.entropy(laws.law_of(x)),
            in_specs=by_vocab,
            out_specs=spec(None),
        )
        entropy_C = jax.device_get(jax.jit(run)(placed))

    p_CV = naive_losses.softmax(x_CV, np)
    np.testing.assert_allclose(entropy_C, -(p_CV * np.log(p_CV)).sum(1), rtol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_slopes_of_the_end_to_end_loss_are_those_of_finite_differences(n):
    alpha_NBT = np.random.default_rng(n).uniform(0.05, 1, size=(n, 2, 3))
    alpha_NBT[1, 0, 0] = 0.0  # where a division by alpha would fail
    with jax.enable_x64(True):
        alphas, all_count = jnp.asarray(alpha_NBT), jnp.full(alpha_NBT.shape, True)
        loss_BT, slope_NBT = jax.device_get(laws.end_to_end(alphas, all_count))

    np.testing.assert_allclose(loss_BT, naive_losses.end_to_end(alpha_NBT[1:]))
    np.testing.assert_array_equal(slope_NBT[0], 0)
    h = 1e-6
    for i in range(1, n):
        up, down = alpha_NBT.copy(), alpha_NBT.copy()
        up[i] += h
        down[i] -= h
        slope_BT = naive_losses.end_to_end(down[1:]) - naive_losses.end_to_end(up[1:])
        np.testing.assert_allclose(slope_NBT[i], slope_BT / (2 * h), atol=1e-9)


@pytest.mark.parametrize("waiting", [1, 2, 3])
def test_the_end_to_end_loss_is_as_if_heads_that_wait_were_not_there(waiting):
    alpha_NBT = np.random.default_rng(5).uniform(0.05, 1, size=(4, 2, 3))
    others = [i for i in range(4) if i != waiting]
    counts_NBT = np.broadcast_to(np.arange(4)[:, None, None] != waiting, (4, 2, 3))
    with_nan = np.where(counts_NBT, alpha_NBT, np.nan)

    loss_BT, slope_NBT = laws.end_to_end(jnp.asarray(with_nan), jnp.asarray(counts_NBT))
    of_others = laws.end_to_end(
        jnp.asarray(alpha_NBT[others]), jnp.full((3, 2, 3), True)
    )

    np.testing.assert_allclose(loss_BT, of_others[0], rtol=1e-6)
    np.testing.assert_allclose(
        np.delete(slope_NBT, waiting, 0), of_others[1], rtol=1e-6
    )
    np.testing.assert_array_equal(slope_NBT[waiting], 0)
