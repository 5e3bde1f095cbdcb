"""Proves from a run's files which data its logged steps have seen.

Batches are a function of seed, corpora and step; `metrics.jsonl` has the hash of each
that was logged. Here those are made again, without devices, and compared.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from mtp_jax.config import Config, as_tree, config_from_json, freeze
from mtp_jax.data.batches import open_sources, pieces_of_step, train_batches
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.packing import batch_hash, format_hash
from mtp_jax.errors import RunFailed, UserError
from mtp_jax.storage import run_at, where_runs_are


@dataclasses.dataclass(frozen=True)
class RowPiece:
    """A part of a document that lies in a row of a batch."""

    source: str  # folder of the corpus
    document: int  # in its train split
    name: str  # of the document: path, or path:line
    begin: int  # its tokens begin:end, counted from begin of text
    end: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of an audit in which every logged batch was the right one."""

    steps: int  # how many were logged, and compared
    last_step: int  # the last of them; 0: none
    runs: int  # how often the run was started
    step: int | None = None  # the one that `rows` is about
    rows: list[list[RowPiece]] | None = None  # by row of its batch


def audit(
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    data: Sequence[str | os.PathLike[str]] | None = None,
) -> Audit:
    """Makes every logged batch of a run again and compares its hash with the log's.

    Args:
      workdir: folder of a run, here or in an object store.
      step: also tell what the batch of this step, from 1 on, holds.
      data: where the run's corpora are now; None for where the run found them.

    Raises:
      RunFailed: a batch is not the one that was trained on; the first that is not.
      UserError: no run, not its corpora, or a step that it does not have.
    """
    if step is not None and step < 1:
        raise UserError(f"step is {step}; steps are counted from 1.")
    folder, _ = run_at(os.fspath(workdir))
    runs = _runs(folder, None if data is None else [os.fspath(name) for name in data])
    rows = None if step is None else _rows_of_step(runs, step)
    logged = _logged(folder)
    _replay(runs, logged)
    last = logged[-1][0] if logged else 0
    return Audit(len(logged), last, len(runs), step, rows)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run from one start to the next."""

    after: int  # it began with the batch after this step
    rows: int  # and with the row after so many
    config: Config
    sources: list[Corpus]

    def first_row(self, step: int) -> int:
        """The row with which the batch of a step, counted from 1, begins."""
        return self.rows + (step - 1 - self.after) * self.config.data.batch_size


def _replay(runs: list[_Run], logged: list[tuple[int, str]]) -> None:
    """Compares (step, hash) pairs in order.

    Raises:
      RunFailed: the first that differs.
    """
    batches: Iterator[dict[str, np.ndarray]] = iter(())
    of, at = None, 0
    for step, wanted in logged:
        run = _run_of(runs, step)
        if run is not of or step != at + 1:
            rows = np.arange(run.config.data.batch_size)
            config = _without_workers(run.config)
            first = run.first_row(step)
            batches = train_batches(
                config, rows, step - 1, run.sources, start_row=first
            )
        of, at = run, step
        found = format_hash(batch_hash(next(batches)["hash"]))
        if found != wanted:
            raise RunFailed(
                f"the batch of step {step} is not the one that was trained on: "
                f"metrics.jsonl has hash {wanted}, seed and corpora give {found}"
            )


def _rows_of_step(runs: list[_Run], step: int) -> list[list[RowPiece]]:
    """For each row of a step's batch: sources, documents and their tokens.

    Raises:
      UserError: the run has no such step.
    """
    if runs and step > (end := runs[-1].config.train.steps):
        raise UserError(f"--step={step}: the run ends at step {end}.")
    run = _run_of(runs, step)
    documents = [source.documents("train") for source in run.sources]
    return [
        [
            RowPiece(
                source=str(run.sources[piece.source].directory),
                document=piece.document,
                name=documents[piece.source].name(piece.document),
                begin=piece.begin,
                end=piece.end,
            )
            for piece in row
        ]
        for row in pieces_of_step(
            run.config, step - 1, run.sources, start_row=run.first_row(step)
        )
    ]


def _run_of(runs: list[_Run], step: int) -> _Run:
    """The last run that did a step: one that began before it overwrites the others."""
    did = [run for run in runs if run.after < step]
    if not did:
        raise UserError(
            f"run.json tells of no start before step {step}; has it been replaced?"
        )
    return did[-1]


def _without_workers(cfg: Config) -> Config:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=0))


def _runs(workdir: epath.Path, data: list[str] | None) -> list[_Run]:
    path = workdir / "run.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no run.json; {where_runs_are(workdir)}.")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        config, entries = config_from_json(run["config"], str(path)), run["runs"]
        corpora: dict[tuple[str, ...], list[Corpus]] = {}
        found = []
        for entry in entries:
            fields = {**dataclasses.asdict(config.data), **entry["data"]}
            if data is not None:
                fields["sources"] = _moved(fields["sources"], entry["corpora"], data)
            cfg = freeze({**as_tree(config), "data": fields})
            names = cfg.data.sources
            if names not in corpora:
                corpora[names] = _opened(cfg, data)
            _refuse_other_corpora(corpora[names], entry["corpora"])
            # Earlier versions went on after so many batches of the size of that start.
            after = entry["after"]
            rows = entry.get("rows", after * cfg.data.batch_size)
            found.append(_Run(after, rows, cfg, corpora[names]))
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's ({error}).") from None


def _opened(cfg: Config, data: list[str] | None) -> list[Corpus]:
    try:
        return open_sources(cfg, splits=["train"])
    except UserError as error:
        hint = " Where the corpora lie elsewhere now, name them with --data=DIR."
        raise UserError(f"{error}{hint * (data is None)}") from None


def _moved(names: list[str], fingerprints: list[str], data: list[str]) -> list[str]:
    """The folder of `data` that holds each corpus of a run, by its fingerprint.

    Raises:
      UserError: a corpus of the run is in none of them.
    """
    there = {Corpus.open(folder).fingerprint: folder for folder in data}
    for name, fingerprint in zip(names, fingerprints, strict=True):
        if fingerprint not in there:
            raise UserError(
                f"the run's corpus {name} (sha256 {fingerprint} of its manifest) is "
                f"none of --data: {', '.join(data)}."
            )
    return [there[fingerprint] for fingerprint in fingerprints]


def _refuse_other_corpora(sources: list[Corpus], fingerprints: list[str]) -> None:
    for source, fingerprint in zip(sources, fingerprints, strict=True):
        if source.fingerprint != fingerprint:
            raise UserError(
                f"{source.directory} is not the corpus of the run: its manifest has "
                f"sha256 {source.fingerprint}, the run's had {fingerprint}."
            )


def _logged(workdir: epath.Path) -> list[tuple[int, str]]:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{workdir} holds no metrics.jsonl; {where_runs_are(workdir)}.")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line:
                record = json.loads(line)
                found.append((int(record["step"]), str(record["batch_hash"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number} is not a record of a step.") from None
    return found
