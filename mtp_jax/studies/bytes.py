"""One, four and eight heads on bytes of text: quality of head 1, drafts, speed.

The paper's 7B byte model gains from eight heads and decodes 6.4 times as fast
(arXiv:2404.19737, section 3.3). Expected of one 10,000 times smaller: worse bits per
byte, as its size is far below where gains begin, and 2.5 to 3.5 tokens a pass.
"""

import dataclasses
from typing import Any

from mtp_jax.config import Config
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generation import totals
from mtp_jax.decode.generator import Generator
from mtp_jax.eval.heldout import evaluate
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

_LAYERS = 12
# Heads; fields of config.loss and config.heads.
_ARMS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "n=1": (1, {}, {}),
    "n=4": (4, {}, {}),
    "n=8": (8, {}, {}),
    "n=8, reverse": (8, {"schedule": ("reverse",)}, {}),
    "n=8, bias": (8, {}, {"markov_rank": 64}),
}
_QUICK = ("n=1", "n=4", "n=8")
# Held-out batches (None: all), prompts, new tokens of each.
_MEASURED: dict[Size, tuple[int | None, int, int]] = {
    "tiny": (2, 2, 8),
    "quick": (64, 4, 64),
    "full": (None, 16, 256),
}


def config_of(trial: Trial) -> Config:
    """The run of a trial: twelve layers, heads among them."""
    n, loss, heads = _ARMS[trial.arm]
    cfg = byte_model(trial)
    model = dataclasses.replace(
        cfg.model,
        num_layers=_LAYERS,
        n_future_tokens=n,
        heads=dataclasses.replace(cfg.model.heads, **heads),
    )
    return dataclasses.replace(
        cfg, model=model, loss=dataclasses.replace(cfg.loss, **loss)
    )


def measure(trial: Trial) -> Figures:
    """Bits per byte of head 1, tokens a pass, and decoding speed to that of head 1."""
    restored = trained(trial, config_of(trial))
    batches, count, new_tokens = _MEASURED[trial.size]
    found = evaluate(restored, max_batches=batches)
    prompts = heldout_prompts(restored.config.data.sources, count, 64)
    generator = Generator.from_restored(restored)

    def decoded(decoder: str, temperature: float = 0.0) -> tuple[float, float]:
        """Tokens a pass and tokens a second, of one text at a time."""
        sampling = Sampling(temperature=temperature, seed=trial.seed)
        results = totals(
            generator.generate(
                prompts,
                max_new_tokens=new_tokens,
                batch_size=1,
                decoder=decoder,
                sampling=sampling,
            )
        )
        return results.tokens_per_forward, results.tokens_per_s

    several = restored.config.model.n_future_tokens > 1
    _, plain = decoded("plain")
    greedy, drafted = decoded("blockwise") if several else (1.0, plain)
    sampled, _ = decoded("speculative", 1.0) if several else (1.0, plain)
    return {
        "bits_per_byte": found["bits_per_byte"],
        "greedy": greedy,
        "sampled": sampled,
        "speed_up": drafted / plain,
        "accuracy": [head["accuracy"] for head in found["heads"]],
    }


STUDY = Study(
    about="`bits_per_byte`: head 1 on held-out text; `greedy`, `sampled`: tokens a "
    "pass of drafting, blockwise, and speculative at temperature 1; "
    "`speed_up`: of blockwise decoding to plain, one text at a time, on this "
    "machine (a time, so no run gives it twice).",
    arms=lambda size: _QUICK if size == "quick" else tuple(_ARMS),
    measure=measure,
    shown=("bits_per_byte", "greedy", "sampled", "speed_up"),
    base="n=1",
    claims=(
        *(
            Claim(
                says=f"{arm} has fewer bits per byte than one head",
                of=difference(arm, "n=1", "bits_per_byte"),
                side="below",
            )
            for arm in ("n=4", "n=8", "n=8, reverse")
        ),
        Claim(
            says="eight heads draft 2.5 tokens a pass or more",
            of=figure_of("n=8", "greedy"),
            side="above",
            than=2.5,
        ),
        Claim(
            says="eight heads draft more than four",
            of=difference("n=8", "n=4", "greedy"),
            side="above",
        ),
        Claim(
            says="a bias by the token before lengthens drafts",
            of=difference("n=8, bias", "n=8", "greedy"),
            side="above",
        ),
    ),
)
