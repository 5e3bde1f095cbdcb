"""Lines about continuations, for people."""

from collections.abc import Sequence
from typing import Any

from mtp_jax.decode.generation import Generation, totals
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.prompt_list import as_prompts
from mtp_jax.errors import counted


def ending(result: Generation) -> str:
    """One line on how a continuation came about and why it ended."""
    return (
        f"[{counted(len(result.tokens), 'token')}, "
        f"{counted(result.forwards, 'forward pass')}, "
        f"{result.tokens_per_forward:.2f} tokens a pass, ended by {result.finish}]"
    )


def summary(decoder: str, results: Sequence[Generation]) -> str:
    """One line on the work and the speed of at least one continuation."""
    figures = totals(results)
    return (
        f"{decoder}: {counted(len(results), 'text')}, "
        f"{counted(figures.forwards, 'forward pass')}, "
        f"{figures.tokens_per_forward:.2f} tokens a pass, "
        f"{figures.tokens_per_s:.0f} tokens/s"
    )


def length_warning(
    generator: Generator, prompts: Sequence[Any], max_new_tokens: int, trained: int
) -> str | None:
    """A warning if texts may become longer than what the model was trained on.

    Args:
      generator: the model.
      prompts: at least one, as `Generator.generate` takes them.
      max_new_tokens: most tokens of a continuation.
      trained: tokens of the rows of training, `Config.data.seq_len`.

    Raises:
      UserError: as `Generator.generate` of such prompts.
    """
    lengths = map(generator.prompt_length, as_prompts(prompts))
    longest = max(lengths) + max_new_tokens
    # The last token is never read.
    if longest - 1 <= trained:
        return None
    return (
        f"warning: texts may reach {longest} tokens; the model was trained on rows of "
        f"{trained}, and may write nonsense beyond."
    )
