"""Where a run begins: at a new state, or at the newest checkpoint of any kind."""

import dataclasses
from typing import Any

import jax
from etils import epath

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.checkpoint.local import LocalCheckpoints
from mtp_jax.checkpoint.workdir import identity
from mtp_jax.config import PARTS_OF_MODEL, Config, config_from_json
from mtp_jax.data.corpus import Corpus
from mtp_jax.errors import RunFailed, UserError, say
from mtp_jax.growth.grow import initial_params
from mtp_jax.growth.states import new_state
from mtp_jax.parallel.processes import compile_on_all
from mtp_jax.parallel.sharding import abstract_tree
from mtp_jax.run.goodput import Goodput
from mtp_jax.training.train_step import TrainState, make_init


@dataclasses.dataclass(frozen=True)
class Start:
    """A state to train from."""

    state: TrainState
    step: int  # steps done before
    rows: int  # rows consumed before
    seconds: dict[str, float]  # `Goodput.seconds` when it was saved; empty if new


def open_local(
    cfg: Config, workdir: epath.Path, mesh: jax.sharding.Mesh
) -> LocalCheckpoints | None:
    """The local checkpoints of a run; None if the config asks for none."""
    if not cfg.checkpoint.local_dir:
        return None
    devices = [int(device.id) for device in mesh.devices.flat]
    setting = f"{cfg.model} {dict(mesh.shape)} {devices} with rows"
    taught = cfg.loss.balance, cfg.loss.averages_teacher, cfg.optim.frozen
    if taught != ("none", False, ()):  # other arrays than those of a plain run
        setting += f" of {taught}"
    if cfg.optim.lora_rank:
        setting += f" with updates of rank {cfg.optim.lora_rank}"
    for part in PARTS_OF_MODEL:  # which earlier versions did not know
        values = getattr(cfg.model, part)
        if values != type(values)():
            setting = f"{values} {setting}"
    return LocalCheckpoints(cfg.checkpoint, identity(workdir), setting)


def restore_or_init(
    cfg: Config,
    durable: Checkpoints,
    local: LocalCheckpoints | None,
    goodput: Goodput,
    corpora: list[Corpus],
) -> Start:
    """The newest state that was saved, locally or durably, else a new one.

    A new one begins with the model of another run if `config.init` names one.

    Raises:
      RunFailed: this process alone, of several, found its checkpoint damaged.
      UserError: a checkpoint does not fit the config, or none can be read.
    """
    init = make_init(cfg)
    # Runs of before, whose larger seeds were cut to 32 bits, go on as they were.
    key = jax.random.key(cfg.train.seed % 2**32)
    newest = max(durable.steps(), default=-1)
    if local is not None:
        shapes = jax.eval_shape(init, key)
        abstract = abstract_tree(shapes, jax.sharding.get_mesh())
        step = local.newest(max(newest, 0), abstract)
        if step > max(newest, 0):
            state, about = local.restore(step, abstract)
            return Start(state, step, int(about.pop("rows")), about)
        local.drop_after(max(newest, 0))
    if newest >= 0:
        return _restore(durable, jax.eval_shape(init, key))
    if cfg.train.seed >= 2**32:
        raise UserError(
            f"config.train.seed is {cfg.train.seed}; it must be 0 to 2^32 - 1."
        )
    if cfg.init.workdir:
        with goodput.spent("start"):
            params = initial_params(cfg, jax.sharding.get_mesh(), corpora)
            return Start(new_state(cfg, params), 0, 0, {})
    with goodput.spent("compile"):
        compile_on_all(init, key)
    with goodput.spent("start"):
        return Start(init(key), 0, 0, {})


def _restore(durable: Checkpoints, shapes: TrainState) -> Start:
    """The newest intact durable checkpoint; damaged ones are moved away."""
    try:
        step, items, damaged = restore_newest(durable, abstract_items(shapes))
    except DamagedCheckpoint as error:
        raise RunFailed(
            f"{error}; moved to {durable.move_aside(error.step)}: run the same "
            "command again, and it goes on from the checkpoint before"
        ) from error
    for other in damaged:
        say(f"mtp-jax: moved it to {durable.set_aside(other)}")
    metadata = durable.saved_metadata(step)
    seconds = metadata.get("seconds", {})
    return Start(state_from_items(items), step, _rows_consumed(metadata), seconds)


def _rows_consumed(metadata: dict[str, Any]) -> int:
    """Rows consumed before a checkpoint; earlier versions saved batches of one size."""
    data = metadata["data"]
    if "rows" in data:
        return int(data["rows"])
    config = config_from_json(metadata["config"], "the checkpoint")
    return int(data["batches"]) * config.data.batch_size
