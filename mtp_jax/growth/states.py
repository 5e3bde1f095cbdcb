"""Training states of models whose heads are others than before."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.model.regrow import regrown
from mtp_jax.storage import run_at
from mtp_jax.training.groups import trained
from mtp_jax.training.train_step import TrainState, make_init, state_of

Tree = Any


def new_state(cfg: Config, params: Tree) -> TrainState:
    """The state of step 0 with these parameters; the mesh is set."""
    key = jax.random.key_data(jax.random.key(cfg.train.seed % 2**32))
    return jax.jit(lambda p: state_of(cfg, widened(p), key))(params)


def widened(params: Tree) -> Tree:
    """Parameters in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def restored_state(
    workdir: str | os.PathLike[str], model: Restored
) -> tuple[TrainState, dict[str, Any]]:
    """The training state of a model's checkpoint, and where its data stands.

    Raises:
      UserError: the run trains low-rank updates, whose moments no other model can have.
    """
    folder, _ = run_at(os.fspath(workdir))
    checkpoints = Checkpoints(folder)
    optim = checkpoints.saved_metadata(model.step)["config"]["optim"]
    if rank := optim.get("lora_rank"):
        raise UserError(
            f"--keep_optimizer: the run in {os.fspath(workdir)} trains low-rank "
            f"updates (config.optim.lora_rank={rank}); growing adds them to the "
            "matrices of the trunk, and then nothing is left that their moments are "
            "of. Leave --keep_optimizer out."
        )
    with jax.set_mesh(model.mesh):
        key = jax.random.key(0)
        abstract = abstract_items(jax.eval_shape(make_init(model.config), key))
        step, items, _ = restore_newest(checkpoints, abstract, model.step)
    about = checkpoints.saved_metadata(step)["data"]
    checkpoints.close()
    return state_from_items(items), about


def carried(
    before: Config, after: Config, there: tuple[TrainState, dict], params: Tree
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a run before with a grown model's parameters, and its data.

    Moments of parameters that are new, or were frozen, are 0; a mean of the parameters
    that teaches begins anew.
    """
    state, about = there
    models = before.model, after.model

    @jax.jit
    def carry(state: TrainState, params: Tree) -> TrainState:
        fresh = state_of(after, widened(params), state.key)
        zeros = jax.tree.map(
            jnp.zeros_like, trained(widened(params), after.optim.frozen)
        )

        def moments(old: Any, new: Any) -> Any:
            if not isinstance(old, optax.ScaleByAdamState):
                return old
            return new._replace(
                count=old.count,
                mu=regrown(*models, old.mu, zeros),
                nu=regrown(*models, old.nu, zeros),
            )

        opt_state = jax.tree.map(
            moments,
            state.opt_state,
            fresh.opt_state,
            is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState),
        )
        rounded_off = fresh.rounded_off
        if rounded_off is not None and state.rounded_off is not None:
            rounded_off = regrown(*models, state.rounded_off, rounded_off)
        return dataclasses.replace(
            fresh,
            step=state.step,
            bad_steps=state.bad_steps,
            opt_state=opt_state,
            rounded_off=rounded_off,
        )

    return carry(state, params), about
