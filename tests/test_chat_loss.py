"""The loss of targets that are learned, against loops over rows in float64."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import TINY, mesh_of, placed_batch, placed_params, random_params
from test_losses import MESHES, T, assert_near, config_of

from mtp_jax.loss.metrics import summarize
from mtp_jax.loss.targets import extra_targets, future_targets, target_counts
from mtp_jax.training.batches import batch_of
from mtp_jax.training.train_step import make_gradients

N, ROWS = 4, 32
WEIGHTS = (0.5, 2, 0, 1)


@functools.cache
def rows():
    """Packed rows of documents, in each of which a few runs of tokens are learned."""
    rng = np.random.default_rng(5)
    found = naive.packed_rows(rng, ROWS, T + N, TINY.vocab_size, padding=4)
    runs_BS = np.repeat(rng.random((ROWS, T + N)) < 0.4, 4, axis=1)[:, : T + N]
    learned_BS = runs_BS & (found["segments"] != 0) & (found["positions"] != 0)
    return {**found, "learned": learned_BS.astype(np.int32)}


def targets_by_hand(rows):
    """What counts of the targets of each head: those that are learned themselves."""
    target_NBT, valid_NBT = naive.targets(rows["tokens"], rows["segments"], N)
    for i in range(N):
        for b in range(ROWS):
            for t in range(T):
                valid_NBT[i, b, t] &= rows["learned"][b, t + i + 1] == 1
    return target_NBT, valid_NBT


def of_positions(rows):
    """The naive mask: by the position's own flag, so first answer tokens are lost."""
    _, valid_NBT = naive.targets(rows["tokens"], rows["segments"], N)
    return valid_NBT & (rows["learned"][None, :, :T] == 1)


@functools.cache
def expected(mask):
    cfg = config_of(N)
    with jax.set_mesh(mesh_of()):
        params = random_params(cfg.model)
    target_NBT, valid_NBT = targets_by_hand(rows())
    if mask == "of positions":
        valid_NBT = of_positions(rows())
    inputs = [rows()[k][:, :-N] for k in ("tokens", "segments", "positions")]

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(*args):
        return naive.loss(cfg.model, *args, WEIGHTS, xp=jnp)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        return jax.device_get(value_and_grad(params64, inputs, target_NBT, valid_NBT))


@pytest.mark.parametrize(
    ("form", "mesh", "accumulation"),
    [
        ("fused", "one device", 4),
        ("fused", "fsdp x tensor x sequence", 1),
        ("naive", "one device", 1),
        pytest.param("remat", "fsdp x tensor", 4, marks=pytest.mark.slow),
        pytest.param("fused", "all axes", 4, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_of_the_learned_targets_alone(form, mesh, accumulation):
    cfg = config_of(N, form, 5)
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        params = placed_params(cfg.model, random_params(cfg.model))
        batch = placed_batch(rows(), accumulation)
        found = jax.device_get(jax.jit(make_gradients(cfg))(params, batch))

    loss, sums, grads = found
    right, right_grads = expected("of targets")
    np.testing.assert_allclose(loss, right, rtol=1e-5)
    jax.tree.map_with_path(assert_near, grads, right_grads)
    _, valid_NBT = targets_by_hand(rows())
    np.testing.assert_array_equal(sums.count_N, valid_NBT.sum(axis=(1, 2)))
    # The negative control: a mask by positions gives another loss.
    wrong, _ = expected("of positions")
    assert abs(wrong - right) > 1e-3 * abs(right)


def test_the_first_learned_token_counts_for_every_head_that_can_see_it():
    """A prompt of five tokens, then an answer: each head predicts all of it."""
    segments_BS = jnp.ones((1, 12), jnp.int32)
    learned_BS = (jnp.arange(12) >= 5).astype(jnp.int32)[None]
    n, t = 3, 9
    target_NBT, valid_NBT = future_targets(
        jnp.arange(12)[None], segments_BS, n, learned_BS
    )
    for i in range(n):
        counted = target_NBT[i, 0][valid_NBT[i, 0]].tolist()
        assert counted == list(range(5, t + i + 1))  # token 5, the first, for each head
    counts_N = target_counts(segments_BS, n, learned_BS)
    assert counts_N.tolist() == [valid_NBT[i].sum() for i in range(n)]
    lost = valid_NBT & (learned_BS[None, :, :t] == 1)
    assert [5 in target_NBT[i, 0][lost[i, 0]].tolist() for i in range(n)] == [False] * n

    extra_BTJ, valid_BTJ = extra_targets(
        jnp.arange(12)[None], segments_BS, t, 2, learned_BS
    )
    for j in range(2):
        counted = extra_BTJ[0, :, j][valid_BTJ[0, :, j]].tolist()
        assert counted == list(range(5, min(12, t + j + 2)))


def test_windows_of_acceptance_have_all_targets_learned(one_device):
    cfg = config_of(N)
    params = placed_params(cfg.model, random_params(cfg.model))
    sums = jax.jit(make_gradients(cfg))(params, placed_batch(rows(), 1))[1]

    _, valid_NBT = targets_by_hand(rows())
    inside_T = np.arange(T) <= T - N
    assert sums.windows == (valid_NBT.all(axis=0) & inside_T).sum()
    assert 0 < sums.windows < (valid_NBT[-1] & inside_T).sum()
    assert 1 <= summarize(sums)["accept_length"] <= N


def test_learning_all_is_learning_without_a_mask(one_device):
    cfg = config_of(N)
    params = placed_params(cfg.model, random_params(cfg.model))
    plain = {key: x for key, x in rows().items() if key != "learned"}
    whole = {**plain, "learned": np.ones_like(plain["tokens"])}
    gradients = jax.jit(make_gradients(cfg))
    a, b = (gradients(params, placed_batch(x, 2)) for x in (plain, whole))
    (loss_a, sums_a, grads_a), (loss_b, sums_b, grads_b) = jax.device_get((a, b))
    # Other programs, so the last digits differ.
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-6)
    np.testing.assert_array_equal(sums_a.count_N, sums_b.count_N)
    np.testing.assert_array_equal(sums_a.windows, sums_b.windows)
    jax.tree.map_with_path(assert_near, grads_a, grads_b)


def test_rows_of_ones_own_may_say_what_is_learned(one_device):
    data = rows()
    batch = batch_of(data["tokens"], data["segments"], learned_RS=data["learned"] * 7)
    assert batch["learned"][0].tolist() == data["learned"].tolist()
    other = batch_of(data["tokens"], data["segments"])
    assert "learned" not in other
    assert batch["hash"].tolist() != other["hash"].tolist()
