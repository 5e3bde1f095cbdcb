"""The optimizer, and what it does to groups of parameters."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require, require_at_least

Schedule = Literal["cosine", "wsd"]
# A group of parameters and its number.
ByGroup = tuple[tuple[str | float, ...], ...]
GROUPS = ("trunk", "heads", "unembedding", "embedding", "norms", "lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the defaults are the paper's (arXiv:2404.19737, table S13).

    schedule, after the warm-up: cosine falls from the peak to the last step, so more
    steps are another curve from the first one on; wsd (warm-up, stable, decay,
    arXiv:2405.18392) stays at the peak, and falls linearly over the last decay_share of
    the steps: before those, a run can be given more steps, and nothing else changes.

    Groups of parameters: trunk and heads, each with the norms of its layers; embedding;
    unembedding, of heads too, and a Markov bias with it (a tied one is the embedding);
    norms, the last norms of the heads; lora, low-rank updates of a frozen trunk's
    matrices, if lora_rank is above 0 (arXiv:2106.09685).
    """

    peak_lr: float = 3e-4  # the learning rate at the end of the warm-up
    warmup_steps: int = 2000  # from 0 to peak_lr
    schedule: Schedule = "cosine"  # or wsd
    decay_share: float = 0.1  # of all steps, at the end; of wsd
    decay_ratio: float = 0.03  # the schedule ends at decay_ratio x peak_lr
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares
    eps: float = 1e-8  # added to the root of that mean
    weight_decay: float = 0.1  # on matrices (parameters named w_*), not on norms
    clip_norm: float = 1.0  # of the global gradient norm
    rates: ByGroup = ()  # factors of a group's updates, as (("heads", 10),)
    decays: ByGroup = ()  # a group's own weight_decay, likewise
    clips: ByGroup = ()  # a group's own clip_norm; it leaves the global norm
    frozen: tuple[str, ...] = ()  # groups that are not trained, and have no moments
    lora_rank: int = 0  # of updates of a frozen trunk; 0: none
    lora_alpha: float = 16.0  # they count lora_alpha / lora_rank

    def __post_init__(self):
        require_at_least(
            "optim",
            0,
            peak_lr=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_ratio=self.decay_ratio,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        require(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            "config.optim.b1 and config.optim.b2 must be in [0, 1).",
        )
        require(
            0 < self.decay_share <= 1,
            f"config.optim.decay_share is {self.decay_share}; it must be above 0 and "
            "at most 1.",
        )
        require(self.clip_norm > 0, "config.optim.clip_norm must be above 0.")
        for name in ("rates", "decays", "clips"):
            _check_groups(name, getattr(self, name))
        require(
            all(clip > 0 for clip in by_group(self.clips).values()),
            "config.optim.clips must be above 0.",
        )
        for group in self.frozen:
            _check_group("frozen", group)
        self._check_lora()
        require(
            not set(GROUPS) - {"lora"} <= set(self.frozen) or self.lora_rank > 0,
            "config.optim.frozen has every group; leave one to train.",
        )

    def _check_lora(self) -> None:
        require_at_least("optim", 0, lora_rank=self.lora_rank)
        require(self.lora_alpha > 0, "config.optim.lora_alpha must be above 0.")
        require(
            not self.lora_rank or "trunk" in self.frozen,
            "config.optim.lora_rank is above 0, which trains updates of a frozen "
            'trunk; put "trunk" into config.optim.frozen.',
        )
        require(
            "lora" not in self.frozen,
            "config.optim.frozen has lora; set config.optim.lora_rank=0 instead.",
        )


def by_group(pairs: ByGroup) -> dict[str, float]:
    """A field of groups and numbers as a dict."""
    return {str(group): float(value) for group, value in pairs}


def _check_groups(name: str, pairs: ByGroup) -> None:
    for pair in pairs:
        ok = (
            len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], int | float)
        )
        require(
            ok,
            f"config.optim.{name} has {pair!r}; give pairs of a group and a number, as "
            '(("heads", 10),).',
        )
        _check_group(name, str(pair[0]))
        require(
            float(pair[1]) >= 0,
            f"config.optim.{name} has {pair[1]} for {pair[0]}; it must be 0 or more.",
        )
    groups = [pair[0] for pair in pairs]
    require(
        len(groups) == len(set(groups)),
        f"config.optim.{name} names a group twice: {groups}.",
    )


def _check_group(name: str, group: str) -> None:
    require(
        group in GROUPS,
        f"config.optim.{name} names {group!r}; groups are {', '.join(GROUPS)}.",
    )
