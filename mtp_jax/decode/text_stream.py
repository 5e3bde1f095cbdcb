"""Text of tokens while it is written: stop strings, and the part that can be shown.

Axes: none; tokens are those of one text.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mtp_jax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # the first bytes of a character decode to this


class Decodes(Protocol):
    """Turns tokens into text: a tokenizer, or a `Continuation`."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids."""
        ...


class Continuation:
    """Decodes what follows a prompt as it stands in the text of both together.

    Alone it may be another text: a SentencePiece model may take a space off the
    beginning of what it decodes, and a character may begin in the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray):
        """Takes the prompt's ids; its text is `prompt`, without half a character."""
        self._tokenizer = tokenizer
        self._ids = np.asarray(prompt, np.int64)
        whole = len(self._ids) - tokenizer.unfinished(self._ids)
        self.prompt = tokenizer.decode(self._ids[:whole])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that these tokens add to the prompt's."""
        both = np.concatenate([self._ids, np.asarray(ids, np.int64)])
        return self._tokenizer.decode(both)[len(self.prompt) :]


def find_stop(
    tokenizer: Decodes, tokens: Sequence[int], stop: Sequence[str]
) -> int | None:
    """The number of tokens up to the end of the first complete stop string, or None.

    It is looked for in the text, so it does not matter how it would be tokenized.
    """

    def complete(count: int) -> bool:
        text = tokenizer.decode(tokens[:count])
        return any(s in text for s in stop)

    if not stop or not complete(len(tokens)):
        return None
    low, high = 0, len(tokens)  # not complete at low, complete at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if complete(middle) else (middle, high)
    return high


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string that begins in it."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that no further token changes or takes back.

    Left out are a character whose last bytes are missing, and an end that may
    yet become a stop string.
    """
    text = text.rstrip(_UNFINISHED)
    longest = max(map(len, stop), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(s.startswith(text[start:]) for s in stop):
            return text[:start]
    return text


def token_texts(tokenizer: Decodes, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the text.

    A character of several tokens comes with the last of them.
    """
    parts, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        text = text if count == len(tokens) else settled(text, ())
        parts.append(text[len(before) :])
        before = text
    return parts
