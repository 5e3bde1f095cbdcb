"""Heads for a finished model: where they begin, what is trained, what they are taught.

A model of one head is trained first, one a seed, and all arms grow it to four heads.
Expected: a copy of the last layer is a worse start than silence, as it says the token
before the one that is asked for; a map by ridge regression is the best, and worth
something for the first steps only; a loss of total variation lengthens drafts that are
drawn, not greedy ones. Heads that come later buy speed, not quality
(arXiv:2404.19737, table S6), and are worse drafters than those of a model that had them
from the start (section 3.2).
"""

import dataclasses
import fcntl
import os
import pathlib

import jax
from etils import epath

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, freeze
from mtp_jax.config.init import HeadStart
from mtp_jax.config.loss import LossKind
from mtp_jax.config.regrow import grown_tree
from mtp_jax.data.batches import open_sources
from mtp_jax.eval.heldout import evaluate
from mtp_jax.growth.grow import initial_params
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.run.log_columns import read_log
from mtp_jax.studies.study import (
    Claim,
    Figures,
    Size,
    Study,
    Trial,
    difference,
    distance,
)
from mtp_jax.studies.training import byte_model, python_text, trained, with_seed

_N = 4
_TABLES = ("trunk", "embedding", "unembedding")


@dataclasses.dataclass(frozen=True)
class _Arm:
    start: HeadStart | None  # of heads 2 to 4; None: they are there from the start
    n: int = _N
    trains: str = "heads"  # or lora, updates of the trunk of low rank, too; or all
    loss: LossKind = "hard"


_ARMS = {
    "ridge, frozen": _Arm("ridge"),
    "random, frozen": _Arm("random"),
    "copy, frozen": _Arm("copy"),
    "unigram, frozen": _Arm("unigram"),
    "ridge, lora": _Arm("ridge", trains="lora"),
    "ridge, joint": _Arm("ridge", trains="all"),
    "random, joint": _Arm("random", trains="all"),
    "ridge, frozen, kl": _Arm("ridge", loss="kl"),
    "ridge, frozen, tv": _Arm("ridge", loss="tv"),
    "one head": _Arm("random", n=1, trains="all"),
    "from the start": _Arm(None, trains="all"),
}
_QUICK = ("ridge, frozen", "random, frozen", "copy, frozen", "ridge, joint", "one head")
_STEPS: dict[Size, int] = {"tiny": 2, "quick": 150, "full": 1500}
_FIT_TOKENS: dict[Size, int] = {"tiny": 1024, "quick": 32_768, "full": 65_536}
_HELD_OUT: dict[Size, int | None] = {"tiny": 2, "quick": 64, "full": 256}


def base_config(trial: Trial) -> Config:
    """The run of the model that is grown: six layers, one head."""
    cfg = byte_model(dataclasses.replace(trial, steps=None))
    model = dataclasses.replace(cfg.model, n_future_tokens=1)
    return dataclasses.replace(cfg, model=model)


def config_of(trial: Trial, base: str | os.PathLike[str]) -> Config:
    """The run of a trial, of the workdir of the model that is grown.

    A rank of 1 of the bias by the token before is in all arms: it can hold the
    frequencies of tokens, which one of the starts needs.
    """
    arm, steps = _ARMS[trial.arm], trial.steps or _STEPS[trial.size]
    c = grown_tree(base, arm.n, **({"markov_rank": 1} if arm.n > 1 else {}))
    if arm.start is None:
        c.init.workdir = ""
        c.train.steps += steps
        return freeze(c)
    c.init.update(start=arm.start, fit_tokens=_FIT_TOKENS[trial.size])
    c.train.steps = steps
    c.optim.warmup_steps = min(20, steps)
    c.eval.update(every=early(steps), batches=32, sample_tokens=0)
    c.loss.kind = arm.loss
    if arm.trains == "all":
        c.optim.peak_lr = 5e-4
        c.optim.rates = (("heads", 10.0),) if arm.n > 1 else ()
        c.loss.trunk_gradient = (1.0,) + (0.1,) * (arm.n - 1) if arm.n > 1 else ()
        return freeze(c)
    c.optim.decays = (("heads", 0.0), ("norms", 0.0))
    c.optim.frozen = _TABLES
    if arm.trains == "lora":
        c.optim.update(peak_lr=2e-3, lora_rank=8, lora_alpha=8.0)
    else:
        # Head 1 has no loss, and so no gradient.
        c.loss.head_weights = (0.0,) + (1.0,) * (arm.n - 1)
    return freeze(c)


