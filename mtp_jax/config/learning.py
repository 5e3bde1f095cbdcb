"""Runs that learn nothing are refused, and options told that change nothing learned."""

from collections.abc import Iterator
from typing import Any

from mtp_jax.config.checks import require
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.optim import OptimConfig, by_group
from mtp_jax.config.sections import Config


def groups_there(model: ModelConfig) -> list[str]:
    """The groups that the parameters of a model are of, without low-rank updates."""
    n, heads = model.n_future_tokens, model.heads
    there = {
        "trunk": model.num_trunk_layers > 0,
        "heads": heads.bodies(n) > 0,
        "unembedding": not model.tie_embeddings or (heads.markov_rank > 0 and n > 1),
        "embedding": True,
        "norms": True,
    }
    return [group for group, is_there in there.items() if is_there]


def check_learning(cfg: Config) -> None:
    """Refuses a run that trains nothing, or whose state no checkpoint can hold.

    Raises:
      UserError: all groups that the model has are frozen, or have a rate of 0, or no
        head has any weight; or heads take all layers.
    """
    loss, n, steps = cfg.loss, cfg.model.n_future_tokens, cfg.train.steps
    layers = cfg.model.num_layers
    require(
        cfg.model.num_trunk_layers > 0,  # Orbax writes no empty arrays
        f"config.model.num_layers is {layers}, and heads take them all; give "
        f"{layers + 1} or more, so that a trunk is below the heads.",
    )
    require(
        not all(loss.weightless(n, steps)) or bool(loss.extra_targets),
        "config.loss.head_weights and config.loss.schedule leave no head any weight at "
        "any step; give one of them a weight above 0.",
    )
    there, optim = groups_there(cfg.model), cfg.optim
    learning = [group for group in there if group not in optim.frozen]
    learning += ["lora"] * (optim.lora_rank > 0)
    require(
        bool(learning),
        f"config.optim.frozen has every group of this model ({', '.join(there)}); "
        "leave one to train.",
    )
    rates = by_group(optim.rates)
    require(
        any(rates.get(group, 1.0) > 0 for group in learning),
        "config.optim.rates are 0 for every group of this model that is not frozen "
        f"({', '.join(learning)}); give one of them a rate above 0.",
    )


def idle_options(cfg: Config) -> list[str]:
    """A line for each option that changes nothing that is learned, by the others."""
    n = cfg.model.n_future_tokens
    found = [*_of_loss(cfg.loss), *_of_groups(cfg), *_of_trunk(cfg)]
    if n == 1:
        found += _of_one_head(cfg.loss)
    return [
        f"config.{name} is {value}, and {why}: it changes nothing that is learned."
        for name, value, why in found
    ]


# The field, its value, and why it changes nothing.
_Idle = Iterator[tuple[str, Any, str]]


def _of_loss(loss: LossConfig) -> _Idle:
    if not loss.needs_teacher:
        yield from _set(loss, "with hard targets no teacher is asked", "teacher")
    if loss.kind == "hard":
        yield from _set(loss, "config.loss.kind is hard", "soft_mix")
    if not loss.averages_teacher:
        yield from _set(loss, "no mean over steps teaches", "teacher_decay")
    if loss.balance not in ("encodec", "occ"):
        why = f"config.loss.balance is {loss.balance}, which has no means"
        yield from _set(loss, why, "balance_decay")
    if loss.balance != "occ":
        why = "config.loss.balance is not occ"
        yield from _set(loss, why, "balance_budget", "balance_most")
    if loss.mask == "none":
        yield from _set(loss, "config.loss.mask is none", "mask_threshold")


def _set(section: LossConfig | OptimConfig, why: str, *names: str) -> _Idle:
    """Those of the fields that are set, and not as they usually are."""
    title = "loss" if isinstance(section, LossConfig) else "optim"
    for name in names:
        value = getattr(section, name)
        if value != getattr(type(section)(), name):
            yield f"{title}.{name}", value, why


def _of_one_head(loss: LossConfig) -> _Idle:
    why = "config.model.n_future_tokens is 1"
    yield from _set(loss, why, "head_decay", "acceptance")
    for name in ("schedule", "trunk_gradient"):
        value = getattr(loss, name)
        if value and isinstance(value[0], str):
            yield f"loss.{name}", value[0], f"{why}, which every name gives 1"


def _of_trunk(cfg: Config) -> _Idle:
    """Options of gradients into the trunk, where those train nothing."""
    loss, optim, n = cfg.loss, cfg.optim, cfg.model.n_future_tokens
    below = {"trunk", "embedding"} & set(groups_there(cfg.model))
    if below <= set(optim.frozen) and not optim.lora_rank:
        why = "nothing that the heads read is trained (config.optim.frozen)"
        if loss.balance != "none":
            yield "loss.balance", loss.balance, why
        if loss.trunk_gradient and cfg.heads.wiring.reads == "trunk":
            yield "loss.trunk_gradient", loss.trunk_gradient, why
    if loss.balance != "none" and all(loss.weightless(n, cfg.train.steps)[1:]):
        yield "loss.balance", loss.balance, "heads 2 to n have no weight at any step"


def _of_groups(cfg: Config) -> _Idle:
    optim, there = cfg.optim, groups_there(cfg.model)
    for name in ("rates", "decays", "clips"):
        for group, value in by_group(getattr(optim, name)).items():
            field = f"optim.{name} of {group}"
            if group == "lora" and not optim.lora_rank:
                yield field, value, "config.optim.lora_rank is 0"
            elif group != "lora" and group not in there:
                tied = cfg.model.tie_embeddings and group == "unembedding"
                own = ", which is its embedding" if tied else ""
                yield field, value, f"this model has no {group} of its own{own}"
            elif group in optim.frozen:
                yield field, value, f"config.optim.frozen has {group}"
    if not optim.lora_rank:
        yield from _set(optim, "config.optim.lora_rank is 0", "lora_alpha")
    if optim.schedule != "wsd":
        yield from _set(optim, "config.optim.schedule is not wsd", "decay_share")
