"""Decoders side by side, in one run on the same prompts."""

import functools
from collections.abc import Sequence
from typing import Any

from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.generation import Generation, Totals, totals
from mtp_jax.decode.generator import Generator

_REPEATS = 2  # timed runs of each; the fastest counts

_ROW = "{:<{widest}} {:<8}{:>10}{:>16}{:>12}{:>8}{:>12}  {}"


def compare(
    generator: Generator,
    decoders: dict[str, Decoder],
    prompts: Sequence[Any],
    sampling: Sampling,
    settings: dict[str, Any],
) -> int:
    """Prints a line a decoder.

    Args:
      generator: the model.
      decoders: by name; plain is among them.
      prompts: at least one.
      sampling: the law of the next token.
      settings: other arguments of `Generator.generate`.

    Returns:
      1 if greedy texts of a decoder that claims to be exact are not those of plain.
    """
    row = functools.partial(_ROW.format, widest=max(11, *map(len, decoders)))
    print(row("decoder", "kind", "forwards", "tokens/forward", "tokens/s", "ratio",
               "equal", "accepted by head"))  # fmt: skip
    greedy = sampling.temperature == 0
    reference: list[str] = []
    plain_speed, differs = 0.0, False
    for name in ["plain", *(name for name in decoders if name != "plain")]:
        decoder = decoders[name]
        if not greedy and getattr(decoder, "draws_nothing", False):
            print(f"{name} left out: it draws nothing, and temperature is above 0")
            continue
        runs = [
            generator.generate(prompts, decoder=decoder, sampling=sampling, **settings)
            for _ in range(_REPEATS)
        ]
        results = min(runs, key=lambda run: totals(run).seconds)
        figures = totals(results)
        texts = [r.text for r in results]
        reference, plain_speed = reference or texts, plain_speed or figures.tokens_per_s
        equal = sum(a == b for a, b in zip(texts, reference, strict=True))
        differs |= greedy and not decoder.lossy and equal < len(texts)
        print(
            row(
                name,
                _kind(decoder, results, figures),
                figures.forwards,
                f"{figures.tokens_per_forward:.2f}",
                f"{figures.tokens_per_s:.1f}",
                f"{figures.tokens_per_s / plain_speed:.2f}",
                f"{equal} of {len(texts)}" if greedy else "-",
                " ".join(f"{share:.2f}" for share in figures.accepted_by_head),
            ),
            flush=True,
        )
    return 1 if differs else 0


def _kind(decoder: Decoder, results: Sequence[Generation], figures: Totals) -> str:
    """Exact, or the share of tokens that are not the exact choice."""
    if not decoder.lossy:
        return "exact"
    deviations = sum(r.deviations or 0 for r in results)
    return f"-{100 * deviations / figures.tokens:.1f}%"
