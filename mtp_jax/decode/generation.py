"""The result of decoding a prompt: its continuation, and how it came about.

Axes: E tokens of a text at most, T new tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.decode.batch import Texts
from mtp_jax.decode.text_stream import Continuation, before_stop, find_stop


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt and its continuation.

    Counts end with the token that ends the text, that is end of text, or the token that
    completes a stop string, or the last one, and with the forward pass that made it.
    `accepted_by_head[i]` is the share of the forward passes that verified drafts in
    which the draft of head i + 2 and all drafts before it were accepted.
    """

    prompt: str  # without the first bytes of a character that the text goes on with
    text: str  # up to the stop string
    tokens: list[int]  # new ones, without end of text; none reaches into a stop string
    heads: list[int]  # the head that made each token: 1, or the one that drafted it
    passes: list[int]  # forward pass that committed each; 0 read the prompt
    forwards: int  # forward passes, the one that reads the prompt included
    tokens_per_forward: float  # end of text and stop string count; 1.0 for plain
    accepted_by_head: list[float]
    tokens_per_s: float  # of the batch: its new tokens / its time, without compilation
    finish: str  # "length", "eos" or "stop"
    deviations: int | None = None  # tokens not the exact choice; None: exact decoder
    # Of the prompt, begin of text first.
    prompt_tokens: list[int] = dataclasses.field(default_factory=list)
    ended_by: int | None = None  # the id that ended the text; None: it was none


def generation_of(
    tokenizer: Tokenizer, texts: Texts, b: int, stop: Sequence[str], drafts: int
) -> Generation:
    """Returns text b of a finished batch, its speed left at 0.

    Args:
      tokenizer: of the model.
      texts: the batch.
      b: which text.
      stop: the strings that end a text.
      drafts: how many drafts a forward pass can verify.
    """
    start = int(texts.start_B[b])
    tokens = texts.new_tokens(b)
    made, finish, ended_by = len(tokens), "length", None
    if tokens[-1] in tokenizer.end_ids:
        *tokens, ended_by = tokens
        finish = "eos"
    after = Continuation(tokenizer, texts.tokens_BE[b, :start])
    text = after.decode(tokens)
    if (found := find_stop(after, tokens, stop)) is not None:
        made, finish, ended_by = found, "stop", None
        text = before_stop(after.decode(tokens[:found]), stop)
        kept = found
        while len(after.decode(tokens[:kept])) > len(text):
            kept -= 1
        tokens = tokens[:kept]
    forward_T = texts.forward_BE[b, start : start + made]
    accepted_T = texts.accepted_BE[b, start : start + made]
    passes, first, nth_T = np.unique(forward_T, return_index=True, return_inverse=True)
    place_T = np.arange(made) - first[nth_T]
    heads_T = np.where(place_T < accepted_T, place_T + 2, 1)
    if texts.unverified:
        heads_T = place_T + 1
    accepted = accepted_T[first[1:]]  # the first pass read the prompt
    return Generation(
        prompt=after.prompt,
        text=text,
        tokens=tokens,
        heads=heads_T[: len(tokens)].tolist(),
        passes=nth_T[: len(tokens)].tolist(),
        forwards=len(passes),
        tokens_per_forward=made / len(passes),
        accepted_by_head=[
            float(np.mean(accepted > i)) if accepted.size else 0.0
            for i in range(drafts)
        ],
        tokens_per_s=0.0,
        finish=finish,
        ended_by=ended_by,
        deviations=None
        if texts.deviated_BE is None
        else int(texts.deviated_BE[b, start : start + made].sum()),
        prompt_tokens=texts.tokens_BE[b, :start].tolist(),
    )


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums and means over several texts."""

    forwards: int
    tokens: float  # new ones, those that end a text included
    seconds: float
    accepted_by_head: list[float]

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forward passes; 1 for plain."""
        return self.tokens / self.forwards

    @property
    def tokens_per_s(self) -> float:
        """New tokens over seconds, one batch after another."""
        return self.tokens / self.seconds


def totals(results: Sequence[Generation]) -> Totals:
    """Adds up at least one text."""
    made = [r.tokens_per_forward * r.forwards for r in results]
    seconds = sum(m / r.tokens_per_s for m, r in zip(made, results, strict=True))
    # The pass that reads the prompt verifies nothing.
    verifying = [r.forwards - 1 for r in results]
    heads = zip(*(r.accepted_by_head for r in results), strict=True)
    shares = [
        sum(share * w for share, w in zip(of_head, verifying, strict=True))
        / max(1, sum(verifying))
        for of_head in heads
    ]
    return Totals(sum(r.forwards for r in results), sum(made), seconds, shares)
