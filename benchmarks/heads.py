"""The cost of n heads: step time of n to that of one head, at equal parameters.

python -m benchmarks.heads --rounds=10
"""

import sys

import jax

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
from mtp_jax.config import Config
from mtp_jax.model.flops import executed_flops


@script
def main(argv: list[str]) -> int:
    """Prints a row for each vocabulary."""
    args = options(
        argv,
        "Step time of n heads to one, beside the ratio of the FLOPs that are executed.",
        rounds=10,
        n=4,
        vocab_sizes=[256, 32_000],
        d_model=512,
        num_layers=8,
        d_ff=1408,
        num_heads=8,
        seq_len=256,
        batch_size=4,
        chunk_tokens=0,
        remat="none",
        head_loss="fused",
    )

    print_environment(args.rounds)
    rows = []
    with jax.set_mesh(one_device()):
        for vocab_size in args.vocab_sizes:
            one, many = (
                config_of(args, vocab_size=vocab_size, n=n) for n in (1, args.n)
            )
            rows.append((vocab_size, *beside_one(one, many, args.rounds)))
    print_table(("V", *columns(args.n)), *rows)
    return 0


def beside_one(one: Config, many: Config, rounds: int) -> tuple[str, ...]:
    """The cells under `columns`: a step of many heads beside one of one head."""
    steps = {"one": Training(one).step, "many": Training(many).step}
    seconds = interleaved(steps, rounds)
    measured = ratio(seconds["many"], seconds["one"])
    predicted = executed_flops(many).total / executed_flops(one).total
    return (
        show_ms(seconds["one"]),
        show_ms(seconds["many"]),
        show_ratio(measured),
        f"{predicted:.3f}",
        f"{measured[0] / predicted:.3f}",
    )


def columns(n: int) -> tuple[str, ...]:
    """Headers of `beside_one`."""
    return ("n=1, ms", f"n={n}, ms", "time", "FLOPs", "time / FLOPs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
