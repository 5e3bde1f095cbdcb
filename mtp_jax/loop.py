"""The training loop: next batch, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.checkpoint import (
    Checkpoints,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.config import Config
from mtp_jax.corpus import Corpus
from mtp_jax.data import train_batches
from mtp_jax.decode import Generator
from mtp_jax.errors import RunFailed
from mtp_jax.evaluate import make_evaluator, measure, placed_heldout
from mtp_jax.feed import batch_sharding, place_rows, rows_of_process
from mtp_jax.records import heldout_line, heldout_record, step_line, step_record
from mtp_jax.run_log import RunLog, Stopwatch, environment, write_json
from mtp_jax.tokenizer import Tokenizer
from mtp_jax.train_step import TrainState, make_init, make_step


def run(
    cfg: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh, corpora: list[Corpus]
) -> None:
    """Trains from the newest checkpoint, or from the start, to `cfg.train.steps`.

    Raises:
      RunFailed: too many non-finite steps in a row.
      UserError: a checkpoint does not fit, or the disk is full.
    """
    checkpoints = Checkpoints(workdir, cfg.checkpoint)
    state, start = _restore_or_init(cfg, checkpoints)
    log = RunLog(workdir, start, cfg.log.tensorboard)
    try:
        if jax.process_index() == 0:
            write_json(
                workdir / "run.json",
                {
                    "config": dataclasses.asdict(cfg),
                    "tokenizer": _identity(corpora[0].tokenizer),
                    **environment(mesh),
                },
            )
        log.say(_opening(cfg, state, start, workdir))
        generator = Generator(cfg.model, None, corpora[0].tokenizer, mesh)
        _Run(cfg, workdir, mesh, corpora, checkpoints, log, generator).go(state, start)
        checkpoints.close()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            checkpoints.close()
        raise
    finally:
        log.close()


def _restore_or_init(cfg: Config, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    init = make_init(cfg)
    key = jax.random.key(cfg.train.seed)
    if not checkpoints.steps():
        return init(key), 0
    abstract = abstract_items(jax.eval_shape(init, key))
    step, items, damaged = restore_newest(checkpoints, abstract)
    for other in damaged:
        print(f"mtp_jax: moved it to {checkpoints.set_aside(other)}", flush=True)
    return state_from_items(items), step


def _opening(cfg: Config, state: TrainState, start: int, workdir: pathlib.Path) -> str:
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

    def __init__(self, cfg, workdir, mesh, corpora, checkpoints, log, generator):
        self.cfg: Config = cfg
        self.workdir: pathlib.Path = workdir
        self.mesh: jax.sharding.Mesh = mesh
        self.corpora: list[Corpus] = corpora
        self.checkpoints: Checkpoints = checkpoints
        self.log: RunLog = log
        self.generator: Generator = generator
        self.step = make_step(cfg)
        self.tokenizer = corpora[0].tokenizer
        self.evaluator = make_evaluator(cfg.model, cfg.compute, self.tokenizer)
        self.watch = Stopwatch()
        self.tracing = False

    def go(self, state: TrainState, start: int) -> None:
        """Steps from `start` until the end, a SIGTERM or a failure."""
        cfg, last = self.cfg, self.cfg.train.steps
        batches = self.batches(start)
        earlier: tuple[int, dict[str, jax.Array]] | None = None
        done = start
        stopping = _preempted(done)
        while done < last and not stopping:
            self.profile(done)
            began = time.perf_counter()
            batch = next(batches)
            self.watch.waited(time.perf_counter() - began)
            state, metrics = self.step(state, batch)
            done += 1
            # One step late, so that the devices have the next one to work on meanwhile.
            if earlier is not None:
                self.look_at(*earlier)
            earlier = (done, metrics)
            if done == start + 1:
                self.watch.restart()  # that one was compiled first
            stopping = _preempted(done)
            evaluating = cfg.eval.every > 0 and done % cfg.eval.every == 0
            saving = done % cfg.checkpoint.every == 0 or done == last or stopping
            if evaluating or saving:
                self.look_at(*earlier)
                earlier = None
                loss = (
                    self.evaluate(state, done) if evaluating and not stopping else None
                )
                if saving:
                    self.checkpoints.save(done, state, self.metadata(done), loss)
                self.watch.restart()
        self.finish(start, done, stopping)

    def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Global batches on the devices, from step `start` on."""
        data, accumulation = self.cfg.data, self.cfg.train.accumulation
        sharding = batch_sharding(self.mesh)
        rows = rows_of_process(sharding, data.batch_size, accumulation)
        for batch in train_batches(self.cfg, rows, start, self.corpora):
            yield place_rows(batch, rows, sharding, data.batch_size, accumulation)

    def look_at(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for a step; stops a run that has gone astray; logs on schedule."""
        bad = int(metrics["bad_steps"])
        self.watch.stepped()
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
        step_s, waited = self.watch.read()
        record = step_record(self.cfg, step, metrics, step_s, waited)
        self.log.write("metrics.jsonl", record)
        self.log.say(step_line(self.cfg, record))

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
            "tokenizer": _identity(self.tokenizer),
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

    def finish(self, start: int, done: int, stopping: bool) -> None:
        """Waits for the last checkpoint and says how it ended."""
        self.end_trace()
        self.checkpoints.wait()
        if stopping and done == start:
            self.log.say("told to stop before a step; nothing new to save")
        elif stopping:
            self.log.say(
                f"told to stop: saved step {done}; run the same command to go on"
            )
        else:
            self.log.say(f"done: step {done}, in {self.workdir}")


def _identity(tokenizer: Tokenizer) -> dict[str, str]:
    return {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}


def _preempted(step: int) -> bool:
    """Whether a host was told to stop (SIGTERM); all learn it at the same step."""
    return multihost_utils.reached_preemption_sync_point(step)
