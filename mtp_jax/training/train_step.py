"""The training state, and the one compiled step from a batch to the next state.

Axes: A microbatches, M rows of a microbatch, S tokens of a row, N heads.
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
from mtp_jax.model.attention import few_documents
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.optim import learning_rate, make_optimizer
from mtp_jax.training.wide import join, split

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
    params: Any  # in config.model.param_dtype
    opt_state: optax.OptState  # float32
    # Bits of the float32 weights that `params` lack, int16; None if those are float32.
    rounded_off: Any = None


def make_init(cfg: Config) -> Callable[[jax.Array], TrainState]:
    """`init(key) -> state`, jitted. Needs the mesh to be set.

    `jax.eval_shape(init, key)` gives the shapes and shardings of a state.
    """
    init_wide, _ = model_builder(dataclasses.replace(cfg.model, param_dtype="float32"))
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def init(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        wide = init_wide(params_key)
        params, rounded_off = split(wide, cfg.model.param_dtype)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            bad_steps=zero,
            key=jax.random.key_data(run_key),
            params=params,
            opt_state=optimizer.init(wide),
            rounded_off=rounded_off,
        )

    return init


def make_gradients(
    cfg: Config,
) -> Callable[[Any, Batch], tuple[jax.Array, HeadSums, Any]]:
    """`gradients(params, batch) -> (loss, sums, grads)` of a global batch, not jitted.

    A batch holds tokens, segments and positions, int32 [A, M, S]. The microbatches run
    one after another, and what they give is added up. Gradients are float32.
    """
    _, build = model_builder(cfg.model)
    n = cfg.model.n_future_tokens

    def gradient(few: bool):
        """The gradient of a loss of rows with few documents, or any number of them."""

        def loss_fn(params: Any, microbatch: Batch, weight_N: jax.Array):
            model, z_loss = build(params), cfg.loss.z_loss
            return batch_loss(model, microbatch, weight_N, z_loss, cfg.compute, few)

        return jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params: Any, batch: Batch):
        count_N = jnp.sum(
            jax.vmap(target_counts, in_axes=(0, None))(batch["segments"], n), axis=0
        )
        # A head's loss is the mean over the targets of the whole global batch, so the
        # parts of a batch add up to its loss, however it is split.
        weight_N = head_weights(cfg.loss, n) / jnp.maximum(count_N, 1.0)

        def add_microbatch(total, microbatch):
            few = few_documents(
                microbatch["segments"][:, :-n],
                cfg.compute.attention,
                cfg.model.d_head,
                cfg.model.compute_dtype,
            )
            of = (params, microbatch, weight_N)
            (loss, sums), grads = (
                gradient(False)(*of)
                if few is None
                else jax.lax.cond(few, gradient(True), gradient(False), *of)
            )
            return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

        # In float32 whatever the parameters are in: small terms are many.
        wide = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        rows = {k: batch[k] for k in ("tokens", "segments", "positions")}
        start = (jnp.zeros(()), no_sums(n), wide)
        return jax.lax.scan(add_microbatch, start, rows)[0]

    return gradients


def _updates_made(opt_state: optax.OptState) -> jax.Array:
    """Optimizer's own count, int32: a skipped step is no update."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_step(
    cfg: Config,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, jitted; the state is donated.

    A batch holds tokens, segments and positions, int32 [A, M, S], and hash, uint32
    [A, M, 2]. Metrics are small arrays; reading one waits for the step.
    """
    gradients = make_gradients(cfg)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    schedule = learning_rate(cfg.optim, cfg.train.steps)

    @jax.jit(donate_argnames="state")
    def step(state: TrainState, batch: Batch):
        loss, sums, grads = gradients(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        before = join(state.params, state.rounded_off)
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        after = optax.apply_updates(before, updates)

        def unless_bad(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params, rounded_off = split(unless_bad(after, before), cfg.model.param_dtype)
        new_state = TrainState(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            key=state.key,
            params=params,
            opt_state=unless_bad(opt_state, state.opt_state),
            rounded_off=rounded_off,
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
