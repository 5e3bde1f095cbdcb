"""The starts of a run, as `run.json` lists them, and what a new one changes.

An entry of a start has its config only if that differs from the one before it.
"""

import json
from typing import Any

import jax
from etils import epath

from mtp_jax.config import Config, as_tree, config_from_json
from mtp_jax.data.corpus import Corpus
from mtp_jax.errors import UserError
from mtp_jax.training.optim import learning_rate

_OTHER_TEXT = "text of this epoch may come again, or not at all"
_ONLY_SPEED = "speed and memory; values only by rounding"
_NOTHING = "nothing that is learned"
# What a changed field does to the steps that follow; else that of its section.
_EFFECTS = {
    "config.compute": _ONLY_SPEED,
    "config.mesh": _ONLY_SPEED,
    "config.train.accumulation": _ONLY_SPEED,
    "config.loss": "another loss from the next step on",
    "config.optim": "another optimizer from the next step on; its moments stay",
    "config.optim.frozen": "other parameters learn; moments of those anew begin at 0",
    "config.data.batch_size": "batches go on with the row after the last one consumed",
    "config.data.seq_len": f"rows are cut anew: {_OTHER_TEXT}",
    "config.data.seed": f"another order of documents and rows: {_OTHER_TEXT}",
    "config.data.sources": f"other corpora, or in another order: {_OTHER_TEXT}",
    "config.data.weights": f"another mixture: {_OTHER_TEXT}",
    "config.eval.batches": "held-out figures are of other text than before",
    "config.train.seed": "nothing: the random key is in the checkpoint",
    "config.train.steps": "another last step",
}


def read_history(workdir: epath.Path) -> dict[str, Any]:
    """The object in `run.json`; empty if there is none that can be read."""
    try:
        path = workdir / "run.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def starts_with_configs(history: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts in `run.json`, each with its config.

    Files of earlier versions have only the config of the last start, and of the others
    what decides their batches.
    """
    starts, config = [dict(start) for start in history.get("runs", [])], None
    for start in starts:
        config = start["config"] = start.get("config", config)
    if starts and starts[-1]["config"] is None:
        starts[-1]["config"] = history.get("config")
    return starts


def changes(
    history: dict[str, Any], cfg: Config, corpora: list[Corpus], step: int
) -> list[str]:
    """A line for each setting that differs from the run's so far, with what it does.

    Args:
      history: content of `run.json` before this start.
      cfg: the config of this start.
      corpora: its corpora.
      step: steps done before; those are compared with that did the last of them.
    """
    return _changes(history, cfg, [corpus.fingerprint for corpus in corpora], step)


def changes_of_starts(history: dict[str, Any]) -> list[list[str]]:
    """For each start in `run.json`, the lines that `changes` gave when it was made.

    A start whose config cannot be read has none.
    """
    starts, found = starts_with_configs(history), list[list[str]]()
    for i, start in enumerate(starts):
        try:
            cfg = config_from_json(start["config"], "run.json")
        except UserError:
            found.append([])
            continue
        contents, step = start.get("corpora", []), start.get("after", 0)
        found.append(_changes({"runs": starts[:i]}, cfg, contents, step))
    return found


def _changes(
    history: dict[str, Any], cfg: Config, contents: list[str], step: int
) -> list[str]:
    did = [s for s in starts_with_configs(history) if s.get("after", 0) < step]
    if not did or did[-1]["config"] is None:
        return []
    try:
        before = config_from_json(did[-1]["config"], "run.json")
    except UserError:  # of a later version
        return []
    same_text = did[-1].get("corpora", contents) == contents
    lines = [
        f"{path} is {now}, was {was}: {_effect(path, same_text)}"
        for path, was, now in _differences(before, cfg)
    ]
    rates = [float(_rate(c, step)) for c in (before, cfg)]
    if rates[0] != rates[1]:
        lines.append(
            f"the learning rate of step {step + 1} is {rates[1]:.2e}; by the settings "
            f"before it would be {rates[0]:.2e}"
        )
    if before.data.sources == cfg.data.sources and not same_text:
        lines.append(
            f"the corpora of config.data.sources were prepared anew: {_OTHER_TEXT}"
        )
    return lines


def _differences(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(path, value before, value now) of each field that is not the same."""
    found = []
    there = as_tree(before)
    for section, fields in as_tree(now).items():
        old = there[section]
        for name, value in fields.items():
            if value != old[name]:
                found.append((f"config.{section}.{name}", old[name], value))
    return found


def _effect(path: str, same_text: bool) -> str:
    if path == "config.data.sources" and same_text:
        return "the same corpora elsewhere"
    section = path.rpartition(".")[0]
    return _EFFECTS.get(path) or _EFFECTS.get(section) or _NOTHING


def _rate(cfg: Config, step: int) -> jax.Array:
    """The learning rate of the step after `step`, if none was skipped."""
    return learning_rate(cfg.optim, cfg.train.steps)(step)
