"""Neighbours in rows that are split, groups of tokens, targets further on."""

import jax
import naive
import numpy as np
import pytest
from models import mesh_of

from mtp_jax.loss.grouping import depth_of_groups
from mtp_jax.loss.targets import extra_targets
from mtp_jax.parallel.sequence import from_next, split_time, whole_time

MESHES = [{}, {"fsdp": 2}, {"sequence": 4}, {"fsdp": 2, "tensor": 2, "sequence": 2}]
B, T = 4, 16


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_position_gets_what_the_next_one_has(axes):
    x_BT = np.random.default_rng(0).normal(size=(B, T)).astype(np.float32)
    with jax.set_mesh(mesh_of(**axes)):
        run = jax.jit(lambda x: whole_time(from_next(split_time(x))))
        found_BT = jax.device_get(run(x_BT))
        wide = jax.jit(
            lambda x: from_next(split_time(x)[..., None] * np.ones((1, 1, 3), "f"))
        )
        found_BTD = wide(x_BT)
        again = jax.jit(lambda x: whole_time(x[..., 1]))(found_BTD)

    expected_BT = np.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_array_equal(found_BT, expected_BT)
    np.testing.assert_array_equal(again, expected_BT)


def depth(entropy, segments, threshold):
    """By the words of the paper, a position at a time."""
    t = len(entropy)
    ends = [
        i == t - 1
        or entropy[i + 1] - entropy[i] > threshold
        or segments[i + 1] != segments[i]
        for i in range(t)
    ]
    end_of = lambda i: next(j for j in range(i, t) if ends[j])  # noqa: E731
    found = []
    for i in range(t):
        last = end_of(i)
        if last == i:  # the last of its group looks over the next one
            last = end_of(i + 1) if i < t - 1 else i
        found.append(last - i)
    return found


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 9.0])
def test_groups_end_where_the_entropy_rises(axes, threshold):
    rng = np.random.default_rng(3)
    rows = naive.packed_rows(rng, B, T, 32, n_documents=2, padding=3)
    entropy_BT = rng.uniform(0, 2, (B, T)).astype(np.float32)
    with jax.set_mesh(mesh_of(**axes)):
        run = jax.jit(
            lambda x, s: whole_time(depth_of_groups(split_time(x), s, threshold))
        )
        found_BT = jax.device_get(run(entropy_BT, rows["segments"]))

    expected = [
        depth(e, s, threshold)
        for e, s in zip(entropy_BT, rows["segments"], strict=True)
    ]
    np.testing.assert_array_equal(found_BT, expected)
    assert len(np.unique(found_BT)) > 2


def test_extra_targets_end_with_the_document_and_the_row():
    rows = naive.packed_rows(np.random.default_rng(1), 3, 12, 32, padding=2)
    tokens_BS, segments_BS = rows["tokens"], rows["segments"]

    token_BTJ, valid_BTJ = map(np.asarray, extra_targets(tokens_BS, segments_BS, 11, 3))

    for b, t, j in np.ndindex(3, 11, 3):
        at = t + j + 2
        inside = at < 12 and segments_BS[b, t] != 0
        inside = inside and segments_BS[b, at] == segments_BS[b, t]
        assert valid_BTJ[b, t, j] == inside
        assert not inside or token_BTJ[b, t, j] == tokens_BS[b, at]
