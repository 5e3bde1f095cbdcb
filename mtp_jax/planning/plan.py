"""The cost of a training step on TPUs, from its program compiled for them.

The step that training runs is compiled ahead of time for a topology, on a host without
a TPU, for each number of heads and for n = 1, at the same number of layers. A row, one
for each topology and number of heads, has the keys:

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
- collectives: {kind: {count, bytes, hidden, hidden_bytes}}, bytes sent by a device
  (`hlo`), null where there is no program because it does not fit; hidden are those
  during which the device computes (`overlap`); dcn is all that goes to other slices;
  unknown_loops: how many loops with collectives were counted as one turn, as the
  program does not tell how many they make;
- compute_s, hbm_s, links_s (null without a program), dcn_s (null also where the speed
  of the network between slices is not known): the roofline; step_s: the largest of
  them, a lower bound; bound_by: which that is; tokens_per_s_per_chip;
- tokens: positions that are trained, by default those of the config's run;
  chip_hours, hours: what they take at step_s, so at the least; dollars: chip_hours at
  the price that was given, null without one;
- overhead_vs_n1: step_s to that of n = 1, minus 1;
- breakeven_accept_length: accepted tokens a pass from which blockwise decoding with all
  heads is faster than plain decoding (`breakeven`);
- params_trunk, params_heads, params_tables: the parameters by part;
  layers_of_equal_params, _training and _drafting: of a model of one head that has as
  many, as costly a step, or as many weights to read as a drafting pass has
  (`sizes.equal_models`).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.model.attention import check_attention
from mtp_jax.parallel.sharding import check_divisible, make_mesh
from mtp_jax.planning.aot import Compiled, compile_step, no_devices, topology_devices
from mtp_jax.planning.costs import Row, describe, figures_of, overhead, run_cost
from mtp_jax.planning.remedies import Compile, find_remedy
from mtp_jax.planning.topology_names import topology_of

Report = Callable[[str], None]


def plan(
    config: Config,
    topologies: str | Sequence[str],
    *,
    heads: Sequence[int] | None = None,
    tokens: float | None = None,
    chip_hour_dollars: float | None = None,
    progress: Report | None = None,
) -> list[Row]:
    """Compiles the training step for TPUs that are not there, and tells its cost.

    All topologies are checked before anything is compiled, which takes minutes for a
    large model; what does not fit is compiled again with one change after another.
    JAX and libtpu are kept from looking for devices meanwhile, so call it before JAX
    is used for anything else in the process, if there are accelerators.

    Args:
      config: the run, with its batch.
      topologies: such as "v5p:4x4x4", or "2xv5p:4x4x4" for two slices; one or several.
        Names of clouds are understood, too: "v5p-128".
      heads: numbers of heads, on as many layers in all; by default the config's.
        n = 1 is always there, to compare with.
      tokens: how many are to be trained; by default as many as the config's run has.
      chip_hour_dollars: what a chip costs an hour.
      progress: gets a line about each compilation.

    Returns:
      A row for each topology and number of heads, in this order: what `--json` prints.
      The docstring of this module lists its keys and their units.

    Raises:
      UserError: libtpu is not installed, there is no such topology or no figures of
        it, the config does not suit it, or there are more heads than layers.
    """
    given = [topologies] if isinstance(topologies, str) else topologies
    names = [topology_of(name) for name in given]
    wanted = sorted(set(heads or [config.model.n_future_tokens]))
    report = progress or (lambda line: None)
    _check_heads(config, wanted)

    def compile_(cfg: Config, topology: str) -> Compiled:
        return _compile(cfg, topology, report)

    with no_devices():
        for name in names:
            _check(config, name)
        begin = time.perf_counter()
        count = len(names) * len({1, *wanted})
        report(f"{count} programs to compile; one of a large model takes minutes")
        rows: list[Row] = []
        for name in names:
            rows += plan_topology(config, name, wanted, compile_, report)
        report(f"planned in {time.perf_counter() - begin:.0f} s")
    positions = config.data.batch_size * config.data.seq_len
    wanted_tokens = tokens or float(config.train.steps * positions)
    return [row | run_cost(row, wanted_tokens, chip_hour_dollars) for row in rows]


def same_size_with_heads(cfg: Config, n: int) -> Config:
    """The config with n heads on as many layers; other weights than n are dropped.

    Weights of heads decide no size, so the plan does not depend on them.
    """
    if n == cfg.model.n_future_tokens:
        return cfg
    return dataclasses.replace(
        cfg,
        model=cfg.model.resized(cfg.model.num_layers, n),
        loss=cfg.loss.without_lists(n),
    )


def plan_topology(
    cfg: Config, topology: str, heads: list[int], compile_: Compile, progress: Report
) -> list[Row]:
    """The rows of one topology: of n = 1, and of `heads`.

    Args:
      cfg: the run.
      topology: the devices.
      heads: numbers of heads.
      compile_: compiles a config for a topology.
      progress: gets a line about each change that is tried where a step does not fit.
    """
    rows: list[Row] = []
    for n in sorted({1, *heads}):
        of_n = same_size_with_heads(cfg, n)
        compiled = compile_(of_n, topology)
        row = describe(of_n, topology, compiled, topology_devices(topology))
        row["overhead_vs_n1"] = overhead(row, rows[0] if rows else row)
        row["remedy"] = None
        if not row["fits"] and n in heads:
            row["remedy"] = find_remedy(of_n, topology, compile_, progress)
        rows.append(row)
    return rows


def _check_heads(cfg: Config, heads: list[int]) -> None:
    if heads[0] < 1:
        raise UserError(f"heads: {heads[0]} is not a whole number above 0.")
    if heads[-1] > cfg.model.num_layers:
        raise UserError(
            f"--heads={heads[-1]} is more than config.model.num_layers "
            f"({cfg.model.num_layers}), which counts the heads."
        )


def _check(cfg: Config, topology: str) -> None:
    """Raises UserError if the topology is unknown or the config does not suit it."""
    devices = topology_devices(topology)
    mesh = make_mesh(cfg.mesh, devices)
    check_divisible(cfg, mesh)
    check_attention(cfg, mesh)
    figures_of(topology, devices)


def _compile(cfg: Config, topology: str, report: Report) -> Compiled:
    """`compile_step`, with a line about it, as it can take minutes."""
    begin = time.perf_counter()
    report(f"{topology}, n = {cfg.model.n_future_tokens}: compiling ...")
    compiled = compile_step(cfg, topology_devices(topology))
    verdict = "compiled" if compiled.program else "does not fit"
    report(
        f"{topology}, n = {cfg.model.n_future_tokens}: {verdict} "
        f"({time.perf_counter() - begin:.0f} s)"
    )
    return compiled
