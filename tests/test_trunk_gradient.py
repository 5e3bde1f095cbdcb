"""The trunk's share of the heads' gradients: multipliers, meter, balance.

Against gradients of one head at a time, by automatic differentiation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from head_cases import model_of
from models import TINY, mesh_of, placed_batch, placed_params, random_params

from mtp_jax.config import ComputeConfig, Config, LossConfig
from mtp_jax.loss.head_loss import head_loss
from mtp_jax.loss.metrics import HeadSums, summarize
from mtp_jax.loss.targets import Targets, future_targets
from mtp_jax.model.attention import RowContext
from mtp_jax.model.language_model import model_builder, run_trunk
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sequence import split_time
from mtp_jax.training.balance import factors, start_of_balance, updated
from mtp_jax.training.train_step import make_gradients

N, T, ROWS = 3, 16, 16
MODEL = dataclasses.replace(TINY, num_layers=4, n_future_tokens=N)
MESHES = {"one device": (1, 1, 1), "all of eight": (1, 2, 2, 2)}
WEIGHTS = (1.0, 0.5, 2.0)


def batch(accumulation=1):
    rng = np.random.default_rng(5)
    rows = naive.packed_rows(rng, ROWS, T + N, 32, padding=3)
    return placed_batch(rows, accumulation)


def gradients(loss, accumulation=1, model=MODEL):
    cfg = Config(model=model, loss=loss)
    params = placed_params(model, random_params(model))
    run = jax.jit(make_gradients(cfg))
    return jax.device_get(run(params, batch(accumulation)))


def near(x, y):
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) > 0


def trunk_gradients(loss, weight_N, form):
    """Gradients of the trunk's output, [B, T, D], of heads weighed so."""
    _, build = model_builder(MODEL)
    rows = {name: x[0] for name, x in batch().items()}

    def run(params):
        model = build(params)
        token, valid = future_targets(rows["tokens"], rows["segments"], N)
        token, valid = split_time(token), split_time(valid)
        mean_N = weight_N / jnp.sum(valid, axis=(1, 2))
        targets = Targets(
            token,
            jnp.where(valid, mean_N[:, None, None], 0.0),
            number_N=jnp.arange(N) if loss.measures_gradients else None,
        )
        positions = split_time(rows["positions"][:, :-N])
        context = RowContext(model.angles(positions), rows["segments"][:, :-N])
        trunk = run_trunk(
            model,
            model.embed(split_time(rows["tokens"][:, :-N])),
            context,
            "xla",
        )
        compute = ComputeConfig(head_loss=form, attention="xla")
        of_trunk = lambda x: head_loss(model, x, context, targets, loss, compute)[0]  # noqa: E731
        return jax.grad(of_trunk)(trunk)

    params = placed_params(MODEL, random_params(MODEL))
    return np.asarray(jax.jit(run)(params), np.float64)


@functools.cache
def explicit():
    """Each head's own gradient into the trunk, on one device, [N, B, T, D]."""
    with jax.set_mesh(mesh_of(1, 1, 1)):
        each = [
            trunk_gradients(LossConfig(), jnp.array(WEIGHTS) * one_N, "naive")
            for one_N in np.eye(N, dtype=np.float32)
        ]
    return np.stack(each)


@pytest.mark.parametrize("mesh", MESHES)
def test_detached_heads_leave_the_trunk_bit_for_bit_to_head_1(mesh):
    cut = LossConfig(trunk_gradient=(1.0, 0.0, 0.0), head_weights=WEIGHTS)
    only = dataclasses.replace(cut, head_weights=(1.0, 0.0, 0.0))
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        _, _, detached = gradients(cut)
        _, _, alone = gradients(only)
        _, _, plain = gradients(LossConfig(head_weights=(1.0, 0.0, 0.0)))

    for name in ("trunk", "w_embedding"):
        jax.tree.map(np.testing.assert_array_equal, detached[name], alone[name])
        jax.tree.map(near, detached[name], plain[name])
    learnt = detached["heads"]["w_q"]
    assert all(np.abs(learnt[i]).max() > 0 for i in range(N))


def test_multipliers_weigh_gradients_of_the_trunk_alone(one_device):
    _, _, half = gradients(LossConfig(trunk_gradient=(1.0, 0.5, 0.25)))
    _, _, whole = gradients(LossConfig())
    _, _, weighed = gradients(LossConfig(head_weights=(1.0, 0.5, 0.25)))

    jax.tree.map(near, half["trunk"], weighed["trunk"])
    jax.tree.map(near, half["heads"], whole["heads"])
    near(half["w_unembedding"], whole["w_unembedding"])


