"""The verb `plan`: what a step costs on TPUs, from its program compiled for them.

The step that training runs is compiled ahead of time for a topology, on a host without
a TPU, for each number of heads and for n = 1, at the same number of layers. The table
is for people; `--json` prints a list of objects, one a topology and number of heads:

- topology, chips, devices (of jax), heads, params;
- argument_bytes (state and batch), temp_bytes (what else is alive at the peak),
  hbm_bytes (both, and the program), hbm_limit_bytes: of a device; the limit is the
  compiler's where it refused, else all that the device has; temp_sum_bytes: what XLA
  calls the size of temporaries, more than are ever alive at the same time;
- fits: the compiler's verdict; remedy: the one change to the command that makes it fit,
  null if it fits, if none of those tried does, or if n = 1 is only to compare with;
- flops_per_step and its parts flops_trunk, flops_heads, flops_unembedding: useful work
  of all chips (`flops.train_flops`); executed_flops_per_step: with what is computed
  again;
- collectives: {kind: {count, bytes}}, bytes sent by a device (`program`), null where
  there is no program because it does not fit; dcn is all that goes to other slices;
  unknown_loops: how many loops with collectives were counted as one turn, as the
  program does not tell how many they make;
- compute_s, hbm_s, links_s (null without a program), dcn_s (null also where the speed
  of the network between slices is not known): the roofline; step_s: the largest of
  them, a lower bound; bound_by: which that is; tokens_per_s_per_chip;
- overhead_vs_n1: step_s to that of n = 1, minus 1;
- breakeven_accept_length: accepted tokens a pass from which blockwise decoding with all
  heads is faster than plain decoding (`breakeven`).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mtp_jax.cli.args import Parser, config_from, positive_int
from mtp_jax.config import Config, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.model import flops
from mtp_jax.model.attention import check_attention
from mtp_jax.parallel import chips
from mtp_jax.parallel.sharding import (
    batch_shards,
    check_divisible,
    make_mesh,
    shards_of,
)
from mtp_jax.planning.aot import (
    Compiled,
    compile_step,
    topology_devices,
    use_no_devices,
)
from mtp_jax.planning.hlo import KINDS

Row = dict[str, Any]
Compile = Callable[[Config, str], Compiled]
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def main(argv: list[str]) -> int:
    """Runs the verb; prints a table, or JSON."""
    parser = Parser(
        "mtp-jax plan",
        "Compile the training step for TPUs that are not there, and tell its cost.",
        epilog="Any field of the config: --config.section.field=value. The batch is "
        "the config's; compiling a large model takes minutes, for every topology and "
        "number of heads; what does not fit is compiled again with one change after "
        "another, until it does. Columns: state: parameters, moments and batch; "
        "temp: what else is alive at the peak; of: what a device has; step s: the "
        "least time of a step, which arithmetic (compute), memory traffic (hbm) or "
        "the interconnect (links) bounds; tokens/s: of a chip at that time; vs n=1: "
        "time to that of one head on as many layers; even: accepted tokens a pass "
        "from which blockwise decoding is faster than plain.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="a Python file, FILE or FILE:ARGUMENT",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        type=lambda text: text.split(","),
        help="such as v5p:4x4x4, or 2xv5p:4x4x4 for two slices; several with commas",
    )
    parser.add_argument(
        "--heads",
        metavar="N",
        type=lambda text: sorted({positive_int(n) for n in text.split(",")}),
        help="numbers of heads, with commas; default: the config's. n = 1 is always "
        "there, to compare with",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    args, overrides = parser.parse_known_args(argv)
    cfg = config_from(args.config, overrides)
    heads = args.heads or [cfg.model.n_future_tokens]
    if heads[-1] > cfg.model.num_layers:
        raise UserError(
            f"--heads={heads[-1]} is more than config.model.num_layers "
            f"({cfg.model.num_layers}), which counts the heads."
        )
    use_no_devices()
    for topology in args.topology:
        devices = topology_devices(topology)
        mesh = make_mesh(cfg.mesh, devices)
        check_divisible(cfg, mesh)
        check_attention(cfg, mesh)
        _figures(topology, devices)
    rows = []
    for topology in args.topology:
        rows += plan_topology(cfg, topology, heads, _compile)
    print(json.dumps(rows, indent=2) if args.json else table(rows, heads))
    return 0


def _compile(cfg: Config, topology: str) -> Compiled:
    """`compile_step`, with a line about it on stderr, as it can take minutes."""
    begin = time.perf_counter()
    compiled = compile_step(cfg, topology_devices(topology))
    verdict = "compiled" if compiled.program else "does not fit"
    print(
        f"{topology}, n = {cfg.model.n_future_tokens}: {verdict} "
        f"({time.perf_counter() - begin:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return compiled


def same_size_with_heads(cfg: Config, n: int) -> Config:
    """The config with n heads on as many layers; other weights than n are dropped.

    Weights of heads decide no size, so the plan does not depend on them.
    """
    weights = cfg.loss.head_weights if n == cfg.model.n_future_tokens else ()
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, n_future_tokens=n),
        loss=dataclasses.replace(cfg.loss, head_weights=weights),
    )


def plan_topology(
    cfg: Config, topology: str, heads: list[int], compile_: Compile
) -> list[Row]:
    """The objects of the JSON for one topology: of n = 1, and of `heads`."""
    rows: list[Row] = []
    for n in sorted({1, *heads}):
        of_n = same_size_with_heads(cfg, n)
        compiled = compile_(of_n, topology)
        row = describe(of_n, topology, compiled, topology_devices(topology))
        row["overhead_vs_n1"] = overhead(row, rows[0] if rows else row)
        row["remedy"] = None
        if not row["fits"] and n in heads:
            row["remedy"] = find_remedy(of_n, topology, compile_)
        rows.append(row)
    return rows


def describe(
    cfg: Config, topology: str, compiled: Compiled, devices: list[jax.Device]
) -> Row:
    """What one compiled step comes to, but for what needs a comparison."""
    chip = _figures(topology, devices)
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
    }


def _figures(topology: str, devices: list[jax.Device]) -> chips.Chip:
    chip = chips.device_figures(devices[0])
    if chip is None:
        kind = devices[0].device_kind
        raise UserError(f"--topology={topology}: there are no figures of a {kind}.")
    return chip


def hbm_traffic(cfg: Config, compiled: Compiled, tensor: int) -> float:
    """Bytes that a device must move to and from its memory in a step, at least.

    The state is read and written once; of every microbatch the forward and the backward
    pass each read all gathered weights, in the compute dtype, and where layers are
    computed again, theirs once more. Activations are left out: kernels may keep them on
    the chip.
    """
    read = 2 * compiled.params
    if cfg.compute.remat in ("full", "offload"):
        read += cfg.model.num_trunk_layers * flops.layer_params(cfg.model)
    if cfg.compute.head_loss == "remat":
        read += cfg.model.n_future_tokens * flops.layer_params(cfg.model)
    weights = read * _ITEMSIZE[cfg.model.compute_dtype] / tensor
    return 2 * compiled.argument_bytes + cfg.train.accumulation * weights


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
    verified. (Caches and the one row of the embedding are left out.)
    """
    layer, unembedding = flops.layer_params(cfg), cfg.vocab_size * cfg.d_model
    plain = (cfg.num_trunk_layers + 1) * layer + unembedding
    drafts = cfg.n_future_tokens - 1
    return (plain + drafts * layer + (unembedding if drafts else 0)) / plain


