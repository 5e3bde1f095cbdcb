"""The cost of a product of a few tokens on a CPU, to XLA's product of one.

Many matrices are read one after the other, more than a cache holds, as the layers of a
model are. Ours is that of `native`, where a C++ compiler is; the rest is XLA's.

python -m benchmarks.packed_weights --outputs=1024 --inputs=384
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    interleaved,
    one_device,
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ratio,
)
from mtp_jax.decode.cpu.native import product, serves
from mtp_jax.decode.cpu.packed_weights import pack
from mtp_jax.decode.cpu.row_weights import product_by_xla


@script
def main(argv: list[str]) -> int:
    """Prints a row for each number of tokens and product."""
    args = options(
        argv,
        "Time of products of tokens with matrices to XLA's of the first of `tokens`.",
        rounds=15,
        tokens=[1, 2, 4, 8],
        outputs=1024,
        inputs=384,
        megabytes=128,
    )
    size = 4e-6 * args.outputs * args.inputs
    count = max(int(args.megabytes / size), 1)
    print_environment(args.rounds)
    with jax.set_mesh(one_device()):
        keys = jax.random.split(jax.random.key(0), count)
        shape = (args.outputs, args.inputs)
        weights = [jax.random.normal(key, shape) / args.inputs**0.5 for key in keys]
        products: dict[str, tuple[Callable[..., jax.Array], list[jax.Array]]]
        products = {"XLA's": (product_by_xla, weights)}
        if serves(jnp.float32):
            packed = [pack(w_OI, (args.outputs,)).w_PIJ for w_OI in weights]
            products["ours"] = (product, packed)
        functions = {
            f"{m}, {whose}": _reader(*of, m, args.inputs)
            for m in args.tokens
            for whose, of in products.items()
        }
        seconds = interleaved(functions, args.rounds)
    one = seconds[f"{args.tokens[0]}, XLA's"]
    rows = []
    for name, taken in seconds.items():
        each = float(np.median(taken)) / count
        figures = f"{each * 1e6:.1f}", f"{size / 1e3 / each:.1f}"
        rows.append((name, *figures, show_ratio(ratio(taken, one))))
    print_table(("tokens, product", "microseconds", "GB/s", "time to the first"), *rows)
    return 0


def _reader(
    product: Callable[..., jax.Array],
    weights: list[jax.Array],
    m: int,
    inputs: int,
) -> Callable[[], object]:
    """A program that has every matrix multiplied, each after the one before."""

    @jax.jit
    def read(x_MI, weights):
        for w in weights:
            y_MO = product(x_MI, w)
            x_MI = x_MI + 1e-6 * jnp.tanh(y_MO[:, :1])
        return x_MI

    x_MI = jnp.ones((m, inputs))
    return lambda: read(x_MI, weights).block_until_ready()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
