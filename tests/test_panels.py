"""Products of few tokens by our own program: against NumPy, and with no compiler."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mtp_jax import few_tokens, layers

needs_it = pytest.mark.skipif(
    not few_tokens.takes(2, 1, np.float32), reason="no C++ compiler here"
)
# Whole vectors and not, whole tiles of rows and not, one block of rows and several.
SHAPES = [(1, 1), (3, 5), (64, 32), (130, 47), (1024, 320), (513, 2100), (200, 9000)]


def drawn(m, o, i):
    rng = np.random.default_rng(m + o + i)
    x_MI = rng.normal(size=(m, i)).astype(np.float32)
    return x_MI, rng.normal(size=(o, i)).astype(np.float32)


@needs_it
@pytest.mark.parametrize("tokens", range(1, few_tokens.MOST + 1))
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_product_is_that_of_doubles(tokens, outputs, inputs):
    x_MI, w_OI = drawn(tokens, outputs, inputs)

    y_MO = np.asarray(jax.jit(few_tokens.product)(x_MI, w_OI))

    exact_MO = x_MI.astype(np.float64) @ w_OI.T.astype(np.float64)
    sizes_MO = np.abs(x_MI).astype(np.float64) @ np.abs(w_OI).T
    # The usual bound of rounding in a sum, for parts that are summed one by one.
    assert np.all(np.abs(y_MO - exact_MO) <= 2**-24 * (inputs + 20) * sizes_MO)


@needs_it
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads():
    x_MI, w_OI = drawn(4, 2000, 640)
    product = jax.jit(few_tokens.product)

    first_MO = np.asarray(product(x_MI, w_OI))

    for _ in range(50):
        np.testing.assert_array_equal(product(x_MI, w_OI), first_MO)
    # A token's own part does not depend on the others, at equal numbers of them.
    turned_MO = np.asarray(product(x_MI[::-1], w_OI))
    np.testing.assert_array_equal(turned_MO[::-1], first_MO)


@needs_it
def test_what_is_not_a_number_stays_so_and_stays_where_it_is():
    x_MI, w_OI = drawn(3, 40, 50)
    x_MI[1, 7] = np.nan
    w_OI[5, 3] = np.inf

    y_MO = np.asarray(jax.jit(few_tokens.product)(x_MI, w_OI))

    assert np.isnan(y_MO[1]).all()
    assert np.isinf(y_MO[[0, 2], 5]).all()
    assert np.isfinite(np.delete(y_MO[[0, 2]], 5, axis=1)).all()


@needs_it
def test_gradients_and_stacks_are_those_of_the_plain_product():
    x_MI, w_OI = drawn(4, 96, 64)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w)))

    ours = jax.grad(loss(few_tokens.product), (0, 1))(x_MI, w_OI)
    theirs = jax.grad(loss(lambda x, w: x @ w.T), (0, 1))(x_MI, w_OI)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)

    x_SMI = np.stack([x_MI, 2 * x_MI])
    y_SMO = jax.vmap(few_tokens.product, (0, None))(x_SMI, w_OI)
    np.testing.assert_array_equal(y_SMO[0], few_tokens.product(x_MI, w_OI))
    np.testing.assert_array_equal(y_SMO[1], few_tokens.product(2 * x_MI, w_OI))


@needs_it
def test_it_takes_two_to_eight_tokens_of_float32_that_a_cache_holds():
    taken = [few_tokens.takes(m, 1024, np.float32, jnp.float32) for m in range(12)]

    assert taken == [False] * 2 + [True] * 7 + [False] * 3
    assert not few_tokens.takes(4, 1025, jnp.float32)
    assert not few_tokens.takes(4, 64, jnp.float32, jnp.bfloat16)


@needs_it
@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape"),
    [
        ("btd,dhk->bthk", (2, 3, 48), (48, 4, 8)),
        ("bthk,hkd->btd", (1, 4, 4, 8), (4, 8, 48)),
        ("bwd,vd->bwv", (2, 4, 48), (33, 48)),
    ],
)
def test_layers_use_it_and_get_the_einsum(one_device, equation, x_shape, w_shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    w = jnp.asarray(rng.normal(size=w_shape), jnp.float32)
    product = jax.jit(lambda x, w: layers.product(equation, x, w, PartitionSpec()))

    assert "mtp_jax_few_tokens" in product.lower(x, w).compile().as_text()
    expected = np.einsum(equation, x, w)
    np.testing.assert_allclose(product(x, w), expected, rtol=1e-5, atol=1e-5)


def run(code, cache, **environ):
    """Python with its own cache folder; its result."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environ},
        capture_output=True,
        text=True,
        timeout=200,
    )


TAKES = "from mtp_jax.few_tokens import takes; print(takes(4, 64, 'float32'))"


@needs_it
def test_it_is_compiled_once_for_all_processes(tmp_path):
    assert run(TAKES, tmp_path).stdout == "True\n"
    [library] = pathlib.Path(tmp_path, "mtp_jax").iterdir()
    made = library.stat().st_mtime_ns

    assert run(TAKES, tmp_path).stdout == "True\n"

    assert list(library.parent.iterdir()) == [library]
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_it_is_left_off_in_silence(tmp_path):
    for compiler in ("", "no-such-compiler"):
        done = run(TAKES, tmp_path, CXX=compiler)

        assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


@pytest.mark.parametrize(
    ("says", "told"),
    [("echo 'out of order' >&2", "out of order"), ("echo >&2", "exit status 1.")],
)
def test_a_compiler_that_fails_is_told_of_once(says, told, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n{says}\nexit 1\n")
    compiler.chmod(0o755)

    done = run(f"{TAKES}; print(takes(5, 64, 'float32'))", tmp_path, CXX=str(compiler))

    assert (done.stdout, done.returncode) == ("False\nFalse\n", 0)
    [line] = done.stderr.splitlines()
    assert line.startswith("mtp-jax: warning: ")
    assert "few_tokens.cc" in line
    assert line.endswith(told)


@needs_it
def test_a_cache_folder_that_cannot_be_made_is_told_of(tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    done = run(TAKES, file)

    assert (done.stdout, done.returncode) == ("False\n", 0)
    [line] = done.stderr.splitlines()
    assert str(file) in line
