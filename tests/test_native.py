"""The kernels for a CPU: against NumPy, the same bits always, and with no compiler."""

import functools
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mtp_jax.decode.cpu import native, packed_weights
from mtp_jax.model import layers


@pytest.fixture
def served(one_device):
    if not native.serves(np.float32):
        pytest.skip("no C++ compiler here")


# Whole panels and not, one block of panels and several.
SHAPES = [(1, 1), (3, 5), (96, 32), (130, 47), (1024, 320), (513, 2100), (200, 9000)]


def drawn(m, o, i):
    rng = np.random.default_rng(m + o + i)
    x_MI = rng.normal(size=(m, i)).astype(np.float32)
    return x_MI, rng.normal(size=(o, i)).astype(np.float32)


@jax.jit
def multiplied(x_MI, w_OI):
    matrix = packed_weights.pack(w_OI, w_OI.shape[:1])
    return native.product(x_MI, matrix.w_PIJ)[:, : w_OI.shape[0]]


@pytest.mark.parametrize("tokens", [*range(1, 10), 16, 37])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_product_is_that_of_doubles(served, tokens, outputs, inputs):
    x_MI, w_OI = drawn(tokens, outputs, inputs)

    y_MO = np.asarray(multiplied(x_MI, w_OI))

    exact_MO = x_MI.astype(np.float64) @ w_OI.T.astype(np.float64)
    sizes_MO = np.abs(x_MI).astype(np.float64) @ np.abs(w_OI).T
    # The usual bound of rounding in a sum, for parts that are summed one by one.
    assert np.all(np.abs(y_MO - exact_MO) <= 2**-24 * (inputs + 20) * sizes_MO)


def test_a_token_gives_the_same_bits_among_any_others_and_at_any_time(served):
    x_MI, w_OI = drawn(21, 2000, 640)
    whole_MO = np.asarray(multiplied(x_MI, w_OI))

    for m in range(1, 21):
        np.testing.assert_array_equal(multiplied(x_MI[:m], w_OI), whole_MO[:m])
        np.testing.assert_array_equal(multiplied(x_MI[m:], w_OI), whole_MO[m:])
    for _ in range(50):
        np.testing.assert_array_equal(multiplied(x_MI, w_OI), whole_MO)


def test_what_is_not_a_number_stays_so_and_stays_where_it_is(served):
    x_MI, w_OI = drawn(3, 40, 50)
    x_MI[1, 7] = np.nan
    w_OI[5, 3] = np.inf

    y_MO = np.asarray(multiplied(x_MI, w_OI))

    assert np.isnan(y_MO[1]).all()
    assert np.isinf(y_MO[[0, 2], 5]).all()
    assert np.isfinite(np.delete(y_MO[[0, 2]], 5, axis=1)).all()


def test_stacks_of_tokens_are_taken_one_by_one(served):
    x_MI, w_OI = drawn(4, 96, 64)
    matrix = packed_weights.pack(jnp.asarray(w_OI), (96,))

    y_SMO = jax.vmap(native.product, (0, None))(np.stack([x_MI, -x_MI]), matrix.w_PIJ)

    np.testing.assert_array_equal(y_SMO[0], multiplied(x_MI, w_OI))
    np.testing.assert_array_equal(y_SMO[1], -multiplied(x_MI, w_OI))


@pytest.mark.parametrize(("more_inputs", "more_outputs"), [(1, 0), (0, 1)])
def test_matrices_that_do_not_fit_are_refused(served, more_inputs, more_outputs):
    w_PIJ = jnp.ones((1, 5 + more_inputs, native.width() + more_outputs))

    with pytest.raises(RuntimeError, match="P J"):
        jax.block_until_ready(native.product(jnp.ones((2, 5)), w_PIJ))


