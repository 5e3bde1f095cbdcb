"""The model against a plain transformer in NumPy, in float64."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from jax.sharding import NamedSharding
from models import (
    TINY,
    all_logits,
    mesh_of,
    placed_batch,
    placed_params,
    random_params,
    tiny_config,
)

from mtp_jax.config import ComputeConfig, Remat
from mtp_jax.interop.hf_llama import llama_of
from mtp_jax.model.attention import causal_attention
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import spec
from mtp_jax.training.train_step import make_gradients

T = 16
FOUR = dataclasses.replace(TINY, num_layers=6, n_future_tokens=4)
CASES = {
    "one head": dataclasses.replace(TINY, n_future_tokens=1),
    "four heads": FOUR,
    "multi-head attention": dataclasses.replace(TINY, num_kv_heads=4),
    "multi-query attention, tied": dataclasses.replace(
        TINY, num_kv_heads=1, tie_embeddings=True
    ),
    "no trunk, other constants": dataclasses.replace(
        TINY, num_layers=2, rope_theta=50.0, norm_eps=0.1
    ),
}


@functools.cache
def jitted(model_cfg):
    """`f(params, tokens, segments, positions) -> logits [N, B, T, V]`."""
    _, build = model_builder(model_cfg)

    return jax.jit(lambda params, *rows: all_logits(build(params), *rows))


def ours(model_cfg, params, rows):
    params = placed_params(model_cfg, params)
    rows = {name: x_ABT[0] for name, x_ABT in placed_batch(rows, 1).items()}
    logits_NBTV = jitted(model_cfg)(
        params, rows["tokens"], rows["segments"], rows["positions"]
    )
    return np.asarray(logits_NBTV)


def theirs(model_cfg, params, rows):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return naive.all_logits(
        model_cfg, params, rows["tokens"], rows["segments"], rows["positions"]
    )


def packed(seed=0, rows=2):
    return naive.packed_rows(np.random.default_rng(seed), rows, T, 32, padding=3)


def unpacked(seed=0, rows=2):
    rng = np.random.default_rng(seed)
    return naive.packed_rows(rng, rows, T, 32, n_documents=1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("make_rows", [packed, unpacked])
def test_logits_of_every_head_are_those_of_a_plain_transformer(
    name, make_rows, one_device
):
    params, rows = random_params(CASES[name]), make_rows()

    logits_NBTV = ours(CASES[name], params, rows)

    assert logits_NBTV.dtype == np.float32
    assert logits_NBTV.shape == (CASES[name].n_future_tokens, 2, T, 32)
    expected_NBTV = theirs(CASES[name], params, rows)
    np.testing.assert_allclose(logits_NBTV, expected_NBTV, atol=1e-4)
    assert np.std(expected_NBTV) > 0.1


@pytest.mark.packages
def test_one_head_is_the_llama_of_another_library(one_device):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cfg = CASES["one head"]
    params, rows = random_params(cfg), unpacked()
    llama = llama_of(cfg, params, positions=64)

    with torch.no_grad():
        expected_BTV = llama(torch.tensor(rows["tokens"].astype(np.int64))).logits

    logits_NBTV = ours(cfg, params, rows)
    np.testing.assert_allclose(logits_NBTV[0], expected_BTV.numpy(), atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_number_of_parameters_does_not_depend_on_the_number_of_heads(
    n, tied, one_device
):
    cfg = dataclasses.replace(
        TINY, num_layers=4, n_future_tokens=n, tie_embeddings=tied
    )

    params = random_params(cfg)

    d, k, v, f = cfg.d_model, cfg.d_head, cfg.vocab_size, cfg.d_ff
    attention = 2 * d * cfg.num_query_heads * k + 2 * d * cfg.num_kv_heads * k
    layer = attention + 3 * d * f + 2 * d
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 4 * layer + d + (1 if tied else 2) * v * d
    assert len(params["heads"]["w_q"]) == n


def test_no_head_reads_what_comes_after_its_position(one_device):
    params, rows = random_params(FOUR), unpacked()
    changed = {name: x.copy() for name, x in rows.items()}
    changed["tokens"][:, 9:] = (changed["tokens"][:, 9:] + 5) % 32

    before, after = ours(FOUR, params, rows), ours(FOUR, params, changed)

    np.testing.assert_array_equal(before[:, :, :9], after[:, :, :9])
    assert (np.abs(before - after)[:, :, 9:].max(axis=-1) > 1e-3).all()


def test_no_head_reads_another_document(one_device):
    params, rows = random_params(FOUR), packed()
    changed = {name: x.copy() for name, x in rows.items()}
    second = rows["segments"] == 2
    changed["tokens"][second] = (changed["tokens"][second] + 5) % 32

    before, after = ours(FOUR, params, rows), ours(FOUR, params, changed)

    moved_NBT = np.abs(before - after).max(axis=-1) > 1e-3
    np.testing.assert_array_equal(before[:, ~second], after[:, ~second])
    assert moved_NBT[:, second].all()


def test_a_document_has_the_logits_it_has_alone(one_device):
    params, rows = random_params(FOUR), packed()
    second = rows["segments"][0] == 2
    length = int(second.sum())
    alone = unpacked()
    alone["tokens"][0, :length] = rows["tokens"][0, second]

    together, apart = ours(FOUR, params, rows), ours(FOUR, params, alone)

    assert length > 1
    np.testing.assert_allclose(together[:, 0, second], apart[:, 0, :length], atol=1e-5)


def test_the_mesh_does_not_change_the_logits():
    with jax.set_mesh(mesh_of(2, 2, 2)):
        params, rows = random_params(FOUR), packed(rows=4)
        logits_NBTV = ours(FOUR, params, rows)

    np.testing.assert_allclose(logits_NBTV, theirs(FOUR, params, rows), atol=1e-4)


def test_scores_too_large_for_an_exponential_are_still_a_softmax(one_device):
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-30, 31, (2, T, 2, 4)).astype(np.float32) for _ in range(2))
    v = rng.normal(size=(2, T, 2, 4)).astype(np.float32)
    segments = packed()["segments"]
    by_head = NamedSharding(one_device, spec("batch", None, "heads", None))
    by_row = NamedSharding(one_device, spec("batch", None))

    read_BTHK = causal_attention(
        *jax.device_put((q, k, v), by_head), jax.device_put(segments, by_row)
    )

    score_BHTT = np.einsum("bqhk,bshk->bhqs", q, k) / 2
    seen_BTT = np.tril(segments[:, :, None] == segments[:, None, :])
    score_BHTT = np.where(seen_BTT[:, None], score_BHTT, -np.inf).astype(np.float64)
    weight_BHTT = np.exp(score_BHTT - score_BHTT.max(axis=-1, keepdims=True))
    weight_BHTT /= weight_BHTT.sum(axis=-1, keepdims=True)
    expected_BTHK = np.einsum("bhqs,bshk->bqhk", weight_BHTT, v)
    np.testing.assert_allclose(read_BTHK, expected_BTHK, atol=1e-5)
    assert score_BHTT.max() > 200


def test_bfloat16_is_near_float32(one_device):
    cfg = dataclasses.replace(FOUR, compute_dtype="bfloat16")
    params, rows = random_params(cfg), packed()

    logits_NBTV = ours(cfg, params, rows)

    expected_NBTV = theirs(cfg, params, rows)
    error = np.linalg.norm(logits_NBTV - expected_NBTV) / np.linalg.norm(expected_NBTV)
    assert logits_NBTV.dtype == np.float32
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_of_the_configured_dtype(dtype, one_device):
    cfg = dataclasses.replace(TINY, param_dtype=dtype, compute_dtype="float32")

    shapes = jax.eval_shape(model_builder(cfg)[0], jax.random.key(0))

    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}


def test_initial_matrices_have_variance_one_over_fan_in(one_device):
    # Stacks of layers wide enough for the spread of a sample to be near its mean.
    cfg = dataclasses.replace(TINY, num_layers=8, vocab_size=256)

    params = jax.device_get(jax.jit(model_builder(cfg)[0])(jax.random.key(0)))

    fan_in = {"w_down": cfg.d_ff}
    for path, x in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name.startswith("w_"):
            expected = fan_in.get(name, cfg.d_model) ** -0.5
            np.testing.assert_allclose(x.std(), expected, rtol=0.15, err_msg=name)
        else:
            np.testing.assert_array_equal(x, np.ones_like(x))
    layers = params["trunk"]["w_q"].reshape(6, -1)
    assert np.abs(np.corrcoef(layers) - np.eye(6)).max() < 0.3


def test_rematerialization_costs_products_and_does_not_change_the_gradients(one_device):
    products, on_host, found = {}, {}, {}
    for remat in get_args(Remat):
        cfg = dataclasses.replace(tiny_config(), compute=ComputeConfig(remat=remat))
        params = placed_params(cfg.model, random_params(cfg.model))
        batch = placed_batch(packed(), 1)
        traced = jax.jit(make_gradients(cfg)).trace(params, batch)
        program = str(traced.jaxpr)
        products[remat] = program.count("dot_general")
        on_host[remat] = "<host>" in program
        _, _, grads = traced.lower().compile()(params, batch)
        found[remat] = jax.device_get(grads)

    assert products["none"] < products["dots"] < products["full"]
    assert products["full"] == products["offload"]
    assert [remat for remat in on_host if on_host[remat]] == ["offload"]
    for grads in found.values():
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            grads,
            found["none"],
        )
