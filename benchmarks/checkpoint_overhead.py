"""The cost of asynchronous saves to the steps beside them.

python -m benchmarks.checkpoint_overhead

Windows of so many steps take turns: one begins with a save, which is written while its
steps run, the other has none. The ratio of their times is the overhead, the copy off
the devices, the writing and what it takes from the steps included.
"""

import dataclasses
import pathlib
import sys
import tempfile

import jax

from benchmarks import timing
from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.config import CheckpointConfig


def main(argv: list[str]) -> int:
    """Prints the table."""
    args = timing.options(
        argv,
        "Steps with and without an asynchronous checkpoint.",
        rounds=5,
        steps=50,
        d_model=256,
        num_layers=6,
        n=4,
        num_heads=4,
        d_ff=704,
        vocab_size=1024,
        seq_len=256,
        batch_size=8,
    )
    cfg = timing.config_of(args)
    timing.print_environment(args.rounds)
    with (
        jax.set_mesh(timing.one_device()),
        tempfile.TemporaryDirectory() as folder,
    ):
        training = timing.Training(cfg)
        checkpoints = Checkpoints(pathlib.Path(folder), CheckpointConfig(keep_latest=1))
        saves = 0

        def calm() -> None:
            for _ in range(args.steps):
                training.step()

        def saving() -> None:
            nonlocal saves
            saves += 1
            about = {"config": dataclasses.asdict(cfg)}
            checkpoints.save(saves, training.state, about)
            calm()

        seconds = timing.interleaved({"calm": calm, "saving": saving}, args.rounds)
        checkpoints.close()
        size = sum(x.nbytes for x in jax.tree.leaves(training.state))
    found = timing.ratio(seconds["saving"], seconds["calm"])
    timing.print_table(
        (f"{args.steps} steps", "ms", "ratio"),
        ("without a save", timing.show_ms(seconds["calm"]), "1"),
        (
            f"with one of {size / 1e6:.0f} MB",
            timing.show_ms(seconds["saving"]),
            timing.show_ratio(found),
        ),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