@pytest.mark.parametrize("width", [4, 6])
def test_scales_of_another_width_are_refused(served, width):
    with pytest.raises(RuntimeError, match="scale"):
        norm = native.rms_norm(jnp.ones((2, 5)), jnp.ones(width), 1e-5)
        jax.block_until_ready(norm)


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "inputs"),
    [
        ("btd,dhk->bthk", (2, 3, 48), (48, 4, 8), 1),
        ("bthk,hkd->btd", (1, 4, 4, 8), (4, 8, 48), 2),
        ("btd,df->btf", (2, 70, 48), (48, 33), 1),
    ],
)
def test_layers_get_the_einsum(served, equation, x_shape, w_shape, inputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=x_shape).astype(np.float32)
    w = rng.normal(size=w_shape).astype(np.float32)
    outputs = w_shape[inputs:]
    w_OI = np.moveaxis(w.reshape(-1, *outputs), 0, -1).reshape(np.prod(outputs), -1)
    matrix = packed_weights.pack(jnp.asarray(w_OI), outputs)

    y = layers.project(equation, jnp.asarray(x), nnx.Param(matrix), PartitionSpec())

    np.testing.assert_allclose(y, np.einsum(equation, x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("width", [1, 16, 48, 75])
def test_the_norm_is_that_of_doubles(served, tokens, width):
    rng = np.random.default_rng(width)
    x_MD = rng.normal(size=(tokens, width)).astype(np.float32)
    scale_D = rng.normal(size=width).astype(np.float32)

    y_MD = native.rms_norm(x_MD, scale_D, 1e-5)

    x64_MD = x_MD.astype(np.float64)
    mean_M1 = np.mean(x64_MD**2, axis=1, keepdims=True)
    np.testing.assert_allclose(y_MD, x64_MD / np.sqrt(mean_M1 + 1e-5) * scale_D, 1e-6)


def ancestors(parents):
    """[w, u]: w is u or comes after it; the first has no parent."""
    seen_WW = np.eye(len(parents) + 1, dtype=bool)
    for w, parent in enumerate(parents, start=1):
        seen_WW[w] |= seen_WW[parent]
    return seen_WW


def attention_in_doubles(q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window=0):
    b, w, h, k = q_BWHK.shape
    g, s = k_BGSK.shape[1:3]
    read_BWHK = np.zeros(q_BWHK.shape)
    for i, j, head in itertools.product(range(b), range(w), range(h)):
        group = head // (h // g)
        own = [start_B[i] + u for u in range(w) if ancestors_WW[j, u]]
        seen = [*range(start_B[i]), *(slot for slot in own if slot < s)]
        seen = seen[-window:]  # its ancestors are in the order of their positions
        scores = k_BGSK[i, group, seen].astype(np.float64) @ q_BWHK[i, j, head]
        weights = np.exp((scores - scores.max()) / np.sqrt(k))
        read_BWHK[i, j, head] = weights @ v_BGSK[i, group, seen] / weights.sum()
    return read_BWHK


def drawn_attention(b, w, h, g, s, k):
    rng = np.random.default_rng(b + w + h + g + s + k)
    q_BWHK = rng.normal(size=(b, w, h, k)).astype(np.float32)
    k_BGSK, v_BGSK = rng.normal(size=(2, b, g, s, k)).astype(np.float32)
    return q_BWHK, k_BGSK, v_BGSK, rng.integers(0, s - w + 1, b).astype(np.int32)


@pytest.mark.parametrize("window", [0, 1, 3, 30])
@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize(
    ("b", "w", "h", "g", "s", "k"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 4, 2, 40, 12),
        (1, 8, 2, 1, 600, 128),
        (3, 17, 16, 16, 100, 64),
        (2, 6, 6, 2, 33, 20),
        (1, 4, 5, 1, 70, 96),
    ],
)
def test_attention_is_that_of_doubles(served, is_tree, window, b, w, h, g, s, k):
    *arrays, start_B = drawn_attention(b, w, h, g, s, k)
    rng = np.random.default_rng(w)
    tree_WW = ancestors([rng.integers(u) for u in range(1, w)]) if is_tree else None

    y_BWHK = native.attention(*arrays, start_B, tree_WW, window)

    seen_WW = ancestors(range(w - 1)) if tree_WW is None else tree_WW
    exact_BWHK = attention_in_doubles(*arrays, start_B, seen_WW, window)
    np.testing.assert_allclose(y_BWHK, exact_BWHK, rtol=0, atol=2e-6)


def test_weights_are_right_however_small(served):
    # Keys 0, -1, -2 ... of width 1, and values that show one weight each.
    s = 100
    k_BGSK = -np.arange(s, dtype=np.float32).reshape(1, 1, s, 1)
    exact_S = np.exp(-np.arange(s, dtype=np.float64))
    exact_S /= exact_S.sum()
    q_BWHK, start_B = np.ones((1, 1, 1, 1), np.float32), np.full(1, s - 1, np.int32)

    for slot in range(s):
        v_BGSK = np.zeros((1, 1, s, 1), np.float32)
        v_BGSK[0, 0, slot] = 1
        weight = native.attention(q_BWHK, k_BGSK, v_BGSK, start_B, None).item()

        if slot <= 86:
            assert weight == pytest.approx(exact_S[slot], rel=5e-7)
        else:
            assert 0 <= weight < np.exp(-86.0)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize(("h", "g", "k"), [(4, 2, 12), (8, 8, 32), (2, 1, 128)])
def test_a_query_reads_the_same_bits_with_any_others(served, h, g, k, window):
    n, s = 40, 64
    q_BWHK, k_BGSK, v_BGSK, _ = drawn_attention(1, n, h, g, s, k)
    of_window = functools.partial(native.attention, window=window)
    read = jax.jit(of_window, static_argnames="ancestors_WW")
    whole_BWHK = np.asarray(read(q_BWHK, k_BGSK, v_BGSK, np.zeros(1, np.int32), None))

    for w in (1, 2, 3, 4, 8):
        for at in range(0, n - w + 1, w):
            own_BWHK = q_BWHK[:, at : at + w]
            start_B = np.full(1, at, np.int32)
            y_BWHK = read(own_BWHK, k_BGSK, v_BGSK, start_B, None)
            np.testing.assert_array_equal(y_BWHK, whole_BWHK[:, at : at + w])

    # Rows of a batch, each where it is.
    start_B = np.array([7, 20, 30], np.int32)
    own_BWHK = np.concatenate([q_BWHK[:, at : at + 5] for at in start_B])
    stores = (np.repeat(x_BGSK, 3, axis=0) for x_BGSK in (k_BGSK, v_BGSK))
    y_BWHK = read(own_BWHK, *stores, start_B, None)
    for row, at in enumerate(start_B):
        np.testing.assert_array_equal(y_BWHK[row], whole_BWHK[0, at : at + 5])


@pytest.mark.parametrize("window", [0, 2, 12])
def test_a_node_of_a_tree_reads_the_bits_of_a_chain(served, window):
    q_BWHK, k_BGSK, v_BGSK, start_B = drawn_attention(1, 7, 4, 2, 40, 12)
    tree_WW = ancestors([0, 0, 1, 1, 2, 4])
    y_BWHK = native.attention(q_BWHK, k_BGSK, v_BGSK, start_B, tree_WW, window)

    for node in range(7):
        path = np.flatnonzero(tree_WW[node])
        chain_S = np.r_[: start_B[0], start_B[0] + path]
        stores = [x_BGSK[:, :, chain_S] for x_BGSK in (k_BGSK, v_BGSK)]
        alone = native.attention(q_BWHK[:, path], *stores, start_B, None, window)
        np.testing.assert_array_equal(y_BWHK[0, node], alone[0, -1])


def test_what_is_not_seen_is_not_read_and_a_finished_text_may_stand_at_the_end(served):
    q_BWHK, k_BGSK, v_BGSK, _ = drawn_attention(2, 3, 2, 1, 20, 8)
    k_BGSK[:, :, 9:], v_BGSK[:, :, 9:] = np.nan, np.nan
    start_B = np.array([6, 19], np.int32)  # two slots of the last are beyond the cache

    y_BWHK = native.attention(q_BWHK, k_BGSK, v_BGSK, start_B, None)

    seen_WW = ancestors(range(2))
    exact = attention_in_doubles(q_BWHK, k_BGSK, v_BGSK, start_B, seen_WW)
    np.testing.assert_allclose(y_BWHK[0], exact[0], rtol=0, atol=2e-6)
    assert np.isnan(y_BWHK[1]).all()


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "tree"),
    [
        ((1, 3, 5, 8), (1, 3, 5, 8), None),  # 4 heads, 3 groups
        ((1, 2, 5, 8), (1, 2, 6, 8), None),
        ((1, 2, 5, 9), (1, 2, 5, 9), None),
        ((1, 2, 5, 8), (1, 2, 5, 8), np.ones((3, 3), bool)),  # 2 new tokens
    ],
)
def test_caches_that_do_not_fit_are_refused(served, k_shape, v_shape, tree):
    q_BWHK, start_B = jnp.ones((1, 2, 4, 8)), jnp.zeros(1, jnp.int32)

    with pytest.raises(RuntimeError, match="ancestors"):
        jax.block_until_ready(
            native.attention(
                q_BWHK, jnp.ones(k_shape), jnp.ones(v_shape), start_B, tree
            )
        )


