"""Heads of every kind at nearly equal parameters: quality of head 1, and drafts.

Expected: all within noise in head 1's loss; accepted lengths of serial heads, repeated
ones and those with a bias by the token before above causal, parallel and deeper ones,
those above linear and residual ones (arXiv:2404.19737, table S4; arXiv:2412.19437).
"""

import dataclasses
import json
from typing import Any

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, HeadsConfig, config_from_json
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generation import totals
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.eval.heldout import evaluate
from mtp_jax.model.flops import train_flops_per_token
from mtp_jax.model.sizes import sizes_of
from mtp_jax.studies.study import (
    Claim,
    Figures,
    Size,
    Study,
    Trial,
    difference,
    distance,
    quotient,
)
from mtp_jax.studies.training import byte_model, trained

KINDS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "parallel, 2 layers": {"layers": 2},
    "parallel, bias": {"markov_rank": 64},
    "parallel, own tables": {"unembedding": "own"},
    "linear": {"kind": "linear"},
    "residual": {"kind": "residual"},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal"},
    "serial": {"kind": "serial"},
    "repeated": {"kind": "serial", "shared": True},
}
_QUICK = ("parallel", "parallel, bias", "linear", "causal", "serial")
_MORE = ("parallel, 2 layers", "parallel, own tables")
_USUAL = tuple(kind for kind in KINDS if kind not in _MORE)
# Held-out batches (None: all), prompts, new tokens of each.
_MEASURED: dict[Size, tuple[int | None, int, int]] = {
    "tiny": (2, 2, 8),
    "quick": (64, 8, 64),
    "full": (None, 32, 256),
}


def config_of(trial: Trial) -> Config:
    """The run of a trial, its trunk so deep that parameters are most nearly equal."""
    cfg = byte_model(trial)
    heads, n = HeadsConfig(**KINDS[trial.arm]), cfg.model.n_future_tokens
    counted = heads.counted_layers(n)
    models = [
        dataclasses.replace(cfg.model, num_layers=counted + trunk, heads=heads)
        for trunk in range(1, cfg.model.num_layers + 1)
    ]
    aim = sizes_of(cfg.model).total
    model = min(models, key=lambda model: abs(sizes_of(model).total - aim))
    return dataclasses.replace(cfg, model=model)


def measure(trial: Trial) -> Figures:
    """Bits per byte of head 1, tokens a pass on true text and on the model's own."""
    cfg = config_of(trial)
    figures = _earlier(trial, cfg) or _measured(trial, trained(trial, cfg))
    return figures | {
        "parameters_m": sizes_of(cfg.model).total / 1e6,
        "train_mflops": train_flops_per_token(cfg) / 1e6,
    }


def _measured(trial: Trial, restored: Restored) -> Figures:
    batches, count, new_tokens = _MEASURED[trial.size]
    held_out = evaluate(restored, max_batches=batches)
    data = restored.config.data
    prompts = heldout_prompts(data.sources, count, min(64, data.seq_len // 2))
    generator = Generator.from_restored(restored)

    def tokens_a_pass(decoder: str, temperature: float) -> float:
        results = generator.generate(
            prompts,
            max_new_tokens=new_tokens,
            decoder=decoder,
            sampling=Sampling(temperature=temperature, seed=trial.seed),
        )
        return totals(results).tokens_per_forward

    return {
        "bits_per_byte": held_out["bits_per_byte"],
        "agree": held_out["accept"]["length"],
        "greedy": tokens_a_pass("blockwise", 0.0),
        "sampled": tokens_a_pass("speculative", 1.0),
    }


def _earlier(trial: Trial, cfg: Config) -> Figures | None:
    """Figures of a full trial that the benchmark before this study has left.

    Raises:
      UserError: they are of another run than this trial's.
    """
    file = trial.folder / "study.json"
    if trial.size != "full" or not file.exists():
        return None
    figures = json.loads(file.read_text(encoding="utf-8"))
    run = json.loads((trial.folder / "run.json").read_text(encoding="utf-8"))
    before = config_from_json(run["config"], str(trial.folder / "run.json"))
    if (before.model, before.optim, before.loss) != (
        cfg.model,
        cfg.optim,
        cfg.loss,
    ) or (before.train.steps != cfg.train.steps or before.train.seed != trial.seed):
        raise UserError(
            f"{file} is of another run than {trial.arm}, seed {trial.seed}; give "
            "another folder, or the --steps of that run."
        )
    return {name: float(figures[name]) for name in _SHOWN[:4]}


_SHOWN = ("bits_per_byte", "agree", "greedy", "sampled", "parameters_m", "train_mflops")
STUDY = Study(
    about="`bits_per_byte`: head 1 on held-out text; `agree`: length on which heads "
    "agree with head 1 on true text; `greedy`, `sampled`: tokens a pass of drafting on "
    "held-out prompts, blockwise, and speculative at temperature 1; parameters, and "
    "FLOPs of training a token, in millions.",
    arms=lambda size: _QUICK if size == "quick" else _USUAL,
    more_arms=_MORE,
    measure=measure,
    shown=_SHOWN,
    base="parallel",
    claims=(
        Claim(
            says="a bias by the token before lengthens greedy drafts by 5 % or more",
            of=quotient("parallel, bias", "parallel", "greedy"),
            side="above",
            than=1.05,
        ),
        Claim(
            says="serial drafts are at least .95 as long as those with a bias",
            of=quotient("serial", "parallel, bias", "greedy"),
            side="above",
            than=0.95,
        ),
        Claim(
            says="serial drafts are at most 1.15 times as long as those with a bias",
            of=quotient("serial", "parallel, bias", "greedy"),
            side="below",
            than=1.15,
        ),
        Claim(
            says="causal drafts are longer than parallel ones",
            of=difference("causal", "parallel", "greedy"),
            side="above",
        ),
        Claim(
            says="linear drafts are shorter than parallel ones",
            of=difference("linear", "parallel", "greedy"),
            side="below",
        ),
        *(
            Claim(
                says=f"head 1 beside {kind} heads is within .03 bits of parallel's",
                of=distance(kind, "parallel", "bits_per_byte"),
                side="below",
                than=0.03,
            )
            for kind in ("linear", "residual", "causal", "anticausal", "serial")
        ),
    ),
)
