"""Products with weights in panels: against NumPy, and with no compiler."""

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

from mtp_jax import layers, panels


@pytest.fixture
def served(one_device):
    if not panels.are_served(np.float32):
        pytest.skip("no C++ compiler here")


# Whole panels and not, one block of panels and several.
SHAPES = [(1, 1), (3, 5), (64, 32), (130, 47), (1024, 320), (513, 2100), (200, 9000)]


def drawn(m, o, i):
    rng = np.random.default_rng(m + o + i)
    x_MI = rng.normal(size=(m, i)).astype(np.float32)
    return x_MI, rng.normal(size=(o, i)).astype(np.float32)


@jax.jit
def multiplied(x_MI, w_OI):
    packed = panels.pack(w_OI, w_OI.shape[:1])
    return panels.product(x_MI, packed.w_PIJ)[:, : w_OI.shape[0]]


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
    packed = panels.pack(jnp.asarray(w_OI), (96,))

    y_SMO = jax.vmap(panels.product, (0, None))(np.stack([x_MI, -x_MI]), packed.w_PIJ)

    np.testing.assert_array_equal(y_SMO[0], multiplied(x_MI, w_OI))
    np.testing.assert_array_equal(y_SMO[1], -multiplied(x_MI, w_OI))


@pytest.mark.parametrize("w", [(1, 6, 32), (1, 5, 16)])
def test_shapes_that_do_not_fit_are_refused(served, w):
    with pytest.raises(RuntimeError, match="P J"):
        jax.block_until_ready(panels.product(jnp.ones((2, 5)), jnp.ones(w)))


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
    packed = panels.pack(jnp.asarray(w_OI), outputs)

    y = layers.project(equation, jnp.asarray(x), nnx.Param(packed), PartitionSpec())

    np.testing.assert_allclose(y, np.einsum(equation, x, w), rtol=1e-5, atol=1e-5)


def test_they_serve_float32_only(served):
    assert not panels.are_served(jnp.bfloat16)


def run(code, cache, **environ):
    """Python with its own cache folder; its result."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environ},
        capture_output=True,
        text=True,
        timeout=200,
    )


SERVED = "from mtp_jax.panels import are_served; print(are_served('float32'))"


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

    done = run(f"{SERVED}; print(are_served('float32'))", tmp_path, CXX=str(compiler))

    assert (done.stdout, done.returncode) == ("False\nFalse\n", 0)
    [line] = done.stderr.splitlines()
    assert line.startswith("mtp-jax: warning: ")
    assert "panels.cc" in line
    assert line.endswith(told)


def test_a_cache_folder_that_cannot_be_made_is_told_of(served, tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    done = run(SERVED, file)

    assert (done.stdout, done.returncode) == ("False\n", 0)
    [line] = done.stderr.splitlines()
    assert str(file) in line
