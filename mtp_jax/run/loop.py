"""The training loop: next batch, step, log, evaluate, save, stop."""

import contextlib
import functools
import shlex
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config
from mtp_jax.data.batches import train_batches
from mtp_jax.data.corpus import Corpus
from mtp_jax.distributed import hosts
from mtp_jax.errors import RunFailed, counted
from mtp_jax.model.sizes import sizes_of, told
from mtp_jax.parallel.processes import compile_on_all
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process
from mtp_jax.run.evaluation import HeldoutEvaluation
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.gradients import helping
from mtp_jax.run.heldout_losses import make_up
from mtp_jax.run.history import changes, read_history
from mtp_jax.run.profiler import Profiler
from mtp_jax.run.run_file import RunFile
from mtp_jax.run.run_log import RunLog
from mtp_jax.run.saver import Saver
from mtp_jax.run.screen import COMMAND, Screen
from mtp_jax.run.start import Start, open_local, restore_or_init
from mtp_jax.run.step_log import StepLog
from mtp_jax.training.train_step import Batch, make_step

_LAST_SAVE_S = 30.0  # for a save that an error finds unfinished


def run(
    cfg: Config,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    corpora: list[Corpus],
    teacher: Restored | None = None,
) -> None:
    """Trains from the newest checkpoint, or from the start, to `cfg.train.steps`.

    Args:
      cfg: the run.
      workdir: its folder, locked.
      mesh: all devices of all processes, set.
      corpora: opened, in the order of `cfg.data.sources`.
      teacher: the model of `cfg.loss.other_teacher`, on the mesh.

    Raises:
      RunFailed: too many non-finite steps in a row.
      UserError: a checkpoint does not fit, or the disk is full.
    """
    screen = Screen(active=jax.process_index() == 0)
    goodput = Goodput(tell=screen.phase)
    durable = Checkpoints(workdir, cfg.checkpoint)
    with goodput.spent("restore"):
        local = open_local(cfg, workdir, mesh)
        start = restore_or_init(cfg, durable, local, goodput, corpora)
    history = read_history(workdir)
    run_file = RunFile.begin(
        cfg,
        workdir,
        mesh,
        corpora,
        start=start.step,
        rows=start.rows,
        goodput=goodput,
        spent=start.seconds,
    )
    log = RunLog(cfg, workdir, start.step, screen)
    told_of: dict[str, Any] = {"log": log, "goodput": goodput}
    try:
        log.say(_opening(cfg, start, workdir))
        log.say(told(cfg))
        for line in changes(history, cfg, corpora, start.step):
            log.say(f"changed: {line}")
        evaluation = HeldoutEvaluation(cfg, mesh, corpora, **told_of)
        make_up(evaluation, durable, start.state, start.step, workdir)
        first, first_step, size = start.rows, start.step, cfg.data.batch_size
        done = _train(
            cfg,
            start,
            _placed_batches(cfg, mesh, corpora, start),
            teacher,
            goodput=goodput,
            profiler=Profiler(cfg.log, workdir),
            step_log=StepLog(cfg, start.step, run_file=run_file, **told_of),
            evaluation=evaluation,
            saver=Saver(
                cfg,
                corpora,
                rows_at=lambda step: first + (step - first_step) * size,
                durable=durable,
                local=local,
                **told_of,
            ),
        )
        run_file.write(finished=done >= cfg.train.steps)
        screen.close()
        for line in _ending(cfg, done, workdir, corpora):
            log.say(line)
        durable.close()
    except BaseException as error:
        # The first error is the one to tell, and a save before it may still succeed;
        # but if it is of one process of several, the others may wait for this one.
        alike = jax.process_count() == 1 or isinstance(error, RunFailed)
        limit_s = cfg.checkpoint.timeout_s if alike else _LAST_SAVE_S
        for close in (durable.close, functools.partial(log.close, failed=True)):
            with hosts.within(limit_s, error), contextlib.suppress(Exception):
                close()
        raise
    log.close()


def _train(
    cfg: Config,
    start: Start,
    batches: Iterator[Batch],
    teacher: Restored | None,
    *,
    goodput: Goodput,
    profiler: Profiler,
    step_log: StepLog,
    evaluation: HeldoutEvaluation,
    saver: Saver,
) -> int:
    """Steps until the end, a SIGTERM or a failure; returns how many are done."""
    step = make_step(cfg, None if teacher is None else teacher.config.model)
    taught = () if teacher is None else (teacher.params,)
    state, done, stopping = start.state, start.step, False
    goodput.now_in("step")
    while done < cfg.train.steps and not stopping:
        profiler.before_step(done + 1)
        with step_log.waiting_for_data():
            batch = next(batches)
        if done == start.step:
            with goodput.spent("compile"):
                compile_on_all(step, state, batch, *taught)
            # Until now a SIGTERM ended it at once: there was nothing to save.
            hosts.told_to_stop(done)
        state, metrics = step(state, batch, *taught)
        done += 1
        step_log.begun(done, metrics)
        stopping = hosts.told_to_stop(done)
        evaluating = evaluation.due(done)
        if evaluating or saver.due(done, stopping):
            step_log.catch_up()
            loss = evaluation.run(state, done) if evaluating and not stopping else None
            saver.save(state, done, stopping, loss)
            step_log.restart()
    profiler.stop()
    saver.wait()
    return done


def _placed_batches(
    cfg: Config, mesh: jax.sharding.Mesh, corpora: list[Corpus], start: Start
) -> Iterator[Batch]:
    """Global batches on the devices, of the steps after a start, without end."""
    size, accumulation = cfg.data.batch_size, cfg.train.accumulation
    sharding = batch_sharding(mesh)
    rows = rows_of_process(sharding, size, accumulation)
    batches = train_batches(cfg, rows, start.step, corpora, start_row=start.rows)
    for batch in batches:
        yield place_rows(batch, rows, sharding, size, accumulation)


def _opening(cfg: Config, start: Start, workdir: epath.Path) -> str:
    """The first line of a run for people."""
    model = cfg.model
    sizes = sizes_of(model)
    begun = f"continues after step {start.step}" if start.step else "begins"
    return (
        f"{workdir} {begun}: {sizes.total / 1e6:.2f} M parameters, "
        f"{counted(model.num_trunk_layers, 'trunk layer')}, "
        f"{counted(model.n_future_tokens, 'head')}, "
        f"{counted(jax.device_count(), 'device')}, "
        f"{cfg.data.batch_size} x {cfg.data.seq_len} positions a step"
    )


def _ending(
    cfg: Config, done: int, workdir: epath.Path, corpora: list[Corpus]
) -> list[str]:
    """The last lines of a run for people: how it ended, and what to do next."""
    if done < cfg.train.steps:
        return [f"told to stop: saved step {done}; run the same command to go on"]
    where = f"--workdir={shlex.quote(str(workdir))}"
    lines = [f"done: step {done}, in {workdir}"]
    if cfg.loss.measures_gradients:
        lines += helping(workdir)
    if any(len(corpus.documents("heldout")) for corpus in corpora):
        lines += [
            f"{COMMAND}python -m mtp_jax evaluate {where}",
            f"{COMMAND}python -m mtp_jax generate {where} --heldout=2",
        ]
    else:
        lines.append(f"{COMMAND}python -m mtp_jax generate {where} --prompt=TEXT")
    return lines
