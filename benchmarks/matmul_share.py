"""The share of a chip's matrix peak that models of the paper achieve in training.

python -m benchmarks.matmul_share --batch_size=8
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    Training,
    interleaved,
    one_device,
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ms,
    show_ratio,
)
from mtp_jax.cli.args import config_from
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.model import flops
from mtp_jax.parallel import chips

PAPER = pathlib.Path(__file__).parent.parent / "configs" / "paper.py"


@script
def main(argv: list[str]) -> int:
    """Prints a row for each model and number of heads, and one for a plain product."""
    args = options(
        argv,
        "Model FLOPs over step time and bfloat16 peak, on one device.",
        rounds=10,
        shapes=["0.3b", "1.3b"],
        n=[1, 4],
        seq_len=4096,
        batch_size=4,
        attention="auto",
        remat="full",
        head_loss="fused",
        chunk_tokens=0,
        matmul=8192,  # rows and columns of the plain product
    )
    device = jax.devices()[0]
    peak = chips.peak_flops(device)
    if peak is None:
        raise UserError(f"there are no peak figures for {device.device_kind!r}.")
    print_environment(args.rounds)
    print(f"peak {peak / 1e12:.0f} TFLOP/s, bfloat16; {args.batch_size} rows a step")
    rows = []
    with jax.set_mesh(one_device()):
        product, product_flops = _product(args.matmul)
        for shape in args.shapes:
            configs = {
                f"{shape}-n{n}": _config(f"{PAPER}:{shape}-n{n}", args) for n in args.n
            }
            steps = {name: Training(cfg).step for name, cfg in configs.items()}
            step_flops = {name: _step_flops(cfg) for name, cfg in configs.items()}
            step_flops["matmul"] = product_flops
            seconds = interleaved({**steps, "matmul": product}, args.rounds)
            first = seconds[next(iter(steps))]
            for name, times in seconds.items():
                rate = step_flops[name] / statistics.median(times)
                rows.append(
                    (
                        name,
                        show_ms(times),
                        show_ratio(ratio(times, first)),
                        f"{rate / 1e12:.1f}",
                        f"{rate / peak:.3f}",
                    )
                )
            del steps
    print_table(("", "ms", "time to first", "TFLOP/s", "share of peak"), *rows)
    return 0


def _config(path: str, args: argparse.Namespace) -> Config:
    """A model of the paper, in bfloat16, with the options' batch."""
    fields = {
        "data.seq_len": args.seq_len,
        "data.batch_size": args.batch_size,
        "compute.attention": args.attention,
        "compute.remat": args.remat,
        "compute.head_loss": args.head_loss,
        "compute.chunk_tokens": args.chunk_tokens,
    }
    return config_from(path, [f"--config.{k}={v}" for k, v in fields.items()])


def _step_flops(cfg: Config) -> float:
    """Useful FLOPs of a step: nothing that is computed again."""
    positions = cfg.data.batch_size * cfg.data.seq_len
    return flops.train_flops(cfg).total * positions


def _product(size: int, times: int = 20) -> tuple[Callable[[], object], float]:
    """A function that multiplies square bfloat16 matrices so often, and its FLOPs."""
    values = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    w = jnp.asarray(values, jnp.bfloat16)

    @jax.jit
    def repeated(w):
        return jax.lax.fori_loop(0, times, lambda _, x: x @ w, w)

    return lambda: repeated(w).block_until_ready(), 2.0 * times * size**3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
