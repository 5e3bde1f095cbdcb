"""A trained model from a workdir, onto whatever devices are there.

No config file is needed: it lies in the checkpoint. Only parameters are read.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from mtp_jax.checkpoint.checkpoints import Checkpoints, restore_newest
from mtp_jax.config import Config, MeshConfig, ModelConfig, config_from_json
from mtp_jax.config.heads import DraftCache
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import Tokenizer, tokenizer_from_dir
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import abstract_params, keep_heads, model_builder
from mtp_jax.parallel.sharding import abstract_tree, make_mesh, slice_count
from mtp_jax.storage import run_at, where_runs_are
from mtp_jax.training.lora import merged, with_lora


@dataclasses.dataclass(frozen=True)
class Restored:
    """A model to evaluate or to decode from."""

    config: Config  # of the run, its model with as many heads as were asked for
    params: Any  # nested dicts of arrays on the mesh, as `model_builder` makes them
    mesh: jax.sharding.Mesh
    step: int
    tokenizer: Tokenizer

    def with_data(self, sources: Sequence[str | os.PathLike[str]] | None) -> "Restored":
        """This model with held-out text from other corpora; None: from its own.

        Raises:
          UserError: a folder is not a corpus, or one of another tokenizer.
        """
        if sources is None:
            return self
        names = tuple(os.fspath(name) for name in sources)
        for name in names:
            if Corpus.open(name).tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(
                    f"{name} was prepared with another tokenizer than the model's; "
                    f"prepare it with the {next(iter(self.tokenizer.files), '')} of "
                    "the workdir."
                    if self.tokenizer.kind != "bytes"
                    else f"{name} was not prepared with the model's tokenizer, bytes."
                )
        data = dataclasses.replace(self.config.data, sources=names, weights=())
        config = dataclasses.replace(self.config, data=data)
        return dataclasses.replace(self, config=config)

    def with_draft_cache(self, draft_cache: DraftCache | None) -> "Restored":
        """This model with other caches of serial heads (docs/heads.md); None: its own.

        Raises:
          UserError: its heads are not serial ones that share their weights.
        """
        if draft_cache is None:
            return self
        model = self.config.model
        if not (model.heads.wiring.reads_tokens and model.heads.shared):
            raise UserError(
                f"draft_cache={draft_cache}: serial heads of shared weights alone have "
                f"the choice, and the model has {model.heads.kind} heads"
                f"{' with weights of their own' * model.heads.wiring.reads_tokens}."
            )
        heads = dataclasses.replace(model.heads, draft_cache=draft_cache)
        model = dataclasses.replace(model, heads=heads)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, model=model)
        )

    def beside(self, other: ModelConfig) -> "Restored":
        """This model on a mesh of all devices that splits another one evenly, too."""
        mesh, model = make_mesh(mesh_for(self.config.model, other)), self.config.model
        if mesh == self.mesh:
            return self
        params = moved(model, self.params, mesh)
        return dataclasses.replace(self, params=params, mesh=mesh)

    def keep_heads(self, n: int) -> "Restored":
        """This model with its first n heads.

        Raises:
          UserError: heads of this kind need those after them.
        """
        _, params = keep_heads(self.config.model, self.params, n)
        return dataclasses.replace(
            self, config=self.config.keep_heads(n), params=params
        )

    def needed_for_one(self) -> "Restored":
        """This model with no more heads than head 1 needs."""
        model = self.config.model
        return self.keep_heads(model.heads.least_kept(model.n_future_tokens))


def as_restored(model: Restored | str | os.PathLike[str]) -> Restored:
    """A restored model as it is, or that of a workdir, by `restore_model`."""
    return model if isinstance(model, Restored) else restore_model(model)


def restore_model(
    workdir: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
    heads: int | None = None,
) -> Restored:
    """Parameters of a checkpoint on any mesh.

    Args:
      workdir: of a run; or its folder of checkpoints, or a checkpoint in that.
      mesh: None for all devices of this process's machine or pod.
      step: which checkpoint; None for the newest that is intact.
      heads: how many heads to keep, counted from head 1; None for all.

    Raises:
      UserError: no such run or checkpoint, or more heads than the model has.
    """
    folder, named = run_at(os.fspath(workdir))
    if step is not None and named not in (None, step):
        raise UserError(
            f"--step={step} is not the step of {workdir}; keep one of them."
        )
    step = named if step is None else step
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{workdir} holds no checkpoints; {where_runs_are(folder)}.")
    checkpoints = Checkpoints(folder)
    if not checkpoints.steps():
        raise UserError(f"{workdir} holds no finished checkpoint yet.")
    if step is not None and step not in checkpoints.steps():
        raise UserError(
            f"{workdir} has no checkpoint of step {step}; there are "
            f"{checkpoints.steps()}."
        )
    metadata = checkpoints.saved_metadata(step)
    config = config_from_json(metadata["config"], f"the checkpoint in {workdir}")
    n = config.model.n_future_tokens
    if heads is not None and not 1 <= heads <= n:
        raise UserError(
            f"--heads={heads}: the model in {workdir} has {n}; give 1 to {n}."
        )
    if heads is not None:
        config.keep_heads(heads)  # refuses what cannot be, before anything is read
    tokenizer = tokenizer_from_dir(folder, metadata["tokenizer"]["kind"])
    if tokenizer.fingerprint != metadata["tokenizer"]["fingerprint"]:
        raise UserError(f"the tokenizer in {workdir} is not the one of the checkpoint.")
    mesh = make_mesh(mesh_for(config.model)) if mesh is None else mesh
    with jax.set_mesh(mesh):
        abstract = abstract_tree(_shapes(config), mesh)
        step, items, _ = restore_newest(checkpoints, {"params": abstract}, step)
        params = items["params"]
        if config.optim.lora_rank:
            params = jax.jit(functools.partial(merged, config.optim))(params)
            optim = dataclasses.replace(config.optim, lora_rank=0)
            config = dataclasses.replace(config, optim=optim)
        restored = Restored(config, params, mesh, step, tokenizer)
        if heads is not None:
            restored = restored.keep_heads(heads)
    checkpoints.close()
    return restored


def _shapes(config: Config) -> Any:
    """Parameters that a checkpoint of a run holds, abstract."""
    init, _ = model_builder(config.model)
    return jax.eval_shape(
        lambda key: with_lora(config.optim, init(key), key), jax.random.key(0)
    )


def mesh_for(*models: ModelConfig) -> MeshConfig:
    """The mesh with as many fsdp shards as all widths divide into, and copies else.

    There are copies on every slice.
    """
    widths = [model.d_model for model in models]
    # 0, which everything divides, without a bias.
    widths += [model.heads.markov_rank for model in models if model.n_future_tokens > 1]
    of_slice = jax.device_count() // slice_count(jax.devices())
    return MeshConfig(replica=-1, fsdp=math.gcd(*widths, of_slice))


def moved(model: ModelConfig, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Parameters of a model on another mesh of the same devices."""
    with jax.set_mesh(mesh):
        shapes = abstract_params(model)
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, shapes)
