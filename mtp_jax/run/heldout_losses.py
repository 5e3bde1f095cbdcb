"""Held-out losses of a run that goes on: those it measured, and the one it missed.

A run that is told to stop saves without evaluating, to be gone in time.
"""

import contextlib
import json
import math

import jax
import numpy as np
from etils import epath

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.run.evaluation import HeldoutEvaluation
from mtp_jax.training.train_step import TrainState

_NOT_MEASURED = -1.0


def make_up(
    evaluation: HeldoutEvaluation,
    durable: Checkpoints,
    state: TrainState,
    step: int,
    workdir: epath.Path,
) -> None:
    """Evaluates the state that a run goes on from if that is due and was missed.

    The checkpoints learn its loss, and those that `heldout.jsonl` tells of the others;
    their own files do not hold it if they were saved before it was measured.

    Args:
      evaluation: of the run.
      durable: its checkpoints.
      state: after `step`.
      step: steps done; 0: the run begins, and nothing was missed.
      workdir: its folder.
    """
    if step == 0:
        return
    losses = _losses_of(workdir, sorted({*durable.steps(), step}))
    if evaluation.due(step) and step not in losses:
        losses[step] = evaluation.run(state, step)
    durable.measured(losses)


def _losses_of(workdir: epath.Path, steps: list[int]) -> dict[int, float]:
    """By step, the losses that were measured, NaN if not finite; all processes agree.

    As process 0 reads them: another one may see a shared file as it was.
    """
    from jax.experimental import multihost_utils

    mine = np.full(len(steps), _NOT_MEASURED, np.float32)
    if jax.process_index() == 0:
        known = _read(workdir / "heldout.jsonl")
        mine = np.array([known.get(s, _NOT_MEASURED) for s in steps], np.float32)
    of_all = multihost_utils.process_allgather(mine).reshape(-1, len(steps))
    pairs = zip(steps, of_all[0].tolist(), strict=True)
    return {step: loss for step, loss in pairs if loss != _NOT_MEASURED}


def _read(path: epath.Path) -> dict[int, float]:
    """By step, the losses of head 1 in a file of records."""
    found = {}
    content = path.read_bytes() if path.exists() else b""
    for line in filter(None, content.split(b"\n")):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            loss = record["loss/head_1"]
            found[int(record["step"])] = math.nan if loss is None else float(loss)
    return found
