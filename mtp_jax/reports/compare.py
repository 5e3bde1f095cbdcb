"""Decoders side by side, in one run on the same prompts."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.generation import Generation, Totals, totals
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.prompt_list import as_prompts

_REPEATS = 5  # timed runs of each, after one that is not counted; the median counts
_ENOUGH_S = 10.0  # after which there are no more
_ROW = "{:<{widest}} {:<8}{:>10}{:>16}{:>12}{:>8}{:>8}{:>12}  {}"
_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A decoder's texts and figures, beside those of plain decoding."""

    results: list[Generation]  # of the run of median speed
    figures: Totals
    speedup: float  # tokens a second over those of plain
    spread: float  # (fastest - slowest run) / twice the median, by tokens a second
    equal: int | None  # texts that are those of plain; None: sampled, so not compared
    lossy: bool

    @property
    def differs(self) -> bool:
        """True if a decoder that claims to be exact has another greedy text."""
        compared = self.equal is not None and not self.lossy
        return compared and self.equal != len(self.results)

    @property
    def kind(self) -> str:
        """Returns exact, or less the share of tokens that are not the exact choice."""
        if not self.lossy:
            return "exact"
        share = 100 * self.deviations / self.figures.tokens
        if self.deviations and share < 0.1:
            return "-<0.1%"
        return f"-{share:.1f}%" if self.deviations else "0.0%"

    @property
    def deviations(self) -> int:
        """Tokens that are not the exact choice; 0 for exact decoders."""
        return sum(r.deviations or 0 for r in self.results)


def compare(
    generator: Generator,
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Any],
    *,
    sampling: Sampling = _GREEDY,
    **settings: Any,
) -> Iterator[tuple[str, Comparison | str]]:
    """Yields the name and the figures of each decoder, plain's first.

    Args:
      generator: the model.
      decoders: by name; plain is run in any case.
      prompts: at least one, as `Generator.generate` takes them.
      sampling: the distribution of the next token.
      settings: other arguments of `Generator.generate`; max_new_tokens is one.

    Returns:
      An iterator of names and figures; a text instead says why a decoder is left out.
    """
    prompts, greedy = as_prompts(prompts), sampling.greedy
    reference: list[str] = []
    plain_speed = 0.0
    for name, decoder in {"plain": Plain(), **decoders}.items():
        if not greedy and getattr(decoder, "draws_nothing", False):
            yield name, "it draws nothing, and temperature is above 0"
            continue

        def run(decoder: Decoder = decoder) -> list[Generation]:
            return generator.generate(
                prompts, decoder=decoder, sampling=sampling, **settings
            )

        results, spread = _measured(run)
        figures = totals(results)
        texts = [r.text for r in results]
        reference, plain_speed = reference or texts, plain_speed or figures.tokens_per_s
        equal = sum(a == b for a, b in zip(texts, reference, strict=True))
        speedup = figures.tokens_per_s / plain_speed
        yield (
            name,
            Comparison(
                results,
                figures,
                speedup,
                spread,
                equal if greedy else None,
                decoder.lossy,
            ),
        )


def _measured(run: Callable[[], list[Generation]]) -> tuple[list[Generation], float]:
    """The run of median speed of several, and how far the others were from it.

    The first one is not counted: a machine takes longer for what it has not done yet.
    """
    run()
    began, runs = time.perf_counter(), [run()]
    while len(runs) < _REPEATS and time.perf_counter() - began < _ENOUGH_S:
        runs.append(run())
    speeds = [totals(results).tokens_per_s for results in runs]
    median = statistics.median_low(speeds)
    spread = (max(speeds) - min(speeds)) / (2 * median)
    return runs[speeds.index(median)], spread


def header(names: Mapping[str, Any]) -> str:
    """The first line of a table of the decoders of these names."""
    return _ROW.format("decoder", "kind", "forwards", "tokens/forward", "tokens/s",
                       "spread", "ratio", "equal", "accepted by head",
                       widest=_widest(names))  # fmt: skip


def line(name: str, found: Comparison | str, names: Mapping[str, Any]) -> str:
    """The line of a decoder in the table of the decoders of these names."""
    if isinstance(found, str):
        return f"{name} left out: {found}"
    figures = found.figures
    equal = "-" if found.equal is None else f"{found.equal} of {len(found.results)}"
    return _ROW.format(
        name,
        found.kind,
        figures.forwards,
        f"{figures.tokens_per_forward:.2f}",
        f"{figures.tokens_per_s:.1f}",
        f"{100 * found.spread:.0f}%",
        f"{found.speedup:.2f}",
        equal,
        " ".join(f"{share:.2f}" for share in figures.accepted_by_head),
        widest=_widest(names),
    )


def _widest(names: Mapping[str, Any]) -> int:
    return max([11, *map(len, names)])