def find_remedy(cfg: Config, topology: str, compile_: Compile) -> str | None:
    """The first of `remedies` with which the step compiles, None if there is none."""
    for option, changed, place in remedies(cfg, topology):
        print(f"trying {option}", file=sys.stderr, flush=True)
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


def table(rows: list[Row], heads: list[int]) -> str:
    """Memory and time, arithmetic and traffic, and remedies for what was asked for."""
    memory = [
        {
            "topology": row["topology"],
            "chips": str(row["chips"]),
            "heads": str(row["heads"]),
            "params": _count(row["params"]),
            "state": _gib(row["argument_bytes"]),
            "temp": _gib(row["temp_bytes"]),
            "of": _gib(row["hbm_limit_bytes"]),
            "fits": "yes" if row["fits"] else "NO",
            "step s": f"{row['step_s']:.3g}",
            "bound": row["bound_by"],
            "tokens/s": f"{row['tokens_per_s_per_chip']:,.0f}",
            "vs n=1": f"{row['overhead_vs_n1']:+.1%}",
            "even": f"{row['breakeven_accept_length']:.3f}",
        }
        for row in rows
    ]
    kinds = [k for k in KINDS if any(k in (row["collectives"] or ()) for row in rows)]
    work = [
        {
            "topology": row["topology"],
            "heads": str(row["heads"]),
            "FLOPs/step": f"{row['flops_per_step']:.3g}",
            "trunk": f"{row['flops_trunk'] / row['flops_per_step']:.1%}",
            "heads'": f"{row['flops_heads'] / row['flops_per_step']:.1%}",
            "unembed": f"{row['flops_unembedding'] / row['flops_per_step']:.1%}",
            **{kind: _sent(row["collectives"], kind) for kind in kinds},
        }
        for row in rows
    ]
    notes = [_remedy(r) for r in rows if not r["fits"] and r["heads"] in heads]
    return "\n".join(
        [
            "GiB of a device; the least time of a step by the roofline; tokens a chip. "
            "More: --help.",
            *_aligned(memory),
            "",
            "Useful FLOPs of a step, all chips; GB that a device sends in it.",
            *_aligned(work),
            *([""] if notes else []),
            *notes,
        ]
    )


def _aligned(cells: list[dict[str, str]]) -> list[str]:
    names = list(cells[0])
    lines = [dict(zip(names, names, strict=True)), *cells]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    first = names[0]
    return [
        line[first].ljust(widths[first])
        + "".join(f"  {line[name]:>{widths[name]}}" for name in names[1:])
        for line in lines
    ]


def _count(params: int) -> str:
    return f"{params / 1e9:.2f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"


def _gib(size: int) -> str:
    return f"{size / chips.GIB:.2f}"


def _sent(collectives: Row | None, kind: str) -> str:
    if collectives is None:
        return "?"
    return (
        f"{collectives[kind]['bytes'] / chips.GB:.3g}" if kind in collectives else "-"
    )


def _remedy(row: Row) -> str:
    """Such as "v5e:4x4, 4 heads: fits with --config.train.accumulation=4"."""
    which = f"{row['topology']}, n = {row['heads']}: "
    if row["remedy"]:
        return f"{which}fits with {row['remedy']}"
    return f"{which}no single change of those tried makes it fit"