def test_a_causal_chain_is_cut_where_its_multiplier_is_0(one_device):
    model = model_of("causal", N)
    cut = LossConfig(trunk_gradient=(1.0, 0.0, 1.0))
    _, _, detached = gradients(cut, model=model)
    _, _, alone = gradients(LossConfig(head_weights=(1.0, 0.0, 0.0)), model=model)

    jax.tree.map(near, detached["trunk"], alone["trunk"])
    assert np.abs(detached["heads"]["w_q"][2]).max() > 0


@pytest.mark.parametrize("mesh", MESHES)
def test_the_unembedding_may_learn_from_head_1_alone(mesh):
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        _, _, first = gradients(LossConfig(unembedding_gradient="first"))
        _, _, alone = gradients(LossConfig(head_weights=(1.0, 0.0, 0.0)))
        _, _, whole = gradients(LossConfig())

    near(first["w_unembedding"], alone["w_unembedding"])
    for name in ("trunk", "heads", "w_embedding"):
        jax.tree.map(near, first[name], whole[name])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_meter_shows_each_heads_own_gradient(mesh, accumulation):
    loss = LossConfig(head_weights=WEIGHTS, gradient_meter=True)
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        value, sums, grads = gradients(loss, accumulation)
        plain = gradients(LossConfig(head_weights=WEIGHTS), accumulation)

    each = explicit().reshape(N, -1)
    norm_N = np.linalg.norm(each, axis=1)
    means = summarize(sums)
    cosine_N = each @ each[0] / norm_N / norm_N[0]
    np.testing.assert_allclose(means["cosine_N"], cosine_N, atol=1e-5)
    np.testing.assert_allclose(means["ratio_N"], norm_N / norm_N[0], rtol=1e-5)
    assert np.abs(cosine_N[1:]).max() < 0.999
    jax.tree.map(near, (value, grads), (plain[0], plain[2]))


@pytest.mark.parametrize("mesh", MESHES)
def test_pcgrad_takes_from_each_token_what_opposes_head_1(mesh):
    loss = LossConfig(balance="pcgrad")
    with jax.set_mesh(mesh_of(*MESHES[mesh])):
        found = trunk_gradients(loss, jnp.array(WEIGHTS), "fused")
    with jax.set_mesh(mesh_of(1, 1, 1)):
        whole = trunk_gradients(LossConfig(), jnp.array(WEIGHTS), "fused")

    each = explicit()
    expected = each[0].copy()
    for grad in each[1:]:
        product = (grad * each[0]).sum(-1, keepdims=True)
        square = np.maximum((each[0] ** 2).sum(-1, keepdims=True), 1e-30)
        expected += grad - np.minimum(product, 0) / square * each[0]
    parts = MESHES[mesh][3] if len(MESHES[mesh]) > 3 else 1
    order = zigzag.positions(T, parts)
    expected = expected[:, order]
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(whole - each.sum(0)) < 1e-5 * np.linalg.norm(whole)
    assert np.linalg.norm(expected - each.sum(0)[:, order]) > 0.05 * np.linalg.norm(
        whole
    )


def sums_of(squared, with_first):
    zero = np.zeros(len(squared))
    return HeadSums(
        zero, zero, zero, 0, zero, with_first_N=jnp.array(with_first),
        squared_N=jnp.array(squared),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["encodec", "occ"])
def test_balances_weigh_by_means_of_the_steps_before(kind):
    loss = LossConfig(balance=kind, balance_decay=0.5, balance_budget=0.5)
    weight_N = jnp.array([1.0, 0.5, 2.0])
    state = start_of_balance(loss, 3)
    assert np.array_equal(factors(loss, state, weight_N), [1, 1, 1])

    state = updated(loss, state, sums_of([4.0, 1.0, 16.0], [4.0, 1.0, -2.0]))
    state = updated(loss, state, sums_of([4.0, 9.0, 0.0], [4.0, 2.0, 0.0]))

    expected = {
        "encodec": [1, 0.5 * 2 / 2, 2 * 2 / 4],  # norms 2, (1 + 3) / 2, 4
        "occ": [1, 1.0, 0],  # 1.5 / 5, and none below 0: a mean of 0.5 over two
    }
    np.testing.assert_allclose(
        factors(loss, state, weight_N), expected[kind], rtol=1e-6
    )


def test_occ_gives_no_head_more_than_it_may():
    loss = LossConfig(balance="occ", balance_most=1.5)
    state = updated(
        loss, start_of_balance(loss, 3), sums_of([1.0, 1.0, 1.0], [1.0, 0.9, 0.1])
    )

    found = factors(loss, state, jnp.ones(3))

    np.testing.assert_allclose(found, [1, 1.5, 0.2], rtol=1e-6)
