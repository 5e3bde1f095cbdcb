"""Prompts from a file, from standard input or from held-out documents."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.data.conversations import Message, NoConversation, messages_of
from mtp_jax.data.corpus import Corpus, Documents
from mtp_jax.errors import UserError


def read_prompts(source: str) -> list[str]:
    """Reads prompts, a line each, from a file or from standard input.

    Args:
      source: a path, or -; lines of a .jsonl file are objects with `prompt`. A byte
        order mark and the carriage returns of line ends are no part of a prompt.

    Raises:
      UserError: it cannot be read, is not UTF-8 or not such JSON, or lacks a prompt.
    """
    name, lines = _lines_of(source)
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


def read_questions(source: str) -> list[tuple[list[Message], list[Any] | None]]:
    """Reads what a model is to be asked: messages, and the tools that it may call.

    Args:
      source: as for `read_prompts`; a line is what the user says. Lines of a .jsonl
        file may be conversations of any form of `conversations`, too; an answer at the
        end of one is left out.

    Raises:
      UserError: as `read_prompts`, or a line without a message to answer.
    """
    name, lines = _lines_of(source)
    found: list[tuple[list[Message], list[Any] | None]] = []
    if not name.endswith(".jsonl"):
        found = [([{"role": "user", "content": text}], None) for text in lines if text]
        lines = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"--prompts: line {number} of {name} is not JSON's object.")
        try:
            found.append(messages_of(record))
        except NoConversation as error:
            raise UserError(f"--prompts: line {number} of {name} {error}.") from None
    if not found:
        raise UserError(f"--prompts: {name} is empty; give at least one prompt.")
    return found


def _lines_of(source: str) -> tuple[str, list[str]]:
    """A name for messages, and the lines of a file or of standard input."""
    name = "standard input" if source == "-" else source
    try:
        if source == "-":
            data = sys.stdin.buffer.read()
        else:
            data = pathlib.Path(source).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--prompts: {name} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts: {name} is not UTF-8 (byte {error.start}); convert it."
        ) from None
    # Not splitlines(): a prompt may hold other characters that end lines.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return name, text.removesuffix("\n").split("\n") if text else []


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
    except (ValueError, RecursionError):
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
    used several times is cut at several places, and no place is used twice.

    Raises:
      UserError: a source is not a corpus, no document is long enough, or there are not
        so many places where a prompt could begin.
    """
    splits = _heldout_of(sources)
    # A document begins and ends with an id of its own; a prompt holds neither.
    spare = [(s, i, int(n) - 2 - prompt_tokens) for s in splits
             for i, n in enumerate(s.sampled_lengths)]  # fmt: skip
    fitting = [(split, i, room) for split, i, room in spare if room >= 0]
    if not fitting:
        longest = max((room + prompt_tokens for *_, room in spare), default=0)
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {prompt_tokens} tokens "
            f"(the longest has {max(longest, 0)}); give a smaller --prompt_tokens."
        )
    places = np.array([room + 1 for *_, room in fitting])
    if count > places.sum():
        raise UserError(
            f"the held-out documents of {', '.join(sources)} have {places.sum()} "
            f"beginnings of {prompt_tokens} tokens, and {count} were asked for; ask "
            "for fewer."
        )
    prompts = []
    for (split, i, room), uses in zip(fitting, _uses(places, count), strict=True):
        for begin in _beginnings(room, int(uses)):
            row = split.tokens(i, 1 + begin, 1 + begin + prompt_tokens)
            prompts.append(row.astype(np.int32))
    return prompts


def heldout_passages(
    sources: Sequence[str], count: int, least: int, most: int
) -> list[np.ndarray]:
    """Cuts held-out documents into passages, the same ones every time.

    Args:
      sources: folders of corpora.
      count: passages, at most; they are spread evenly over all that there are.
      least: tokens of a passage, at least; what is shorter is left out.
      most: tokens of a passage, at most.

    Returns:
      Token ids, int32 [least to most tokens] each, none of them twice; without begin
      and end of text.

    Raises:
      UserError: a source is not a corpus.
    """
    places = []
    for documents in _heldout_of(sources):
        for i, length in enumerate(documents.sampled_lengths):
            end = int(length) - 1  # of the text
            places += [(documents, i, begin, min(begin + most, end))
                       for begin in range(1, end - least + 1, most)]  # fmt: skip
    count = min(count, len(places))
    chosen = (places[k * len(places) // count] for k in range(count))
    return [documents.tokens(i, begin, end).astype(np.int32)
            for documents, i, begin, end in chosen]  # fmt: skip


def drawn_prompt(
    documents: Documents, prompt_tokens: int, which: int, where: int
) -> np.ndarray:
    """A prompt from documents by two random numbers, int32 [prompt_tokens] or fewer.

    It lies inside a document that has so many tokens, or is the longest document.
    """
    lengths = documents.sampled_lengths.astype(np.int64)
    rooms = lengths - 2 - prompt_tokens
    fitting = np.flatnonzero(rooms >= min(0, rooms.max()))
    i = int(fitting[which % len(fitting)])
    begin = 1 + where % (max(int(rooms[i]), 0) + 1)
    end = min(begin + prompt_tokens, int(lengths[i]) - 1)
    return documents.tokens(i, begin, end).astype(np.int32)


def _heldout_of(sources: Sequence[str]) -> list[Documents]:
    try:
        return [Corpus.open(source).documents("heldout") for source in sources]
    except UserError as error:
        raise UserError(
            f"{error} Held-out text of another corpus is read with --data=DIR."
        ) from None


def _uses(places: np.ndarray, count: int) -> np.ndarray:
    """How often to use each document, spread evenly; at most its number of places."""
    spread = np.arange(count) * len(places) // count
    uses = np.minimum(np.bincount(spread, minlength=len(places)), places)
    while (missing := count - int(uses.sum())) > 0:
        free = np.flatnonzero(uses < places)
        n = min(missing, len(free))
        uses[free[np.arange(n) * len(free) // n]] += 1
    return uses


def _beginnings(room: int, uses: int) -> list[int]:
    """Different places from 0 to `room`, spread evenly, inside where it can be."""
    if room > uses:
        return [room * which // (uses + 1) for which in range(1, uses + 1)]
    return [which * (room + 1) // uses for which in range(uses)]