def test_they_serve_float32_only(served):
    assert not native.serves(jnp.bfloat16)


def run(code, cache, **environ):
    """Python with its own cache folder; its result."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environ},
        capture_output=True,
        text=True,
        timeout=200,
    )


SERVED = "from mtp_jax.decode.cpu.native import serves; print(serves('float32'))"


def test_it_is_compiled_once_for_all_processes(served, tmp_path):
    assert run(SERVED, tmp_path).stdout == "True\n"
    [library] = pathlib.Path(tmp_path, "mtp_jax").iterdir()
    made = library.stat().st_mtime_ns

    assert run(SERVED, tmp_path).stdout == "True\n"

    assert list(library.parent.iterdir()) == [library]
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_it_is_left_off_in_silence(tmp_path):
    for compiler in ("", "no-such-compiler", "c++ '"):
        done = run(SERVED, tmp_path, CXX=compiler)

        assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


@pytest.mark.parametrize(
    ("says", "told"),
    [("echo 'out of order' >&2", "out of order"), ("echo >&2", "exit status 1.")],
)
def test_a_compiler_that_fails_is_told_of_once(says, told, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n{says}\nexit 1\n")
    compiler.chmod(0o755)

    done = run(f"{SERVED}; print(serves('float32'))", tmp_path, CXX=str(compiler))

    assert (done.stdout, done.returncode) == ("False\nFalse\n", 0)
    [line] = done.stderr.splitlines()
    assert line.startswith("mtp-jax: warning: ")
    assert "native.cc" in line
    assert line.endswith(told)


def test_a_cache_folder_that_cannot_be_made_is_told_of(served, tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    done = run(SERVED, file)

    assert (done.stdout, done.returncode) == ("False\n", 0)
    [line] = done.stderr.splitlines()
    assert str(file) in line
