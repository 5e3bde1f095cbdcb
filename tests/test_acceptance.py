"""Accuracy and acceptance, of heads that count, against a simulation."""

import dataclasses
import functools

import jax
import naive
import numpy as np
import pytest
from models import TINY, mesh_of, placed_batch, placed_params, random_params

from mtp_jax.config import ComputeConfig
from mtp_jax.loss import batch_loss
from mtp_jax.loss.metrics import summarize
from mtp_jax.model.language_model import model_builder

T = 16  # positions of a row

# Heads that count: head i says v + strides[i] after the token v.

COUNTING = dataclasses.replace(
    TINY, vocab_size=8, num_layers=3, n_future_tokens=3, tie_embeddings=True
)


def counting_params(strides):
    """A one-hot embedding, no attention, and a permutation in every feed-forward."""
    params = jax.tree.map(np.zeros_like, random_params(COUNTING))
    v = COUNTING.vocab_size
    eye_VD = np.eye(v, COUNTING.d_model, dtype=np.float32)
    params["w_embedding"] = eye_VD
    params["norm"] += 1
    for name in ("norm_attention", "norm_mlp"):
        params["heads"][name] += 1
    for i, stride in enumerate(strides):
        mlp = params["heads"]["mlp"]
        mlp["w_gate"][i, :, :v] = eye_VD.T
        mlp["w_up"][i, :, :v] = eye_VD.T
        mlp["w_down"][i, :v] = 5 * eye_VD[(np.arange(v) + stride) % v]
    return params


@functools.cache
def counting_sums():
    _, build = model_builder(COUNTING)
    return jax.jit(
        lambda params, rows: batch_loss.head_sums(build(params), rows, ComputeConfig())
    )


def sums_of_counting(strides, rows):
    params = placed_params(COUNTING, counting_params(strides))
    rows = {name: x_ABS[0] for name, x_ABS in placed_batch(rows, 1).items()}
    return jax.device_get(counting_sums()(params, rows))


def counting_rows(jumps):
    """Documents that count up by one, but by two at a share of their places."""
    rng = np.random.default_rng(7)
    rows = naive.packed_rows(rng, 6, T + 3, 8, n_documents=2, padding=2)
    steps_BS = 1 + (rng.random(rows["tokens"].shape) < jumps)
    rows["tokens"] = (np.cumsum(steps_BS, axis=1) % 8).astype(np.int32)
    return rows


def simulated(strides, rows):
    """Targets hit by each head, windows, and windows accepted up to each head."""
    n, tokens_BS, segments_BS = 3, rows["tokens"], rows["segments"]
    correct_N, accepted_N, windows = np.zeros(n), np.zeros(n), 0
    said = lambda i, row, t: (tokens_BS[row, t] + strides[i]) % 8  # noqa: E731
    for row in range(len(tokens_BS)):
        for t in range(T):
            document = segments_BS[row, t]
            for i in range(n):
                target = tokens_BS[row, t + i + 1]
                inside = document != 0 and segments_BS[row, t + i + 1] == document
                correct_N[i] += inside and said(i, row, t) == target
            # Head 1 must still be heard at t + n - 1, and its text be of the document.
            window = [segments_BS[row, s] for s in range(t, t + n + 1)]
            if document == 0 or set(window) != {document} or t + n - 1 >= T:
                continue
            windows += 1
            accepted_N[0] += 1
            for i in range(1, n):
                if said(i, row, t) != said(0, row, t + i):
                    break
                accepted_N[i] += 1
    return correct_N, windows, accepted_N


@pytest.mark.parametrize("axes", [{}, {"sequence": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("jumps", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("strides", [(1, 2, 3), (1, 3, 3), (1, 2, 4), (2, 3, 4)])
def test_accuracy_and_acceptance_are_those_of_a_simulation(strides, jumps, axes):
    rows = counting_rows(jumps)

    with jax.set_mesh(mesh_of(**axes)):
        sums = sums_of_counting(strides, rows)

    correct_N, windows, accepted_N = simulated(strides, rows)
    np.testing.assert_array_equal(sums.correct_N, correct_N)
    np.testing.assert_array_equal(sums.accepted_N, accepted_N)
    assert sums.windows == windows > 0


def test_heads_that_know_the_text_are_right_and_always_accepted(one_device):
    means = summarize(sums_of_counting((1, 2, 3), counting_rows(0.0)))

    np.testing.assert_array_equal(means["accuracy_N"], [1, 1, 1])
    np.testing.assert_array_equal(means["accepted_N"], [1, 1, 1])
    assert means["accept_length"] == 3


def test_a_head_that_looks_one_token_too_far_ends_the_acceptance(one_device):
    means = summarize(sums_of_counting((1, 3, 3), counting_rows(0.0)))

    np.testing.assert_array_equal(means["accuracy_N"], [1, 0, 1])
    np.testing.assert_array_equal(means["accepted_N"], [1, 0, 0])
    assert means["accept_length"] == 1


def test_text_that_head_1_did_not_foresee_lowers_acceptance(one_device):
    found = [
        summarize(sums_of_counting((1, 2, 3), counting_rows(jumps)))
        for jumps in (0.0, 0.3, 1.0)
    ]

    lengths = [float(means["accept_length"]) for means in found]
    assert 3 == lengths[0] > lengths[1] > lengths[2] == 1
