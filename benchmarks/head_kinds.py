"""The cost of heads of every kind: step time to that of n = 1, beside executed FLOPs.

python -m benchmarks.head_kinds --rounds=10

Head 1 is as deep in all models; the n - 1 further heads of a kind come on top.
"""

import dataclasses
import sys

import jax

from benchmarks.heads import beside_one, columns
from benchmarks.timing import (
    config_of,
    one_device,
    options,
    print_environment,
    print_table,
    script,
)
from mtp_jax.config import Config, HeadsConfig
from mtp_jax.studies.head_kinds import KINDS


@script
def main(argv: list[str]) -> int:
    """Prints a row for each kind."""
    args = options(
        argv,
        "Step time of n heads of a kind to one, beside the ratio of executed FLOPs.",
        rounds=10,
        n=4,
        vocab_size=32_000,
        d_model=256,
        num_layers=4,
        d_ff=704,
        num_heads=4,
        seq_len=256,
        batch_size=8,
        chunk_tokens=0,
        remat="none",
        head_loss="fused",
        kinds=list(KINDS),
    )

    print_environment(args.rounds)
    rows = []
    with jax.set_mesh(one_device()):
        one = config_of(args, n=1)
        for name in args.kinds:
            many = with_heads(one, args.n, HeadsConfig(**KINDS[name]))
            rows.append((name, *beside_one(one, many, args.rounds)))
    print_table(("heads", *columns(args.n)), *rows)
    return 0


def with_heads(one: Config, n: int, heads: HeadsConfig) -> Config:
    """The model with n heads of a kind, the first at the depth of the model of one."""
    depth = one.model.num_layers
    of_first = heads.counted_layers(n if heads.wiring.reads == "after" else 1)
    trunk = depth - of_first
    model = dataclasses.replace(
        one.model,
        num_layers=trunk + heads.counted_layers(n),
        n_future_tokens=n,
        heads=heads,
    )
    return dataclasses.replace(one, model=model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
