"""Prompts from a file, from standard input or from held-out documents."""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from mtp_jax.data.corpus import Corpus
from mtp_jax.errors import UserError


def read_prompts(source: str) -> list[str]:
    """Reads prompts, a line each, from a file or from standard input.

    Args:
      source: a path, or -; lines of a .jsonl file are objects with `prompt`.

    Raises:
      UserError: it cannot be read, is not UTF-8 or not such JSON, or lacks a prompt.
    """
    name = "standard input" if source == "-" else source
    try:
        if source == "-":
            data = sys.stdin.buffer.read()
        else:
            data = pathlib.Path(source).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"--prompts: {name} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts: {name} is not UTF-8 (byte {error.start}); convert it."
        ) from None
    # Not splitlines(): a prompt may hold other characters that end lines.
    lines = text.removesuffix("\n").split("\n") if text else []
    if name.endswith(".jsonl"):
        lines = [_of_json(s, name, i) for i, s in enumerate(lines, 1) if s.strip()]
    if not lines:
        raise UserError(f"--prompts: {name} is empty; give at least one prompt.")
    if "" in lines:
        raise UserError(
            f"--prompts: prompt {lines.index('') + 1} of {name} is empty; give some "
            "text, or leave it out."
        )
    return lines


def is_text(text: str) -> bool:
    """Returns False for a lone surrogate, as JSON and command lines may bring one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _of_json(line: str, name: str, number: int) -> str:
    """The prompt of a line of JSON."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise UserError(
            f'--prompts: line {number} of {name} is not {{"prompt": "TEXT"}} in JSON.'
        )
    return prompt


def heldout_prompts(
    sources: Sequence[str], count: int, prompt_tokens: int
) -> list[np.ndarray]:
    """Cuts prompts out of held-out documents, the same ones every time.

    Returns token ids, int32 [prompt_tokens] each.

    The documents are spread evenly over those that are long enough; a document that is
    used several times is cut at several places.

    Raises:
      UserError: a source is not a corpus, no document is long enough, or there are not
        so many places where a prompt could begin.
    """
    splits = [Corpus.open(source).documents("heldout") for source in sources]
    # A document begins and ends with an id of its own; a prompt holds neither.
    spare = [(s, i, int(n) - 2 - prompt_tokens) for s in splits
             for i, n in enumerate(s.lengths)]  # fmt: skip
    fitting = [(split, i, room) for split, i, room in spare if room >= 0]
    if not fitting:
        longest = max((room + prompt_tokens for *_, room in spare), default=0)
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {prompt_tokens} tokens "
            f"(the longest has {max(longest, 0)}); give a smaller --prompt_tokens."
        )
    places = sum(room + 1 for *_, room in fitting)
    if count > places:
        raise UserError(
            f"the held-out documents of {', '.join(sources)} have {places} beginnings "
            f"of {prompt_tokens} tokens, and {count} were asked for; ask for fewer."
        )
    chosen = np.arange(count) * len(fitting) // count
    prompts = []
    for choice, uses in zip(*np.unique(chosen, return_counts=True), strict=True):
        split, i, room = fitting[choice]
        for which in range(1, uses + 1):
            start = 1 + room * which // (uses + 1)
            row = split.tokens(i, start, start + prompt_tokens)
            prompts.append(row.astype(np.int32))
    return prompts