def early(steps: int) -> int:
    """The step at which arms are compared before the end: a tenth of all."""
    return max(steps // 10, 1)


def _base(trial: Trial) -> pathlib.Path:
    """The workdir of the model that all arms of a seed grow, trained once.

    Other processes, with other arms, wait for it.
    """
    folder = trial.shared / f"base-seed{trial.seed}"
    done = trial.shared / f"base-seed{trial.seed}.done"
    with (trial.shared / f"base-seed{trial.seed}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            trained(dataclasses.replace(trial, folder=folder), base_config(trial))
            done.touch()
    return folder


def measure(trial: Trial) -> Figures:
    """Loss of heads 2 to 4 at the start, accepted lengths early and late, head 1."""
    python_text(trial)
    base = _base(trial)
    cfg = config_of(trial, base)
    # Text in another order than that of the model before.
    told = dataclasses.replace(trial, seed=trial.seed + 1000)

    def measured(model: Restored | pathlib.Path) -> Figures:
        return evaluate(model, max_batches=_HELD_OUT[trial.size])

    before, found = measured(base), measured(trained(told, cfg))
    figures = {
        "bits_per_byte": found["bits_per_byte"],
        "less_before": found["bits_per_byte"] - before["bits_per_byte"],
        "accepted": found["accept"]["length"],
        "accepted_sampled": found["accept"].get("sampled_length", 1.0),
    }
    if cfg.init.workdir and cfg.model.n_future_tokens > 1:
        heads = measured(_started(cfg, told.seed))["heads"]
        figures["start_losses"] = [head["loss"] for head in heads[1:]]
        figures["start_loss"] = sum(figures["start_losses"]) / (_N - 1)
        curve = _curve(trial.folder)
        figures["accepted_early"] = curve[early(cfg.train.steps)]
        figures["accepted_by_step"] = list(curve.items())
    return figures


def _curve(workdir: pathlib.Path) -> dict[int, float]:
    """Accepted length by step, as the run has logged it."""
    log = read_log(epath.Path(workdir) / "heldout.jsonl")
    lengths = log.column("accept/length")
    return {int(step): float(x) for step, x in zip(log.step, lengths, strict=True)}


def _started(cfg: Config, seed: int) -> Restored:
    """The model with which a run begins."""
    cfg = with_seed(cfg, seed)
    mesh = make_mesh(cfg.mesh, jax.devices())
    corpora = open_sources(cfg, splits=["train"])
    params = initial_params(cfg, mesh, corpora)
    return Restored(cfg, params, mesh, 0, corpora[0].tokenizer)


_BITS, _SAMPLED = "bits_per_byte", "accepted_sampled"
STUDY = Study(
    about="A model of one head, grown to four. `start_loss`: of heads 2 to 4, nats a "
    "byte of held-out text, before the first step; `accepted_early`, `accepted`: "
    "tokens a pass on true text, greedy, after a tenth of the steps and all of them; "
    "`accepted_sampled`: at temperature 1; head 1 in `bits_per_byte`, and "
    "`less_before`, those of the model that was grown.",
    arms=lambda size: _QUICK if size == "quick" else tuple(_ARMS),
    measure=measure,
    shown=(
        *("accepted", "accepted_early", _SAMPLED),
        *("start_loss", _BITS, "less_before"),
    ),
    base="random, frozen",
    claims=(
        Claim(
            says="a copy of the last layer is a worse start than the law of tokens",
            of=difference("copy, frozen", "unigram, frozen", "start_loss"),
            side="above",
        ),
        Claim(
            says="a map by ridge regression is a better start than the law of tokens",
            of=difference("ridge, frozen", "unigram, frozen", "start_loss"),
            side="below",
        ),
        Claim(
            says="after a tenth of the steps it drafts longer than a random start",
            of=difference("ridge, frozen", "random, frozen", "accepted_early"),
            side="above",
        ),
        Claim(
            says="at the end the two are within .05 tokens a pass",
            of=distance("ridge, frozen", "random, frozen", "accepted"),
            side="below",
            than=0.05,
        ),
        Claim(
            says="at the end a copy is within .05 tokens a pass of a random start",
            of=distance("copy, frozen", "random, frozen", "accepted"),
            side="below",
            than=0.05,
        ),
        Claim(
            says="frozen, head 1 stays as it was: to 1e-6 bits",
            of=lambda arms: abs(arms["ridge, frozen"]["less_before"]),
            side="below",
            than=1e-6,
        ),
        Claim(
            says="heads and trunk together draft longer than heads alone",
            of=difference("ridge, joint", "ridge, frozen", "accepted"),
            side="above",
        ),
        Claim(
            says="low-rank updates of the trunk draft longer than heads alone",
            of=difference("ridge, lora", "ridge, frozen", "accepted"),
            side="above",
        ),
        Claim(
            says="heads that come later make head 1 better than going on without",
            of=difference("ridge, joint", "one head", _BITS),
            side="below",
        ),
        Claim(
            says="heads from the start draft longer than those on a frozen model",
            of=difference("from the start", "ridge, frozen", "accepted"),
            side="above",
        ),
        Claim(
            says="a loss of total variation lengthens drafts that are drawn",
            of=difference("ridge, frozen, tv", "ridge, frozen", _SAMPLED),
            side="above",
        ),
        Claim(
            says="and greedy ones by no more than .05 tokens a pass",
            of=difference("ridge, frozen, tv", "ridge, frozen", "accepted"),
            side="below",
            than=0.05,
        ),
        Claim(
            says="head 1's law as the target lengthens drafts that are drawn",
            of=difference("ridge, frozen, kl", "ridge, frozen", _SAMPLED),
            side="above",
        ),
    ),
)
