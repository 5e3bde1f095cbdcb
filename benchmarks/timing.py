"""Times of several functions in one run, their ratios, and compiled steps to time.

The functions take turns, round by round, so that noise hits all of them alike.
Axes: A microbatches (1), B rows, S tokens of a row.
"""

import argparse
import functools
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax.cli.args import Parser, positive_int
from mtp_jax.config import Config, default, freeze
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.parallel.to_devices import batch_sharding
from mtp_jax.training.train_step import make_init, make_step

Ratio = tuple[float, float, float]  # median, lower and upper quartile

_COUNTS = ("rounds", "steps", "batches")  # options that no config checks


def script(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Wraps a `main`: bad input is told in one line on stderr, and returns 2."""

    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2

    return run


def options(argv: list[str], description: str, **defaults: Any) -> argparse.Namespace:
    """Parses `--name=VALUE` for each default, of its type; a list takes several values.

    Raises:
      UserError: an unknown option, or a value that is not of its type.
    """
    parser = Parser(
        f"python -m benchmarks.{pathlib.Path(sys.argv[0]).stem}", description
    )
    for name, value in defaults.items():
        several = isinstance(value, list)
        of = type(value[0] if several else value)
        parser.add_argument(
            f"--{name}",
            default=value,
            type=positive_int if name in _COUNTS else of,
            nargs="+" if several else None,
            metavar=of.__name__.upper(),
            help="default: %(default)s",
        )
    return parser.parse_args(argv)


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Times functions in turn: seconds of every call, by name, after `warm` calls.

    The functions wait for what they compute.
    """
    for function in functions.values():
        for _ in range(warm):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Median and quartiles of a / b, round by round."""
    low, median, high = np.percentile(np.divide(a, b), (25, 50, 75))
    return float(median), float(low), float(high)


def show_ratio(found: Ratio) -> str:
    """Formats a ratio as `1.02 (0.99..1.05)`."""
    return "{:.3g} ({:.3g}..{:.3g})".format(*found)


def show_ms(seconds: Sequence[float]) -> str:
    """Formats the median in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.1f}"


def print_table(*rows: Sequence[object]) -> None:
    """Prints aligned columns; the first row is the header, the first column names."""
    texts = [[str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for name, *figures in texts:
        cells = [x.rjust(width) for x, width in zip(figures, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))


def print_environment(rounds: int) -> None:
    """Prints one line: versions and hardware, and what the spread is."""
    device = jax.devices()[0].device_kind
    cores = len(os.sched_getaffinity(0))
    print(
        f"python {platform.python_version()}, jax {jax.__version__}, device {device}, "
        f"{cores} cores; medians of {rounds} rounds, quartiles in brackets",
        flush=True,
    )


def one_device() -> jax.sharding.Mesh:
    """The mesh of the first device alone."""
    return make_mesh(Config().mesh, jax.devices()[:1])


def config_of(args: argparse.Namespace, **changed: Any) -> Config:
    """The float32 run that a benchmark's options describe.

    Args:
      args: options named as fields of config.model, config.data and config.compute,
        and `n` heads of prediction, `num_heads` of attention; others do not count, and
        what is not an option is the default of the config.
      changed: instead of options of these names, or besides them.

    Raises:
      UserError: a value that the config refuses, named as its field.
    """
    of = vars(args) | changed
    tree = default()
    of |= {
        "n_future_tokens": of["n"],
        "d_head": of["d_model"] // max(of["num_heads"], 1),
    }
    of |= dict.fromkeys(("num_query_heads", "num_kv_heads"), of["num_heads"])
    for section in (tree.model, tree.data, tree.compute):
        section.update({name: of[name] for name in section if name in of})
    return freeze(tree)


def random_batch(cfg: Config, documents: int = 4) -> dict[str, jax.Array]:
    """A batch [1, B, S] on the mesh: random tokens, about so many documents a row."""
    rng = np.random.default_rng(0)
    shape = (1, cfg.data.batch_size, cfg.row_len)
    begins = rng.random(shape) < (documents - 1) / cfg.row_len
    begins[..., 0] = True
    places = np.broadcast_to(np.arange(cfg.row_len), shape)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)
    batch = {
        "tokens": rng.integers(cfg.model.vocab_size, size=shape, dtype=np.int32),
        "segments": np.cumsum(begins, axis=-1, dtype=np.int32),
        "positions": positions.astype(np.int32),
        "hash": np.zeros((*shape[:2], 2), np.uint32),
    }
    return jax.device_put(batch, batch_sharding(jax.sharding.get_mesh()))


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program allocates besides its arguments and results."""
    found = compiled.memory_analysis()
    assert found is not None, "the backend tells nothing of memory"
    return found.temp_size_in_bytes


class Training:
    """A compiled step with its state and one batch. Needs the mesh to be set."""

    def __init__(self, cfg: Config, documents: int = 4):
        self.state = make_init(cfg)(jax.random.key(0))
        self.batch = random_batch(cfg, documents)
        step: Any = make_step(cfg)  # jitted, so it has more than its type says
        self.compiled = step.lower(self.state, self.batch).compile()

    def step(self) -> None:
        """Runs one step, and waits for it."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
