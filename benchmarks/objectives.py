"""The price of what heads are taught beyond hard targets.

python -m benchmarks.objectives --rounds=10
"""

import argparse
import dataclasses
import sys

import jax

from benchmarks.head_loss import head_part
from benchmarks.timing import (
    Training,
    config_of,
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
from mtp_jax.config import Config, LossConfig, LossKind

KINDS: tuple[LossKind, ...] = ("hard", "kl", "tv", "e2e")
OF_STEP = {
    "hard": LossConfig(),
    "meter": LossConfig(gradient_meter=True),
    "encodec": LossConfig(balance="encodec"),
    "pcgrad": LossConfig(balance="pcgrad"),
}


@script
def main(argv: list[str]) -> int:
    """Prints two tables: of the heads' part of a step, and of whole steps."""
    args = options(
        argv,
        "Time of soft losses, of the gradient meter and of balances.",
        rounds=10,
        d_model=256,
        trunk_layers=4,
        d_ff=704,
        num_heads=8,
        vocab_size=32_000,
        seq_len=256,
        batch_size=4,
        chunk_tokens=128,
        remat="full",
        n=4,
    )
    print_environment(args.rounds)
    with jax.set_mesh(one_device()):
        print(f"\nloss and gradients of the heads alone, n={args.n}")
        parts = {
            str(kind): head_part(_config(args, LossConfig(kind=kind)))[0]
            for kind in KINDS
        }
        _report(interleaved(parts, args.rounds))
        del parts
        print(f"\nwhole step, n={args.n}")
        steps = {name: Training(_config(args, loss)) for name, loss in OF_STEP.items()}
        _report(interleaved({k: v.step for k, v in steps.items()}, args.rounds))
    return 0


def _config(args: argparse.Namespace, loss: LossConfig) -> Config:
    cfg = config_of(args, num_layers=args.trunk_layers + args.n)
    return dataclasses.replace(cfg, loss=loss)


def _report(seconds: dict[str, list[float]]) -> None:
    rows = [
        (name, show_ms(found), show_ratio(ratio(found, seconds["hard"])))
        for name, found in seconds.items()
    ]
    print_table(("", "ms", "time to hard"), *rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
