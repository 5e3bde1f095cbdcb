"""Changes to a config, or to its devices, that make a step fit into memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import batch_shards, make_mesh, shards_of
from mtp_jax.planning.aot import Compiled, topology_devices

Compile = Callable[[Config, str], Compiled]


def find_remedy(
    cfg: Config, topology: str, compile_: Compile, progress: Callable[[str], None]
) -> str | None:
    """The first of `remedies` with which the step compiles, None if there is none.

    Args:
      cfg: a config that does not fit.
      topology: the devices on which it does not.
      compile_: compiles a config for a topology.
      progress: gets a line about each change before it is tried.
    """
    for option, changed, place in remedies(cfg, topology):
        progress(f"trying {option}")
        try:
            if compile_(changed, place).program:
                return option
        except UserError:  # it does not suit the mesh, or no pod is as large
            continue
    return None


def remedies(cfg: Config, topology: str) -> Iterator[tuple[str, Config, str]]:
    """Changes that save memory, the cheapest first: option, config and topology."""

    def changed(section: str, **fields: Any) -> tuple[str, Config, str]:
        ((name, value),) = fields.items()
        of_section = dataclasses.replace(getattr(cfg, section), **fields)
        option = f"--config.{section}.{name}={value}"
        return option, dataclasses.replace(cfg, **{section: of_section}), topology

    compute = cfg.compute
    if compute.head_loss == "naive":
        yield changed("compute", head_loss="fused")
    if compute.remat not in ("full", "offload"):
        yield changed("compute", remat="full")
    mesh = make_mesh(cfg.mesh, topology_devices(topology))
    rows = cfg.data.batch_size // cfg.train.accumulation // batch_shards(mesh)
    tokens = rows * cfg.data.seq_len // shards_of("time", mesh)
    chunk = min(compute.chunk_tokens or 2**27 // cfg.model.vocab_size, tokens)
    if compute.head_loss != "naive" and chunk >= 512:
        yield changed("compute", chunk_tokens=2 ** (int(math.log2(chunk)) - 2))
    parts = 2
    while rows % parts == 0:
        yield changed("train", accumulation=cfg.train.accumulation * parts)
        parts *= 2
    if compute.remat != "offload":
        yield changed("compute", remat="offload")
    larger = larger_topology(topology)
    yield f"--topology={larger}", cfg, larger


def larger_topology(name: str) -> str:
    """Twice the chips: v5e:2x4 becomes v5e:4x4, v5p:2x2x1 becomes v5p:2x2x2."""
    family, _, shape = name.partition(":")
    first, *others = sorted(int(size) for size in shape.split("x"))
    return f"{family}:" + "x".join(map(str, sorted([2 * first, *others])))
