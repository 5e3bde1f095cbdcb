"""The optimizer: schedule, clipping, AdamW with decay by name, rates of groups."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import OptimConfig
from mtp_jax.config.optim import GROUPS, by_group
from mtp_jax.training.groups import by_own_norm, multiplied


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then `cfg.schedule`, to decay_ratio x peak at the last step.

    The first step (count 0) already takes 1 / warmup_steps of the peak.
    """
    curve = _cosine if cfg.schedule == "cosine" else _warmup_stable_decay
    rate = curve(cfg, max(steps, cfg.warmup_steps + 1))
    return lambda count: rate(jnp.asarray(count) + 1)


def _cosine(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Half a cosine from the end of the warm-up to the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.peak_lr,
        warmup_steps=cfg.warmup_steps,
        decay_steps=steps,
        end_value=cfg.peak_lr * cfg.decay_ratio,
    )


def _warmup_stable_decay(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The peak, and over the last steps a line (arXiv:2405.18392, section 3)."""
    after_warmup = steps - cfg.warmup_steps
    falling = min(max(round(cfg.decay_share * steps), 1), after_warmup)
    decay = optax.linear_schedule(
        init_value=cfg.peak_lr,
        end_value=cfg.peak_lr * cfg.decay_ratio,
        transition_steps=falling,
        transition_begin=after_warmup - falling,
    )
    warmup = optax.linear_schedule(0.0, cfg.peak_lr, cfg.warmup_steps)
    return optax.join_schedules([warmup, decay], [cfg.warmup_steps])


def is_decayed(params: Any) -> Any:
    """True for matrices, by name: a stack gives a norm's scale two axes as well."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv:1711.05101), then rates of groups.

    It is of the parameters that are trained. Groups with a `clips` of their own are
    clipped by their own norms.
    """
    clip, adamw = optax.clip_by_global_norm(cfg.clip_norm), _adamw(cfg, steps)
    if cfg.clips:
        clipped = by_own_norm(cfg.clip_norm, by_group(cfg.clips))
        clip = _then(optax.identity(), clipped)
    if cfg.rates:
        adamw = _then(adamw, lambda x: multiplied(x, by_group(cfg.rates)))
    return optax.chain(clip, adamw)


def _adamw(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    rate = learning_rate(cfg, steps)
    if not cfg.decays:
        return optax.adamw(
            rate,
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=is_decayed,
        )
    decays = dict.fromkeys(GROUPS, cfg.weight_decay) | by_group(cfg.decays)

    def decay(updates: Any, state: Any, params: Any = None):
        return jax.tree.map(jnp.add, updates, multiplied(params, decays)), state

    decayed = optax.GradientTransformation(lambda _: optax.EmptyState(), decay)
    return optax.chain(
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.masked(decayed, is_decayed),
        optax.scale_by_learning_rate(rate),
    )


def _then(
    inner: optax.GradientTransformation, function: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """A function of the updates after a transformation, whose state stays as it is.

    So checkpoints hold the same tree with and without it.
    """

    def update(updates: Any, state: Any, params: Any = None):
        updates, state = inner.update(updates, state, params)
        return function(updates), state

    return optax.GradientTransformation(inner.init, update)
