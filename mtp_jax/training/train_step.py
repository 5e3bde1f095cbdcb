"""The training state, and the one compiled step from a batch to the next state.

Axes: A microbatches, B rows of a microbatch, S tokens of a row, N heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import Config
from mtp_jax.loss.batch_loss import batch_loss
from mtp_jax.loss.metrics import HeadSums, no_sums, summarize
from mtp_jax.loss.targets import target_counts
from mtp_jax.loss.weights import head_weights
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.optim import learning_rate, make_optimizer

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training needs to go on: plain arrays, no Flax objects."""

    step: jax.Array  # global batches consumed, int32
    bad_steps: jax.Array  # non-finite steps in a row, skipped, int32
    # Of whatever a run draws at random besides its parameters, uint32 [2]. Plain data:
    # a typed key costs Python at every call of the step; `wrap_key_data` makes it one.
    key: jax.Array
    params: Any
    opt_state: optax.OptState


def make_init(cfg: Config) -> Callable[[jax.Array], TrainState]:
    """`init(key) -> state`, jitted. Needs the mesh to be set.

    `jax.eval_shape(init, key)` gives the shapes and shardings of a state.
    """
    init_params, _ = model_builder(cfg.model)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def init(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        params = init_params(params_key)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            bad_steps=zero,
            key=jax.random.key_data(run_key),
            params=params,
            opt_state=optimizer.init(params),
        )

    return init


def make_gradients(
    cfg: Config,
) -> Callable[[Any, Batch], tuple[jax.Array, HeadSums, Any]]:
    """`gradients(params, batch) -> (loss, sums, grads)` of a global batch, not jitted.

    A batch holds tokens, segments and positions, int32 [A, B, S]. The microbatches run
    one after another, and what they give is added up.
    """
    _, build = model_builder(cfg.model)
    n = cfg.model.n_future_tokens

    def loss_fn(params: Any, microbatch: Batch, weight_N: jax.Array):
        model, z_loss = build(params), cfg.loss.z_loss
        return batch_loss(model, microbatch, weight_N, z_loss, cfg.compute)

    def gradients(params: Any, batch: Batch):
        count_N = jnp.sum(
            jax.vmap(target_counts, in_axes=(0, None))(batch["segments"], n), axis=0
        )
        # A head's loss is the mean over the targets of the whole global batch, so the
        # parts of a batch add up to its loss, however it is split.
        weight_N = head_weights(cfg.loss, n) / jnp.maximum(count_N, 1.0)

        def add_microbatch(total, microbatch):
            grad = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, sums), grads = grad(params, microbatch, weight_N)
            return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

        # In float32 whatever the parameters are in: small terms are many.
        wide = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        rows = {k: batch[k] for k in ("tokens", "segments", "positions")}
        start = (jnp.zeros(()), no_sums(n), wide)
        loss, sums, grads = jax.lax.scan(add_microbatch, start, rows)[0]
        return loss, sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return gradients


def _updates_made(opt_state: optax.OptState) -> jax.Array:
    """Optimizer's own count, int32: a skipped step is no update."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_step(
    cfg: Config,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, jitted; the state is donated.

    A batch holds tokens, segments and positions, int32 [A, B, S], and hash, uint32
    [A, B, 2]. Metrics are small arrays; reading one waits for the step.
    """
    gradients = make_gradients(cfg)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    schedule = learning_rate(cfg.optim, cfg.train.steps)

    @jax.jit(donate_argnames="state")
    def step(state: TrainState, batch: Batch):
        loss, sums, grads = gradients(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def unless_bad(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            key=state.key,
            params=unless_bad(params, state.params),
            opt_state=unless_bad(opt_state, state.opt_state),
        )
        metrics = {
            **summarize(sums),
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": schedule(_updates_made(state.opt_state)),
            "bad_steps": new_state.bad_steps,
            "tokens": sums.count_N[0],
            "hash": jnp.sum(batch["hash"], axis=(0, 1)),
        }
        return new_state, metrics

    return step
