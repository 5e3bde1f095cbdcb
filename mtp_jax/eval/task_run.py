"""Measures a model on tasks: what `evaluate --tasks` does, from data to a file."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import mtp_jax
from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.fitting import settings_of
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.eval.collect import Collected, Line
from mtp_jax.eval.generated import Prompts, Samples, make_prompts
from mtp_jax.eval.metrics import summarize
from mtp_jax.eval.scored import score_choices, score_texts
from mtp_jax.eval.task_data import TaskData, TaskSettings, load_task
from mtp_jax.eval.tasks.kinds import AnswerTask, ChoiceTask, CodeTask
from mtp_jax.eval.tasks.rows import task_named
from mtp_jax.sandbox.sandbox import Sandbox
from mtp_jax.storage import run_at, write_json

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def evaluate_tasks(
    model: Restored | str | os.PathLike[str],
    tasks: Sequence[str],
    data: str | os.PathLike[str],
    *,
    settings: TaskSettings | None = None,
    decoder: Decoder | None = None,
    sandbox: Sandbox | None = None,
    folder: str | os.PathLike[str] | None = None,
    report: Report = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Measures a model on tasks; returns the content of TASK.json by task.

    All data is read before anything is compiled. Results stay in `folder` while they
    are made: the same call goes on where it was interrupted, and a call whose results
    are there already returns them.

    Args:
      model: a restored model, or the workdir of a run.
      tasks: names in `TASKS`, or Python files with a `TASK`.
      data: the file of the one task, or a folder with the files of all.
      settings: of the measurement; None for the usual ones.
      decoder: how texts are written; None: with drafts if that is faster here, which
        is measured first.
      sandbox: for tasks with programs; None makes one.
      folder: where results go; None: `eval` in the workdir, which is then `model`.
      report: is told lines for people.
      progress: is told the task, how many results it has, and of how many.

    Raises:
      UserError: an unknown task, data that is not what a task needs, settings that do
        not fit, a task with programs without a sandbox.
    """
    settings = settings or TaskSettings()
    loaded = [load_task(task_named(t), os.fspath(data), settings) for t in tasks]
    if sandbox is None and any(isinstance(x.task, CodeTask) for x in loaded):
        sandbox = Sandbox()
    if folder is None:
        if isinstance(model, Restored):
            raise UserError("a restored model has no workdir; give folder=...")
        folder = run_at(os.fspath(model))[0] / "eval"
    restored = as_restored(model)
    return {
        x.task.name: measure_task(
            restored, x, epath.Path(folder) / f"{x.task.name}.json",
            decoder=decoder, sandbox=sandbox, report=report, progress=progress,
        )
        for x in loaded
    }  # fmt: skip


def measure_task(
    model: Restored,
    data: TaskData,
    path: epath.Path,
    *,
    decoder: Decoder | None = None,
    sandbox: Sandbox | None = None,
    report: Report = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measures a model on one task, and writes the file at `path`.

    Arguments are as for `evaluate_tasks`.
    """
    header = _settings(model, data, decoder, sandbox)
    if (there := _finished(path, header)) is not None:
        report(f"{path} is there already, of the same settings")
        return there
    kept = Collected(path.with_name(f"{path.stem}.partial.jsonl"), header)
    if kept.changed:
        report(f"{data.task.name} begins anew: {', '.join(kept.changed)} changed")
    elif kept.lines:
        report(f"{data.task.name} goes on after {len(kept.lines)} results")

    def told(done: int, total: int) -> None:
        progress(data.task.name, done, total)

    size = data.settings.batch_size
    extra: dict[str, Any] = {}
    if isinstance(data.task, AnswerTask | CodeTask):
        generator = Generator.from_restored(model)
        prompts = make_prompts(generator, data)
        samples = Samples(generator, data, prompts, sandbox)
        _choose(samples, kept, decoder)
        lines = kept.finish(samples.total, size, samples.work, told)
        extra = _written(kept, lines, prompts)
    else:
        score = score_choices if isinstance(data.task, ChoiceTask) else score_texts

        def work(start: int, end: int) -> list[Line]:
            return score(model, data, start, end)

        lines = kept.finish(len(data.examples), size, work, told)
        extra = {"truncated": sum(line.get("truncated", False) for line in lines)}
    metrics, items = summarize(data, lines)
    result = {
        "task": data.task.name,
        "metrics": metrics,
        **extra,
        "settings": header,
        "versions": _versions(sandbox),
        "items": items,
    }
    write_json(path, result)
    kept.remove()
    return result


def _choose(samples: Samples, kept: Collected, decoder: Decoder | None) -> None:
    """Decides how texts are written, once for all of them."""
    if decoder is not None:
        samples.decoder = decoder
        kept.chosen = {"decoder": settings_of(decoder)}
        return
    if "decoder" not in kept.chosen:
        kept.chosen = samples.choose_decoder()
    samples.decoder = DECODERS[kept.chosen["decoder"]["name"]]()


def _finished(path: epath.Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The result at a path if it is one of these settings."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        same = there["settings"] == header
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return there if same else None


def _settings(
    model: Restored, data: TaskData, decoder: Decoder | None, sandbox: Sandbox | None
) -> dict[str, Any]:
    """Everything that results depend on, in JSON's types."""
    settings = {
        "step": model.step,
        "heads": model.config.model.n_future_tokens,
        "data": data.path.name,
        "sha256": data.sha256,
        **dataclasses.asdict(data.settings),
        "decoder": "the faster one" if decoder is None else settings_of(decoder),
        "max_tokens": model.config.data.seq_len,
        "limits": dataclasses.asdict(sandbox.limits)
        if sandbox is not None and isinstance(data.task, CodeTask)
        else None,
    }
    return json.loads(json.dumps(settings))  # lists for tuples, as in a file


def _written(kept: Collected, lines: list[Line], prompts: Prompts) -> dict[str, Any]:
    """Facts about written texts: prompts that were cut, and drafting."""
    tokens = sum(line["tokens"] for line in lines)
    forwards = sum(line["forwards"] for line in lines)
    return {
        "truncated": prompts.truncated,
        "max_new_tokens": prompts.max_new_tokens,
        "drafting": {**kept.chosen, "tokens_per_forward": tokens / forwards},
    }


def _versions(sandbox: Sandbox | None) -> dict[str, str]:
    versions = {
        "mtp_jax": mtp_jax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {jax.default_backend()}",
    }
    if sandbox is not None:
        versions["sandbox"] = f"{sandbox.kind}, {sandbox.python.path}"
    return versions
