"""The training loop: next batch, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.checkpoint.local import LocalCheckpoints
from mtp_jax.config import Config
from mtp_jax.data.batches import train_batches
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import tokenizer_identity
from mtp_jax.decode.generator import Generator
from mtp_jax.distributed import hosts
from mtp_jax.errors import RunFailed
from mtp_jax.eval.heldout import make_evaluator, measure, placed_heldout
from mtp_jax.parallel.sharding import abstract_tree
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process
from mtp_jax.run.goodput import Goodput, straggler
from mtp_jax.run.records import (
    heldout_line,
    heldout_record,
    step_line,
    step_record,
    straggler_line,
)
from mtp_jax.run.run_file import RunFile, identity
from mtp_jax.run.run_log import RunLog, Stopwatch
from mtp_jax.training.train_step import TrainState, make_init, make_step

_LAST_SAVE_S = 30.0  # for a save that an error finds unfinished


def run(
    cfg: Config, workdir: epath.Path, mesh: jax.sharding.Mesh, corpora: list[Corpus]
) -> None:
    """Trains from the newest checkpoint, or from the start, to `cfg.train.steps`.

    Raises:
      RunFailed: too many non-finite steps in a row.
      UserError: a checkpoint does not fit, or the disk is full.
    """
    goodput = Goodput()
    checkpoints = Checkpoints(workdir, cfg.checkpoint)
    with goodput.spent("restore"):
        local = _local_checkpoints(cfg, workdir, mesh)
        state, start, spent = _restore_or_init(cfg, checkpoints, local, goodput)
    file = RunFile.begin(cfg, workdir, mesh, corpora, start, goodput, spent)
    log = RunLog(workdir, start, cfg.log.tensorboard)
    try:
        log.say(_opening(cfg, state, start, workdir))
        generator = Generator(cfg.model, None, corpora[0].tokenizer, mesh)
        parts = _Run(cfg, workdir, mesh, corpora, checkpoints, log, generator, file)
        parts.local = local
        parts.go(state, start)
        checkpoints.close()
    except BaseException as error:
        # The first error is the one to tell, and a save before it may still succeed;
        # but if it is of one process of several, the others may wait for this one.
        alike = jax.process_count() == 1 or isinstance(error, RunFailed)
        limit_s = cfg.checkpoint.timeout_s if alike else _LAST_SAVE_S
        with hosts.within(limit_s, error), contextlib.suppress(Exception):
            checkpoints.close()
        raise
    finally:
        log.close()


def _restore_or_init(
    cfg: Config,
    checkpoints: Checkpoints,
    local: LocalCheckpoints | None,
    goodput: Goodput,
) -> tuple[TrainState, int, dict[str, float]]:
    """The state, the steps done before, and where their time went."""
    init = make_init(cfg)
    key = jax.random.key(cfg.train.seed)
    durable = max(checkpoints.steps(), default=0)
    if local is not None and (step := local.newest(durable)) > durable:
        abstract = abstract_tree(jax.eval_shape(init, key), jax.sharding.get_mesh())
        state, spent = local.restore(step, abstract)
        return state, step, spent
    if local is not None:
        local.drop_after(durable)
    if not durable:
        with goodput.spent("compile"):
            _compile_on_all(init, key)
        with goodput.spent("start"):
            return init(key), 0, {}
    abstract = abstract_items(jax.eval_shape(init, key))
    try:
        step, items, damaged = restore_newest(checkpoints, abstract)
    except DamagedCheckpoint as error:
        raise RunFailed(
            f"{error}; moved to {checkpoints.move_aside(error.step)}: run the same "
            "command again, and it goes on from the checkpoint before"
        ) from error
    for other in damaged:
        print(f"mtp_jax: moved it to {checkpoints.set_aside(other)}", flush=True)
    spent = checkpoints.saved_metadata(step).get("seconds", {})
    return state_from_items(items), step, spent


def _local_checkpoints(
    cfg: Config, workdir: epath.Path, mesh: jax.sharding.Mesh
) -> LocalCheckpoints | None:
    if not cfg.checkpoint.local_dir:
        return None
    devices = [int(device.id) for device in mesh.devices.flat]
    setting = f"{cfg.model} {dict(mesh.shape)} {devices}"
    return LocalCheckpoints(cfg.checkpoint, identity(workdir), setting)


def _compile_on_all(function: Any, *args: Any) -> None:
    """Compiles what all processes are about to call, and waits until all have."""
    function.lower(*args).compile()
    hosts.wait_for_all("compiled")


def _opening(cfg: Config, state: TrainState, start: int, workdir: epath.Path) -> str:
    size = sum(x.size for x in jax.tree.leaves(state.params))
    model = cfg.model
    begun = f"continues after step {start}" if start else "begins"
    return (
        f"{workdir} {begun}: {size / 1e6:.2f} M parameters, {model.num_trunk_layers} "
        f"trunk layers, {model.n_future_tokens} heads, {jax.device_count()} devices, "
        f"{cfg.data.batch_size} x {cfg.data.seq_len} positions a step"
    )


class _Run:
    """What stays the same from step to step."""

    def __init__(self, cfg, workdir, mesh, corpora, checkpoints, log, generator, file):
        self.cfg: Config = cfg
        self.workdir: epath.Path = workdir
        self.mesh: jax.sharding.Mesh = mesh
        self.corpora: list[Corpus] = corpora
        self.checkpoints: Checkpoints = checkpoints
        self.log: RunLog = log
        self.generator: Generator = generator
        self.file: RunFile = file
        self.goodput: Goodput = file.goodput
        self.step = make_step(cfg)
        self.tokenizer = corpora[0].tokenizer
        self.evaluator = make_evaluator(cfg.model, cfg.compute, self.tokenizer)
        self.local: LocalCheckpoints | None = None
        self.watch = Stopwatch()
        self.tracing = False
        self.window = -1  # the step at which the last window of the log ended

    def go(self, state: TrainState, start: int) -> None:
        """Steps from `start` until the end, a SIGTERM or a failure."""
        cfg, last = self.cfg, self.cfg.train.steps
        batches = self.batches(start)
        self.goodput.now_in("step")
        earlier: tuple[int, dict[str, jax.Array]] | None = None
        done = start
        stopping = False
        while done < last and not stopping:
            self.profile(done)
            began = time.perf_counter()
            with self.goodput.spent("data"):
                batch = next(batches)
            self.watch.waited(time.perf_counter() - began)
            if done == start:
                with self.goodput.spent("compile"):
                    _compile_on_all(self.step, state, batch)
                # Until now a SIGTERM ended it at once: there was nothing to save.
                hosts.told_to_stop(done)
            state, metrics = self.step(state, batch)
            done += 1
            # One step late, so that the devices have the next one to work on meanwhile.
            if earlier is not None:
                self.look_at(*earlier)
            earlier = (done, metrics)
            if done == start + 1:
                self.watch.restart()  # that one was compiled first
            stopping = hosts.told_to_stop(done)
            evaluating = cfg.eval.every > 0 and done % cfg.eval.every == 0
            saving = done % cfg.checkpoint.every == 0 or done == last or stopping
            saving_here = self.local is not None and self.local.due(done)
            if evaluating or saving or saving_here:
                self.look_at(*earlier)
                earlier = None
                loss = None
                if evaluating and not stopping:
                    with self.goodput.spent("evaluate"):
                        loss = self.evaluate(state, done)
                if saving_here and not saving:
                    self.save_here(state, done)
                if saving:
                    self.log.sync()  # a resume needs the lines up to its step
                    with self.goodput.spent("save"):
                        self.checkpoints.save(done, state, self.metadata(done), loss)
                self.file.write_sometimes()
                self.watch.restart()
        self.finish(done)

    def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Global batches on the devices, from step `start` on."""
        data, accumulation = self.cfg.data, self.cfg.train.accumulation
        sharding = batch_sharding(self.mesh)
        rows = rows_of_process(sharding, data.batch_size, accumulation)
        for batch in train_batches(self.cfg, rows, start, self.corpora):
            yield place_rows(batch, rows, sharding, data.batch_size, accumulation)

    def look_at(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step; stops a run that has gone astray; logs on schedule."""
        began = time.perf_counter()
        bad = int(metrics["bad_steps"])
        self.watch.stepped(time.perf_counter() - began)
        if bad >= self.cfg.train.max_bad_steps:
            raise RunFailed(
                f"the loss or its gradient was not finite for {bad} steps in a row up "
                f"to step {step}; they were skipped and not saved. Try a lower "
                "config.optim.peak_lr, or look at the data of those steps."
            )
        if step % self.cfg.log.every == 0 or bad:
            self.write(step, jax.device_get(metrics))

    def write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """One record of metrics.jsonl and one line for people."""
        window = self.watch.read()
        record = step_record(self.cfg, step, metrics, window)
        slow = straggler(hosts.reports(), self.window, window.step_s)
        hosts.report(step=step, own_s=window.own_s, data_s=window.data_s)
        self.window = step
        if slow is not None:
            record |= {"slowest_host": slow[0], "slowest_host_s": slow[1]["own_s"]}
        self.log.write("metrics.jsonl", record)
        self.log.say(step_line(self.cfg, record, self.goodput.share()))
        if slow is not None:
            self.log.say(straggler_line(hosts.name_of(slow[0]), slow[1]))
        self.file.write_sometimes()

    def evaluate(self, state: TrainState, step: int) -> float:
        """Held-out figures and a sample text; returns the loss of head 1."""
        batches = placed_heldout(
            self.cfg, self.corpora, self.mesh, limit=self.cfg.eval.batches
        )
        figures = measure(self.evaluator, state.params, batches)
        record = heldout_record(step, figures)
        self.log.say(heldout_line(figures, step))
        if self.cfg.eval.sample_tokens:
            record["prompt"], record["sample"] = self.sample(state, step)
            self.log.say(f"sample: {record['prompt']!r} -> {record['sample']!r}")
        self.log.write("heldout.jsonl", record)
        return record["loss/head_1"]

    def save_here(self, state: TrainState, step: int) -> None:
        """On the disk of this host; one that is full ends these, not the run."""
        assert self.local is not None
        try:
            with self.goodput.spent("save"):
                self.local.save(step, state, self.goodput.seconds())
        except OSError as error:
            print(
                f"mtp_jax: no more local checkpoints: {error.strerror} in "
                f"config.checkpoint.local_dir ({self.cfg.checkpoint.local_dir})",
                file=sys.stderr,
                flush=True,
            )
            self.local = None

    def sample(self, state: TrainState, step: int) -> tuple[str, str]:
        """A held-out prompt, drawn by the run's key, and how the model goes on."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        draw = jax.random.bits(key, (2,))
        splits = [corpus.documents("heldout") for corpus in self.corpora]
        documents = next(split for split in splits if len(split))
        which, where = (int(x) for x in jax.device_get(draw))
        document = which % len(documents)
        length = self.cfg.eval.sample_prompt_tokens
        begin = 1 + where % max(int(documents.lengths[document]) - length - 1, 1)
        prompt = documents.tokens(document, begin, begin + length).astype(np.int32)
        self.generator.use(state.params)
        made = self.generator.generate(
            [prompt], max_new_tokens=self.cfg.eval.sample_tokens
        )
        self.generator.use(None)
        return self.tokenizer.decode(prompt), made[0].text

    def metadata(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of its run, as JSON."""
        return {
            "config": dataclasses.asdict(self.cfg),
            "data": {
                "batches": step,
                "corpora": [c.manifest["splits"]["train"] for c in self.corpora],
            },
            "tokenizer": tokenizer_identity(self.tokenizer),
            "seconds": self.goodput.seconds(),
        }

    def profile(self, done: int) -> None:
        """Begins or ends the profiler trace before the step after `done`."""
        first = self.cfg.log.profile_step
        if not first:
            return
        if done + 1 == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.tracing = True
        elif self.tracing and done + 1 >= first + self.cfg.log.profile_steps:
            self.end_trace()

    def end_trace(self) -> None:
        """Writes the trace that was begun, if any."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def finish(self, done: int) -> None:
        """Waits for the last checkpoint and says how it ended."""
        self.end_trace()
        with self.goodput.spent("save"):
            self.checkpoints.wait()
        finished = done >= self.cfg.train.steps
        self.file.write(finished)
        if not finished:
            self.log.say(
                f"told to stop: saved step {done}; run the same command to go on"
            )
        else:
            self.log.say(f"done: step {done}, in {self.workdir}")
