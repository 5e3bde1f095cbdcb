"""A run that begins with the model of another one, with more, fewer or other heads."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import Restored, moved, restore_model
from mtp_jax.checkpoint.workdir import new_workdir, refuse_taken, together
from mtp_jax.config import (
    ComputeConfig,
    Config,
    HeadStart,
    ModelConfig,
    TrainConfig,
    as_tree,
    config_to_json,
    freeze,
)
from mtp_jax.config.regrow import config_of, regrown_config, regrown_tree
from mtp_jax.data.batches import open_sources
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import save_tokenizer, tokenizer_identity
from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.errors import UserError, disk_errors_told
from mtp_jax.eval.heldout import make_evaluator, measure, placed_heldout
from mtp_jax.growth.starts import check_start, reads_text, started
from mtp_jax.growth.states import carried, new_state, restored_state
from mtp_jax.growth.text import FitText
from mtp_jax.storage import absolute, workdir_at, write_json
from mtp_jax.training.train_step import TrainState

_SHOWN_BATCHES = 8  # held-out batches of the start losses


@dataclasses.dataclass(frozen=True)
class Grown:
    """A model with other heads than before, saved as the beginning of a run."""

    config: Config
    step: int
    losses: list[float] | None  # by head, nats a token of held-out text, or unknown


def grow(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    heads: int,
    start: HeadStart = "ridge",
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    data: Sequence[str | os.PathLike[str]] | None = None,
    fit_tokens: int = 65_536,
    keep_optimizer: bool = False,
    step: int | None = None,
    cluster: ProcessInfo | None = None,
) -> Grown:
    """Writes a workdir whose run begins with a model of other heads.

    Head 1 is the same, to the bit. `train` on the new workdir begins at step 0 with an
    optimizer that knows nothing, or with `keep_optimizer` goes on where the run before
    stood: its step, its moments (0 for what is new), its place in the text.

    Several processes that run it share the model and the work, and write one workdir.
    In such a process it can be called once: the processes part at the end, and if one
    fails, all end.

    Args:
      workdir: of the run that is there.
      output: the new workdir; nothing may be there.
      heads: n of the new model.
      start: of heads that the model lacks.
      sections: fields of the config that differ, by section, as {"heads": {"kind":
        "linear"}}; `heads.norm` is "own" for the first heads of an ordinary model.
      data: prepared corpora instead of those of the run.
      fit_tokens: of the training text, that starts are fitted to.
      keep_optimizer: see above.
      step: which checkpoint; None for the newest.
      cluster: which process of how many this is; None: what a TPU pod, GKE, Slurm or
        Open MPI says, or one process alone.

    Raises:
      UserError: no such run, heads that cannot be, no text to fit to, or a folder that
        is not empty.
    """
    target, option = workdir_at(os.fspath(output)), f"--output={output}"
    wanted = (heads, start, sections, data, fit_tokens, keep_optimizer, step)
    arguments = [os.fspath(workdir), os.fspath(output), *wanted]
    waits = _train_config(workdir, sections)
    with together(target, cluster, arguments, waits), disk_errors_told(output):
        refuse_taken(target, option)
        before = restore_model(workdir, step=step)
        cfg = grown_config(before.config, heads, sections, data)
        before = before.beside(cfg.model)
        check_start(before.config.model, cfg.model, start)
        text = _text(before, cfg, start, fit_tokens)
        there = restored_state(workdir, before) if keep_optimizer else None
        grown, state, about = _grown(before, cfg, start, text, there)
        with new_workdir(absolute(target), option) as folder:
            _write(folder, grown, state, about)
        return Grown(cfg, int(state.step), start_losses(grown))


def _train_config(
    workdir: str | os.PathLike[str],
    sections: Mapping[str, Mapping[str, Any]] | None,
) -> TrainConfig:
    """`config.train` of the run in a workdir, with the fields that are given."""
    fields = as_tree(config_of(workdir))["train"]
    return TrainConfig(**fields | dict((sections or {}).get("train", {})))


def _grown(
    before: Restored,
    cfg: Config,
    start: HeadStart,
    text: FitText | None,
    there: tuple[TrainState, dict[str, Any]] | None,
) -> tuple[Restored, TrainState, dict[str, Any]]:
    """The model with other heads, a state to train it from, and where its data stands.

    `there` is the state of the run before; None for a run that begins anew.
    """
    with jax.set_mesh(before.mesh):
        models = before.config.model, cfg.model
        params = started(*models, before.params, start, text, cfg.train.seed)
        about: dict[str, Any] = {"batches": 0, "rows": 0}
        if there is None:
            state = new_state(cfg, params)
        else:
            state, about = carried(before.config, cfg, there, params)
    return dataclasses.replace(before, config=cfg, params=params), state, about


def grown_config(
    before: Config,
    n: int,
    sections: Mapping[str, Mapping[str, Any]] | None,
    data: Sequence[str | os.PathLike[str]] | None,
) -> Config:
    """The config of a run with n heads, of that of the run before.

    Raises:
      UserError: heads that cannot be, or fields that do not go together.
    """
    tree = as_tree(before)
    if n > before.model.n_future_tokens == 1:
        tree["heads"]["norm"] = "own"
    for name, fields in (sections or {}).items():
        tree[name] = tree.get(name, {}) | dict(fields)
    if data is not None:
        names = tuple(os.fspath(name) for name in data)
        tree["data"] |= {"sources": names, "weights": ()}
    tree["init"] = as_tree(Config())["init"]
    return freeze(regrown_tree(before, n, tree))


def initial_params(cfg: Config, mesh: jax.sharding.Mesh, corpora: list[Corpus]) -> Any:
    """Parameters that `config.init` asks a run to begin with, on its mesh.

    Raises:
      UserError: no such run, another model or tokenizer than it has, or a start that
        its heads cannot have.
    """
    init = cfg.init
    before = restore_model(init.workdir)
    if before.tokenizer.fingerprint != corpora[0].tokenizer.fingerprint:
        raise UserError(
            f"config.init.workdir={init.workdir} has another tokenizer than the "
            "corpora of config.data.sources; prepare them with its tokenizer."
        )
    _check_models(cfg, before.config.model)
    before = before.beside(cfg.model)
    there = dataclasses.replace(before.config.model, param_dtype=cfg.model.param_dtype)
    with jax.set_mesh(before.mesh):
        text = None
        if reads_text(there, cfg.model, init.start):
            text = FitText(cfg, corpora, before.mesh, init.fit_tokens)
        of = (before.params, init.start, text, cfg.train.seed)
        params = started(there, cfg.model, *of)
    return moved(cfg.model, params, mesh)


def check_init(cfg: Config) -> None:
    """Refuses a `config.init` that cannot be, before anything is read or written.

    Raises:
      UserError: no such run, another model, or a start that its heads cannot have.
    """
    if cfg.init.workdir:
        _check_models(cfg, config_of(cfg.init.workdir).model)


def start_losses(model: Restored) -> list[float] | None:
    """The loss of each head on held-out text, nats a token; None without such text."""
    try:
        fingerprint = model.tokenizer.fingerprint
        corpora = open_sources(model.config, splits=["heldout"], tokenizer=fingerprint)
        with jax.set_mesh(model.mesh):
            of = (model.config.model, ComputeConfig(), model.tokenizer)
            evaluator = make_evaluator(*of)
            limits = (model.mesh, _SHOWN_BATCHES)
            batches = placed_heldout(model.config, corpora, *limits)
            figures = measure(evaluator, model.params, batches)
    except UserError:  # corpora that were moved, or nothing held out
        return None
    return [head["loss"] for head in figures["heads"]]


def _text(
    before: Restored, cfg: Config, start: HeadStart, fit_tokens: int
) -> FitText | None:
    """Text to fit a start to, None if it reads none."""
    if not reads_text(before.config.model, cfg.model, start):
        return None
    try:
        fingerprint = before.tokenizer.fingerprint
        corpora = open_sources(cfg, splits=["train"], tokenizer=fingerprint)
    except UserError as error:
        raise UserError(
            f"--start={start} is fitted to training text: {error} Give --data=DIR, or "
            "another --start."
        ) from None
    return FitText(cfg, corpora, before.mesh, fit_tokens)


def _check_models(cfg: Config, there: ModelConfig) -> None:
    """Raises UserError if the model of a run cannot become that of a config."""
    model, workdir = cfg.model, cfg.init.workdir
    wanted = regrown_config(there, model.n_future_tokens, model.heads)
    free = ("param_dtype", "compute_dtype", "heads", "rope")
    grown, here = dataclasses.asdict(wanted), dataclasses.asdict(model)
    rows = [
        f"config.model.{name} is {here[name]}, and with that model it is {grown[name]}"
        for name in grown
        if name not in free and here[name] != grown[name]
    ]
    if rows:
        raise UserError(
            f"config.init.workdir={workdir} has another model: {'; '.join(rows)}; "
            "configs/finetune.py takes a run's model over."
        )
    check_start(there, model, cfg.init.start)


def _write(
    folder: epath.Path, grown: Restored, state: TrainState, about: dict[str, Any]
) -> None:
    """Writes the workdir: checkpoint, tokenizer, and `run.json`, which makes it one."""
    config = config_to_json(grown.config)
    identity = tokenizer_identity(grown.tokenizer)
    metadata = {"config": config, "data": about, "tokenizer": identity, "seconds": {}}
    checkpoints = Checkpoints(folder, grown.config.checkpoint)
    with jax.set_mesh(grown.mesh):
        checkpoints.save(int(state.step), state, metadata)
    checkpoints.close()
    if jax.process_index() == 0:
        save_tokenizer(grown.tokenizer, folder)
        write_json(folder / "run.json", {"config": config, "tokenizer": identity})
