"""Weights over time, gradients and masks of the heads: what they do to head 1.

Expected of models this small (arXiv:2505.22757, arXiv:2605.28184, arXiv:2608.00434):
four heads cost head 1 quality, a reverse curriculum does not but leaves no drafts, a
forward one lies between, and balances and masks make the cost smaller. All arms have
equal parameters, so the one head of `one head` is twice as deep as head 1 of the
others; `detached` is the control of that: the same path, taught by its loss alone.
"""

import dataclasses
from typing import Any

from mtp_jax.config import Config
from mtp_jax.eval.heldout import evaluate
from mtp_jax.run.gradients import mean_cosines
from mtp_jax.studies.study import (
    Claim,
    Figures,
    Size,
    Study,
    Trial,
    difference,
    figure_of,
)
from mtp_jax.studies.training import byte_model, trained

# Fields of config.loss of each arm; those of one head have one.
_ARMS: dict[str, dict[str, Any]] = {
    "static": {"gradient_meter": True},
    "one head": {},
    "gamma .6": {"head_decay": 0.6},
    "two-phase": {"schedule": ("two_phase", 0.3, 0.1, 0.676)},
    "forward": {"schedule": ("forward",)},
    "reverse": {"schedule": ("reverse",)},
    "extra targets": {},
    "detached": {"trunk_gradient": (1, 0, 0, 0)},
    "occ": {"balance": "occ"},
    "encodec": {"balance": "encodec"},
    "pcgrad": {"balance": "pcgrad"},
    "entropy mask": {"mask": "entropy"},
}
_QUICK = ("static", "one head", "forward", "reverse", "detached", "occ")
_ONE_HEAD = ("one head", "extra targets")
_HELD_OUT: dict[Size, int | None] = {"tiny": 2, "quick": 64, "full": None}


def config_of(trial: Trial) -> Config:
    """The run of a trial."""
    cfg = byte_model(trial)
    loss = dict(_ARMS[trial.arm])
    if trial.arm == "extra targets":
        loss["extra_targets"] = _fading(cfg.train.steps)
    if trial.arm in _ONE_HEAD:
        cfg = dataclasses.replace(
            cfg, model=dataclasses.replace(cfg.model, n_future_tokens=1)
        )
    return dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, **loss))


def measure(trial: Trial) -> Figures:
    """Bits per byte of head 1, accepted lengths, and cosines where they are logged."""
    restored = trained(trial, config_of(trial))
    found = evaluate(restored, max_batches=_HELD_OUT[trial.size])
    cosines = mean_cosines(trial.folder)
    return {
        "bits_per_byte": found["bits_per_byte"],
        "accepted": found["accept"]["length"],
        "accepted_sampled": found["accept"].get("sampled_length", 1.0),
        **{f"cosine_{i}": mean for i, (mean, _, _) in cosines.items()},
    }


def _fading(steps: int) -> tuple[tuple[float, ...], ...]:
    """Targets after the next of one head, which go in thirds of the run.

    Weights 1/2 and 1/4, the farther one gone after a third, the nearer one after two
    (modded-nanogpt's speed run of November 2025).
    """
    first, second = max(steps // 3, 1), max(2 * steps // 3, 2)
    return ((0, 0.5, 0.25), (first, 0.5, 0.0), (second, 0.0, 0.0))


_BITS = "bits_per_byte"
STUDY = Study(
    about="Head 1 on held-out text, in bits per byte; `accepted`: tokens a pass on "
    "true text, greedy, and at temperature 1; `cosine_i`: of head i's gradient into "
    "the trunk with head 1's, mean of the second half of training.",
    arms=lambda size: _QUICK if size == "quick" else tuple(_ARMS),
    measure=measure,
    shown=(
        *(_BITS, "accepted", "accepted_sampled"),
        *("cosine_2", "cosine_3", "cosine_4"),
    ),
    base="static",
    claims=(
        Claim(
            says="four heads cost head 1 quality at this size, equal parameters",
            of=difference("static", "one head", _BITS),
            side="above",
        ),
        Claim(
            says="what heads 2 to 4 teach the trunk helps head 1: static to detached",
            of=difference("static", "detached", _BITS),
            side="below",
        ),
        Claim(
            says="a reverse curriculum is better for head 1 than static weights",
            of=difference("reverse", "static", _BITS),
            side="below",
        ),
        Claim(
            says="a reverse curriculum costs head 1 at most .02 bits to one head",
            of=difference("reverse", "one head", _BITS),
            side="below",
            than=0.02,
        ),
        Claim(
            says="a forward curriculum is better for head 1 than static weights",
            of=difference("forward", "static", _BITS),
            side="below",
        ),
        Claim(
            says="a reverse curriculum leaves no drafts: below 1.2 tokens a pass",
            of=figure_of("reverse", "accepted"),
            side="below",
            than=1.2,
        ),
        Claim(
            says="extra targets of one head are better than none",
            of=difference("extra targets", "one head", _BITS),
            side="below",
        ),
        *(
            Claim(
                says=f"{arm} is better for head 1 than static weights",
                of=difference(arm, "static", _BITS),
                side="below",
            )
            for arm in ("gamma .6", "two-phase", "occ", "encodec", "pcgrad")
        ),
        Claim(
            says="the entropy mask is better for head 1 than static weights",
            of=difference("entropy mask", "static", _BITS),
            side="below",
        ),
    ),
)
