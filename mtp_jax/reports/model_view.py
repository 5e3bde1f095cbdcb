"""A look at the model of a run on held-out text: accuracies by position, texts."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.decode.fitting import default_decoder
from mtp_jax.decode.generation import Generation
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError, as_known
from mtp_jax.eval.by_position import PositionAccuracy, accuracy_by_position

_PROMPT_TOKENS = 64
_NEW_TOKENS = 160


@dataclasses.dataclass(frozen=True)
class ModelView:
    """A checkpoint on held-out text."""

    step: int
    accuracy: PositionAccuracy
    texts: list[Generation]  # of held-out prompts, greedy
    decoder: str  # that wrote them
    tokenizer: Tokenizer


def look_at_model(
    workdir: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | None = None,
    texts: int = 3,
) -> ModelView | str:
    """Measures the newest checkpoint of a run, and lets it write.

    Args:
      workdir: of the run.
      data: folders of prepared corpora; None for those of the run.
      texts: held-out prompts to continue, or as many as there are.

    Returns:
      What was found; or one line on why there is nothing, where the checkpoint or the
      corpora are not there, do not fit, or memory does not suffice.
    """
    try:
        restored = restore_model(workdir).with_data(data)
    except Exception as error:
        return _why(error)
    try:
        accuracy = accuracy_by_position(restored)
        written = _written(restored, texts) if texts else []
    except Exception as error:
        of_corpora = data is None and isinstance(error, UserError)
        hint = " Give --data=DIR for held-out text of another corpus."
        return _why(error) + (hint if of_corpora else "")
    return ModelView(
        restored.step,
        accuracy,
        written,
        default_decoder(restored.config.model.n_future_tokens),
        restored.tokenizer,
    )


def _why(error: Exception) -> str:
    """The reason why there is no model to look at; what is a bug is raised again."""
    known = error if isinstance(error, UserError) else as_known(error)
    if known is None:
        raise error
    return str(known)


def _written(restored: Restored, texts: int) -> list[Generation]:
    """Continuations of held-out prompts, shorter ones where documents are short."""
    context = restored.config.context
    prompts = _prompts(restored, texts, max(1, min(_PROMPT_TOKENS, context // 2)))
    generator = Generator.from_restored(restored)
    new = max(1, min(_NEW_TOKENS, context - len(prompts[0]) - 1))
    return generator.generate(prompts, max_new_tokens=new)


def _prompts(restored: Restored, texts: int, tokens: int) -> list[np.ndarray]:
    """Held-out prompts: fewer if there are not so many, shorter if none is so long."""
    sources, count = restored.config.data.sources, texts
    while True:
        try:
            return heldout_prompts(sources, count, tokens)
        except UserError:
            if count > 1:
                count //= 2
            elif tokens > 1:
                tokens, count = tokens // 2, texts
            else:
                raise
