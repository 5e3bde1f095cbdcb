"""What the parts share: options, shapes, and the file that results are appended to."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from benchmarks.timing import interleaved
from mtp_jax.cli.args import Parser, config_from
from mtp_jax.config import Config

PAPER = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "paper.py")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "vllm")
# Rows of 4096 tokens whose activations fit beside the state on 80 GB.
_ROWS = {"0.3b": 8, "1.3b": 4, "7b": 1}
_REHEARSED: dict[str, Any] = {
    "d_model": 64,
    "num_layers": 10,
    "d_ff": 96,
    "vocab_size": 256,
    "num_query_heads": 4,
    "num_kv_heads": 4,
    "d_head": 16,
}


class Results:
    """Appends a line of JSON a result, at once, with what measured it."""

    def __init__(self, path: str, rehearsed: bool, device: str, **about: Any):
        self._path = path
        self._about = {
            "device": device,
            "rehearsed": rehearsed,
            "python": platform.python_version(),
            **{name: v for name in _PACKAGES if (v := _version(name))},
            **about,
        }

    def add(self, part: str, **result: Any) -> None:
        """Writes a result of a part to the file and to stdout."""
        line = json.dumps({"part": part, **result, **self._about})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(f"{part}: {json.dumps(result)}", flush=True)

    @contextlib.contextmanager
    def failures_told(self, part: str, **what: Any) -> Iterator[None]:
        """Records an error of what is done inside as a result, and goes on."""
        try:
            yield
        except Exception as error:  # one figure less, and the others still come
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.add(part, **what, error=text)


def parsed(argv: list[str], description: str, **options: str) -> argparse.Namespace:
    """The options of a part: --out, --rehearse, and others with their defaults."""
    parser = Parser(f"python -m benchmarks.gpu.{_name()}", description)
    parser.add_argument("--out", default="gpu.jsonl", help="file that results go to")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on any device"
    )
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default, help="default: %(default)s")
    return parser.parse_args(argv)


def results_of(args: argparse.Namespace) -> Results:
    """The file of results, for parts that run on JAX's first device."""
    import jax

    return Results(args.out, args.rehearse, jax.devices()[0].device_kind)


def shape(name: str, n: int, rehearse: bool, **changed: Any) -> Config:
    """A model of the paper with n heads, in bfloat16, at the batch of one GPU.

    Args:
      name: of the shape in `configs/paper.py`.
      n: heads.
      rehearse: True for a tiny model of as many heads instead, in rows of 64.
      changed: fields of `config.compute`.
    """
    cfg = config_from(f"{PAPER}:{name}-n{n}", [])
    data = dataclasses.replace(cfg.data, batch_size=_ROWS[name])
    model = cfg.model
    if rehearse:
        model = dataclasses.replace(model, **_REHEARSED)
        data = dataclasses.replace(data, batch_size=2, seq_len=64)
    compute = dataclasses.replace(cfg.compute, **changed)
    return dataclasses.replace(cfg, model=model, data=data, compute=compute)


def installed(*packages: str) -> bool:
    """Returns True if all packages are there."""
    return all(map(importlib.util.find_spec, packages))


def median_s(call: Callable[[], object], rounds: int, warm: int = 2) -> float:
    """Median of the seconds of a call that waits for what it computes."""
    return statistics.median(interleaved({"call": call}, rounds, warm)["call"])


def _name() -> str:
    return os.path.basename(sys.argv[0]).removesuffix(".py")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
