"""Tokens that the input pipeline gives, against tokens that a step consumes.

python -m benchmarks.input_pipeline --rounds=10
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile

import jax
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
    show_ratio,
)
from mtp_jax.cli.args import config_from
from mtp_jax.config import Config
from mtp_jax.data.batches import open_sources, train_batches
from mtp_jax.data.prepare import prepare

ROOT = pathlib.Path(__file__).parent.parent


@script
def main(argv: list[str]) -> int:
    """Prints a row for the pipeline and one for the step."""
    args = options(
        argv,
        "Tokens per second read from a corpus, and trained on by the step of a config.",
        rounds=10,
        input=str(ROOT / "mtp_jax"),
        config=str(ROOT / "configs" / "quickstart.py"),
        seq_len=1024,
        batch_size=32,
        workers=0,
        batches=32,  # read in a round
    )
    cfg = config_from(args.config, [])
    print_environment(args.rounds)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(one_device()):
        reading = dataclasses.replace(
            cfg,
            data=dataclasses.replace(
                cfg.data,
                sources=(_prepared(args.input, folder),),
                weights=(),
                seq_len=args.seq_len,
                batch_size=args.batch_size,
                workers=args.workers,
            ),
        )
        corpora = open_sources(reading)

        def read() -> None:
            # Begun anew in every round: it would read ahead during the step.
            rows = np.arange(args.batch_size)
            batches = train_batches(reading, rows, 0, corpora)
            for _ in itertools.islice(batches, args.batches):
                pass

        step = Training(cfg).step
        seconds = interleaved({"pipeline": read, "step": step}, args.rounds)
    read_tokens = args.batches * _tokens(reading)
    per_s = {
        "pipeline": np.divide(read_tokens, seconds["pipeline"]),
        "step": np.divide(_tokens(cfg), seconds["step"]),
    }
    rows = [
        (name, f"{np.median(x):.0f}", show_ratio(ratio(x, per_s["step"])))
        for name, x in per_s.items()
    ]
    print_table(("", "tokens/s", "to the step's"), *rows)
    return 0


def _prepared(source: str, folder: str) -> str:
    """Prepares a corpus of the bytes of `source` in `folder`; returns its path."""
    output = f"{folder}/corpus"
    prepare(source, output, workers=1)
    return output


def _tokens(cfg: Config) -> int:
    """Positions of a batch."""
    return cfg.data.batch_size * cfg.data.seq_len


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
