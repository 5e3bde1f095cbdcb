"""A look at the model of a run on held-out text: accuracies by position, texts."""

import dataclasses
import os
from collections.abc import Sequence

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
        accuracy = accuracy_by_position(restored)
        written = _written(restored, texts) if texts else []
    except Exception as error:
        known = error if isinstance(error, UserError) else as_known(error)
        if known is None:
            raise
        return str(known)
    return ModelView(
        restored.step,
        accuracy,
        written,
        default_decoder(restored.config.model.n_future_tokens),
        restored.tokenizer,
    )


def _written(restored: Restored, texts: int) -> list[Generation]:
    """Continuations of held-out prompts, shorter ones where documents are short."""
    cfg = restored.config
    longest = max(1, min(_PROMPT_TOKENS, cfg.context // 2))
    prompts = None
    while prompts is None:
        try:
            prompts = heldout_prompts(cfg.data.sources, texts, longest)
        except UserError:
            if longest > 1:
                longest //= 2
            elif texts > 1:
                texts -= 1
            else:
                raise
    generator = Generator.from_restored(restored)
    new = max(1, min(_NEW_TOKENS, cfg.context - longest - 1))
    return generator.generate(prompts, max_new_tokens=new)
