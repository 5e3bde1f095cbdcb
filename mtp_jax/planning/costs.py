"""The cost of a compiled training step on TPUs: FLOPs, bytes, and the roofline."""

import dataclasses
from typing import Any

import jax

from mtp_jax.config import Config, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.model import flops
from mtp_jax.model.heads import kind_of
from mtp_jax.model.heads.base import layer_entries
from mtp_jax.model.sizes import (
    drafting_entries,
    equal_models,
    first_entries,
    sizes_of,
)
from mtp_jax.parallel import chips
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.planning.aot import Compiled

Row = dict[str, Any]  # the keys are listed in `mtp_jax.planning.plan`
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def describe(
    cfg: Config, topology: str, compiled: Compiled, devices: list[jax.Device]
) -> Row:
    """The row of one compiled step, without overhead_vs_n1 and remedy.

    Args:
      cfg: the config that was compiled.
      topology: name of the devices, as v5e:4x4.
      compiled: what the compiler found.
      devices: those of the topology.

    Raises:
      UserError: there are no figures of such a device.
    """
    chip = figures_of(topology, devices)
    chip_count = round(len(devices) * chips.chip_share(devices[0]))
    positions = cfg.data.batch_size * cfg.data.seq_len
    useful = flops.train_flops(cfg) * positions
    executed = flops.executed_flops(cfg) * positions
    program = compiled.program
    tensor = make_mesh(cfg.mesh, devices).shape["tensor"]
    times = {
        "compute": executed.total / len(devices) / chip.peak_flops,
        "hbm": hbm_traffic(cfg, compiled, tensor) / chip.hbm_bytes_per_s,
    }
    if program:
        times["links"] = program.sent_bytes / chip.link_bytes_per_s
    if program and chip.dcn_bytes_per_s:
        times["dcn"] = program.dcn_bytes / chip.dcn_bytes_per_s
    bound_by = max(times, key=lambda name: times[name])
    return {
        "topology": topology,
        "chips": chip_count,
        "devices": len(devices),
        "heads": cfg.model.n_future_tokens,
        "params": compiled.params,
        "argument_bytes": compiled.argument_bytes,
        "temp_bytes": compiled.temp_bytes,
        "temp_sum_bytes": compiled.temp_sum_bytes,
        "hbm_bytes": compiled.hbm_bytes,
        "hbm_limit_bytes": compiled.limit_bytes or int(chip.hbm_bytes),
        "fits": program is not None,
        "flops_per_step": useful.total,
        "flops_trunk": useful.trunk,
        "flops_heads": useful.heads,
        "flops_unembedding": useful.unembedding,
        "executed_flops_per_step": executed.total,
        "collectives": program
        and {kind: dataclasses.asdict(t) for kind, t in program.collectives.items()},
        "unknown_loops": len(program.unknown_loops) if program else 0,
        "compute_s": times["compute"],
        "hbm_s": times["hbm"],
        "links_s": times.get("links"),
        "dcn_s": times.get("dcn"),
        "step_s": times[bound_by],
        "bound_by": bound_by,
        "tokens_per_s_per_chip": positions / times[bound_by] / chip_count,
        "breakeven_accept_length": breakeven(cfg.model),
        **_sizes(cfg),
    }


def _sizes(cfg: Config) -> Row:
    """Parameters by part, and the layers of models of one head that equal this one."""
    sizes = sizes_of(cfg.model)
    parts = {f"params_{k}": v for k, v in dataclasses.asdict(sizes).items()}
    equal = dataclasses.asdict(equal_models(cfg))
    return parts | {f"layers_of_equal_{name}": x for name, x in equal.items()}


def figures_of(topology: str, devices: list[jax.Device]) -> chips.Chip:
    """The figures of a topology's devices.

    Raises:
      UserError: there are none of such a device.
    """
    chip = chips.device_figures(devices[0])
    if chip is None:
        kind = devices[0].device_kind
        raise UserError(f"--topology={topology}: there are no figures of a {kind}.")
    return chip


def hbm_traffic(cfg: Config, compiled: Compiled, tensor: int) -> float:
    """Bytes that a device must move to and from its memory in a step, at least.

    The state is read and written once, what is frozen of it read alone; of every
    microbatch the forward and the backward pass each read the gathered weights that
    they need, in the compute dtype, and where layers are computed again, theirs once
    more. Activations are left out: kernels may keep them on the chip.
    """
    model, read = cfg.model, 2 * compiled.params
    of_trunk, of_heads, _ = flops.backward_of(cfg)
    trunk = model.num_trunk_layers * layer_entries(model)
    heads = model.heads.runs(model.n_future_tokens) * kind_of(model).entries(model)
    if not of_trunk.runs:
        read -= trunk
    elif cfg.compute.remat in ("full", "offload"):
        read += trunk
    if not of_heads.runs:
        read -= heads
    elif cfg.compute.head_loss == "remat":
        read += heads
    weights = read * _ITEMSIZE[model.compute_dtype] / tensor
    state = 2 * compiled.argument_bytes - compiled.frozen_bytes
    return state + cfg.train.accumulation * weights


def run_cost(row: Row, tokens: float, chip_hour_dollars: float | None) -> Row:
    """The time and price of a number of tokens at the least time of a step.

    A lower bound, as that of the step is: no pause, save or restart is counted.
    """
    chip_hours = tokens / row["tokens_per_s_per_chip"] / 3600
    return {
        "tokens": tokens,
        "chip_hours": chip_hours,
        "hours": chip_hours / row["chips"],
        "dollars": chip_hour_dollars and chip_hours * chip_hour_dollars,
    }


def overhead(row: Row, base: Row) -> float:
    """Step time to that of n = 1, minus 1; without the interconnect if one of the two
    does not fit, and so has no program to tell its collectives."""
    parts = ["compute_s", "hbm_s", "links_s", "dcn_s"]
    parts = [p for p in parts if None not in (row[p], base[p])]
    return max(row[p] for p in parts) / max(base[p] for p in parts) - 1


def breakeven(cfg: ModelConfig) -> float:
    """Accepted tokens a pass from which blockwise decoding is faster than plain.

    Decoding of few sequences waits for memory: a pass takes the time of reading its
    weights. A plain pass reads the trunk, head 1 and the unembedding; a blockwise pass
    the other heads too, and the unembedding once more, as they draft when head 1 has
    verified. (Caches and the one row of the embedding are left out; heads of other
    kinds as `drafting_entries` counts them.)
    """
    return drafting_entries(cfg) / first_entries(cfg)
