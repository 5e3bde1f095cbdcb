"""The training state, and the one compiled step from a batch to the next state.

Axes: A microbatches, M rows of a microbatch, S tokens of a row, N heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import Config, ModelConfig, OptimConfig
from mtp_jax.config.optim import by_group
from mtp_jax.errors import UserError
from mtp_jax.loss.batch_loss import batch_loss
from mtp_jax.loss.metrics import HeadSums, no_sums, summarize
from mtp_jax.loss.targets import extra_targets, target_counts
from mtp_jax.loss.weights import StepWeights, at_step, weights_at
from mtp_jax.model.attention import few_documents
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import on_cpus
from mtp_jax.training.balance import factors, start_of_balance, updated
from mtp_jax.training.groups import (
    group_norms,
    group_of,
    together,
    trained,
    unless_waiting,
)
from mtp_jax.training.lora import merged, with_lora
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
    balance: Any = None  # means of `training.balance`; None if nothing asks for them
    teacher: Any = None  # float32, a mean of the parameters over steps; None, likewise


def make_init(cfg: Config) -> Callable[[jax.Array], TrainState]:
    """`init(key) -> state`, jitted. Needs the mesh to be set.

    `jax.eval_shape(init, key)` gives the shapes and shardings of a state.
    """
    init_wide, _ = model_builder(dataclasses.replace(cfg.model, param_dtype="float32"))

    def init(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        return state_of(cfg, init_wide(params_key), jax.random.key_data(run_key))

    # It runs once: on CPUs better code takes longer to compile than it saves. The level
    # is that of every mesh of CPUs, whose initial parameters are the same bits.
    quick = {"xla_backend_optimization_level": 1} if on_cpus() else None
    return jax.jit(init, compiler_options=quick)


def state_of(cfg: Config, wide: Any, key: jax.Array) -> TrainState:
    """The state of step 0 with these parameters of a model, float32.

    `key` is key data, of the run. Updates of a frozen trunk (`lora`) are new.
    """
    wide = with_lora(cfg.optim, wide, jax.random.wrap_key_data(key))
    params, rounded_off = split(wide, cfg.model.param_dtype)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        bad_steps=zero,
        key=key,
        params=params,
        opt_state=optimizer.init(trained(wide, cfg.optim.frozen)),
        rounded_off=rounded_off,
        balance=start_of_balance(cfg.loss, cfg.model.n_future_tokens),
        teacher=wide if cfg.loss.averages_teacher else None,
    )


def step_weights(
    cfg: Config, step: jax.Array | int, balance: Any = None
) -> StepWeights:
    """How much each head counts at a step, and what the trunk takes of it.

    A function of the step, and of the means that a balance has made until then. The
    weights are of heads' mean losses, before they are divided by counts of targets.

    Args:
      cfg: the run.
      step: steps done before.
      balance: `TrainState.balance`.
    """
    loss, n, steps = cfg.loss, cfg.model.n_future_tokens, cfg.train.steps
    step = jnp.asarray(step, jnp.int32)
    weight_N = weights_at(loss, n, steps, step)
    pull_N = extra_J = None
    if loss.trunk_gradient:
        pull_N = at_step(loss.pulls(n, steps), step)
    if loss.extra_targets:
        extra_J = at_step(loss.extras(steps), step)
    if balance is not None:
        factor_N = factors(loss, balance, weight_N)
        pull_N = factor_N if pull_N is None else pull_N * factor_N
    # Head 1 always works: others learn from it, and are compared with it. One without
    # any weight of its own is measured, although it does not learn.
    active_N = learns_N = None
    table = loss.weights(n, steps)
    if any(table.ever_zero()[1:]):
        active_N = (at_step(table, step) > 0).at[0].set(True)
    if any(loss.waits(n, steps)[1:]):
        learns_N = (weight_N > 0).at[0].set(True)
    return StepWeights(
        weight_N,
        extra_J=extra_J,
        pull_N=pull_N,
        active_N=active_N,
        learns_N=learns_N,
    )


def make_gradients(
    cfg: Config, teacher_model: ModelConfig | None = None
) -> Callable[..., tuple[jax.Array, HeadSums, Any]]:
    """`gradients(params, batch) -> (loss, sums, grads)` of a global batch, not jitted.

    A batch holds tokens, segments and positions, int32 [A, M, S], and learned, if not
    every token counts as a target. The microbatches run one after another, and what
    they give is added up. Gradients are float32, of the
    parameters that are not frozen. It also takes `weights`, from `step_weights`, those
    of step 0 otherwise; and `teacher`, parameters, if the config asks for them, of
    `teacher_model`, or else of this model.
    """
    _, build = model_builder(cfg.model)
    _, build_teacher = model_builder(teacher_model or cfg.model)
    n, loss, frozen = cfg.model.n_future_tokens, cfg.loss, cfg.optim.frozen

    def gradient(few: bool):
        """The gradient of a loss of rows with few documents, or any number of them."""

        def loss_fn(learning, params, microbatch, weights, teacher):
            model = build(merged(cfg.optim, together(learning, params)))
            other = teacher
            if other is not None:
                other = build_teacher(merged(cfg.optim, teacher))
            how = (loss, cfg.compute, few)
            return batch_loss(model, microbatch, weights, *how, other)

        return jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(
        params: Any,
        batch: Batch,
        weights: StepWeights | None = None,
        teacher: Any = None,
    ):
        weights = _of_targets(weights or step_weights(cfg, 0), batch, n)
        learning = trained(params, frozen)

        def add_microbatch(total, microbatch):
            few = few_documents(microbatch["segments"][:, :-n], cfg)
            of = (learning, params, microbatch, weights, teacher)
            (value, sums), grads = (
                gradient(False)(*of)
                if few is None
                else jax.lax.cond(few, gradient(True), gradient(False), *of)
            )
            return jax.tree.map(jnp.add, total, (value, sums, grads)), None

        # In float32 whatever the parameters are in: small terms are many.
        wide = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), learning)
        names = ("tokens", "segments", "positions", "learned")
        rows = {k: batch[k] for k in names if k in batch}
        sums = no_sums(
            n, loss.acceptance or loss.kind != "hard", loss.measures_gradients
        )
        return jax.lax.scan(add_microbatch, (jnp.zeros(()), sums, wide), rows)[0]

    return gradients


def _of_targets(weights: StepWeights, batch: Batch, n: int) -> StepWeights:
    """The weights of each target, so that a head's loss is a mean over its targets.

    Over those of the whole global batch, so that the parts of a batch add up to its
    loss, however it is split.
    """
    segments_AMS, learned_AMS = batch["segments"], batch.get("learned")
    counts_of = jax.vmap(target_counts, in_axes=(0, None, 0))
    count_N = jnp.sum(counts_of(segments_AMS, n, learned_AMS), axis=0)
    weight_N = weights.weight_N / jnp.maximum(count_N, 1.0)
    extra_J = weights.extra_J
    if extra_J is not None:
        several = len(extra_J)

        def counts(segments_MS, learned_MS):
            t = segments_MS.shape[1] - n
            rows = (segments_MS, segments_MS)
            _, valid_MTJ = extra_targets(*rows, t, several, learned_MS)
            return jnp.sum(valid_MTJ, axis=(0, 1), dtype=jnp.float32)

        count_J = jnp.sum(jax.vmap(counts)(segments_AMS, learned_AMS), axis=0)
        extra_J = extra_J / jnp.maximum(count_J, 1.0)
    return dataclasses.replace(weights, weight_N=weight_N, extra_J=extra_J)


def _updates_made(opt_state: optax.OptState) -> jax.Array:
    """Optimizer's own count, int32: a skipped step is no update."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_step(
    cfg: Config, teacher_model: ModelConfig | None = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, jitted; the state is donated.

    A batch holds tokens, segments and positions, int32 [A, M, S], learned, likewise, if
    not every token counts as a target, and hash, uint32 [A, M, 2]. Metrics are small
    arrays; reading one waits for the step. Where another model teaches, of
    `teacher_model`, the step takes its parameters as well.

    Raises:
      UserError: another model is to teach, and it is not given.
    """
    if cfg.loss.other_teacher and teacher_model is None:
        raise UserError(
            f"config.loss.teacher is {cfg.loss.other_teacher}, a run that only train "
            "reads; set it to self here."
        )
    gradients = make_gradients(cfg, teacher_model)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps)
    schedule = learning_rate(cfg.optim, cfg.train.steps)

    @jax.jit(donate_argnames="state")
    def step(state: TrainState, batch: Batch, teacher: Any = None):
        weights = step_weights(cfg, state.step, state.balance)
        if state.teacher is not None:
            teacher, _ = split(state.teacher, cfg.model.param_dtype)
        loss, sums, grads = gradients(state.params, batch, weights, teacher)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        before = join(state.params, state.rounded_off)
        learning = trained(before, cfg.optim.frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, learning)
        after = optax.apply_updates(learning, updates)
        if weights.learns_N is not None:
            of_heads = (cfg.model, weights.learns_N)
            after = unless_waiting(*of_heads, after, learning)
            opt_state = unless_waiting(*of_heads, opt_state, state.opt_state)
        after = together(after, before)

        def unless_bad(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        after = unless_bad(after, before)
        params, rounded_off = split(after, cfg.model.param_dtype)
        new_state = TrainState(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            key=state.key,
            params=params,
            opt_state=unless_bad(opt_state, state.opt_state),
            rounded_off=rounded_off,
            balance=unless_bad(updated(cfg.loss, state.balance, sums), state.balance),
            teacher=_averaged(cfg, state.teacher, after),
        )
        metrics = {
            **summarize(sums),
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": schedule(_updates_made(state.opt_state)),
            "bad_steps": new_state.bad_steps,
            "tokens": sums.count_N[0],
            "hash": jnp.sum(batch["hash"], axis=(0, 1)),
            **_of_gradients(cfg, grads, weights),
        }
        if weights.active_N is not None:
            told = {"loss_N", "accuracy_N", "alpha_N", "cosine_N", "ratio_N"}
            for name in told & metrics.keys():
                metrics[name] = jnp.where(weights.active_N, metrics[name], jnp.nan)
        return new_state, metrics

    return step


def _averaged(cfg: Config, teacher: Any, after: Any) -> Any:
    """The mean of the parameters over steps, one step on."""
    kept = cfg.loss.teacher_decay
    if teacher is None:
        return None
    return jax.tree.map(lambda mean, x: kept * mean + (1.0 - kept) * x, teacher, after)


def _is_clipped(
    optim: OptimConfig, grads: Any, norms: dict[str, jax.Array]
) -> jax.Array:
    """True if the optimizer scales gradients down, those of any group.

    `norms` are those of `group_norms`.
    """
    bounds = by_group(optim.clips)
    rest = {k: v for k, v in grads.items() if group_of(k) not in bounds}
    found = optax.tree.norm(rest) > optim.clip_norm
    for group, norm in norms.items():
        if group in bounds:
            found |= norm > bounds[group]
    return found


def _of_gradients(
    cfg: Config, grads: Any, weights: StepWeights
) -> dict[str, jax.Array]:
    """Figures of gradients, where they are measured or treated by group.

    `norm/GROUP` of those that have parameters that learn; `clipped`, 1 if a bound of
    gradients' norms was met; with a balance `pull_N`.
    """
    optim, found = cfg.optim, {}
    measured = cfg.loss.gradient_meter or cfg.loss.balance != "none"
    if measured or optim.rates or optim.decays or optim.clips:
        norms = group_norms(grads)
        found = {f"norm/{group}": x for group, x in norms.items()}
        found["clipped"] = jnp.float32(_is_clipped(optim, grads, norms))
    if cfg.loss.balance != "none" and weights.pull_N is not None:
        found["pull_N"] = weights.pull_N
    return found
