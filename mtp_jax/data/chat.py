"""Conversations as token ids, and which of them are to be learned."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from mtp_jax.data.chat_template import (
    MARKS,
    ChatTemplate,
    Message,
    TemplateProblem,
    special_marks,
)
from mtp_jax.data.conversations import Conversation, NoConversation
from mtp_jax.data.tokenizer import Tokenizer

_OTHERWISE = (
    "it writes a part of the conversation otherwise than the whole, so nobody can tell "
    "what the assistant says; give a template with {% generation %} marks"
)
Span = tuple[int, int]  # characters from the first number up to the second


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation."""

    ids: np.ndarray  # int32 [tokens]
    learned: np.ndarray  # bool [tokens]: True for what the assistant says
    text: str  # as it was rendered
    turn_end: int | None  # the last id of what is learned that is no text, if any


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Encoded:
    """Renders a conversation and encodes it, as one text.

    Learned is every token that stands for a character of what the assistant says, with
    the end of its turn: what the template marks, or else what each answer adds to the
    conversation before it. Where an answer was cut off, nothing after it is there.

    Args:
      conversation: with messages, or a prompt and its completion.
      tokenizer: of the model.
      template: of messages.

    Raises:
      NoConversation: the template does not take it, or nothing is left to learn.
      TypeError: messages without a template.
    """
    if conversation.texts is not None:
        return _of_texts(conversation, tokenizer)
    if template is None:
        raise TypeError("messages need a template")
    try:
        text, spans = _rendered(conversation, template, tokenizer)
    except TemplateProblem as error:
        raise NoConversation(
            "refused by the template", f"is refused by the chat template: {error}"
        ) from None
    if not conversation.complete:
        text, spans = _cut_off(conversation, text, spans)
    ids, places = _encoded(text, tokenizer)
    learned = _inside(places, spans)
    if _lacks_begin(ids, tokenizer):
        ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
        learned = np.concatenate([np.zeros(1, bool), learned])
    _check_begin(ids, tokenizer)
    if not learned.any():
        raise NoConversation("without an answer", "has only empty answers")
    text = "".join(character for character in text if character not in MARKS)
    return Encoded(ids, learned, text, _turn_end(ids, learned, tokenizer))


def prompt_ids(
    messages: list[Message],
    tools: list | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> np.ndarray:
    """The ids of messages up to where the answer begins, int32 [tokens].

    With a tokenizer.json those of transformers' `apply_chat_template`; others have
    begin of text in front.

    Raises:
      TemplateProblem: the template does not take the messages, or writes nothing.
    """
    rendered = template.render(messages, tools, ask=True)
    ids, _ = _encoded(rendered.text, tokenizer)
    if _lacks_begin(ids, tokenizer):
        ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
    if not len(ids):
        raise TemplateProblem("it writes nothing")
    return ids


def _of_texts(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    """A prompt and its completion as they are, with begin and end of text."""
    assert conversation.texts is not None
    prompt, completion = conversation.texts
    text = prompt + completion
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoConversation("damaged", "holds half of a surrogate pair") from None
    ids, places = tokenizer.encode_spans(text)
    learned = _inside(places, [(len(prompt), len(text))])
    begin = np.array(tokenizer.prompt_begin, np.int32)
    ids = np.concatenate([begin, ids])
    learned = np.concatenate([np.zeros(len(begin), bool), learned])
    if not learned.any():
        raise NoConversation("without an answer", "has an empty completion")
    if conversation.complete:
        ids = np.append(ids, np.int32(tokenizer.eos_id))
        learned = np.append(learned, True)
    _check_begin(ids, tokenizer)
    end = tokenizer.eos_id if conversation.complete else None
    return Encoded(ids, learned, text, end)


def _rendered(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[str, list[Span]]:
    """The whole text, and the spans of it that the assistant says."""
    messages, tools = list(conversation.messages), conversation.tools
    whole = template.render(messages, tools)
    begin = 0
    if conversation.first:
        begin = _length_of(messages[: conversation.first], tools, whole.text, template)
    if template.marked:
        spans = [(max(a, begin), b) for a, b in whole.said if b > begin]
        return whole.text, spans
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i >= conversation.first:
            before = _length_of(messages[:i], tools, whole.text, template)
            after = template.render(messages[: i + 1], tools).text
            end = _end_of_answer(after, whole.text, tokenizer)
            said = message.get("content")
            if isinstance(said, str) and said.strip() not in whole.text[before:end]:
                raise TemplateProblem(_OTHERWISE)
            spans.append((before, end))
    return whole.text, spans


def _end_of_answer(after: str, whole: str, tokenizer: Tokenizer) -> int:
    """Characters up to the end of the answer with which `after` ends.

    Some templates end every conversation with a token of its own, which stands there
    where the next turn begins in the whole: what they have in common is told by tokens,
    since both may begin with the same letters.
    """
    if whole.startswith(after):
        return len(after)
    ids, _ = _encoded(after, tokenizer)
    of_whole, places = _encoded(whole, tokenizer)
    n = min(len(ids), len(of_whole))
    same = np.append(ids[:n] == of_whole[:n], False)
    common = int(np.argmin(same))
    return int(places[common - 1, 1]) if common else 0


def _length_of(
    messages: list[Message], tools: tuple | None, whole: str, template: ChatTemplate
) -> int:
    """Characters up to the answer that comes after these messages."""
    asked = template.render(messages, tools, ask=True).text
    _check_prefix(asked, whole)
    return len(asked)


def _check_prefix(part: str, whole: str) -> None:
    if not whole.startswith(part):
        raise TemplateProblem(_OTHERWISE)


def _cut_off(
    conversation: Conversation, text: str, spans: list[Span]
) -> tuple[str, list[Span]]:
    """Leaves out what comes after the last answer, the end of its turn too."""
    content = conversation.messages[-1].get("content")
    said = content.rstrip() if isinstance(content, str) else ""
    at = text.rfind(said, spans[-1][0]) if spans and said else -1
    if conversation.messages[-1]["role"] != "assistant" or at < 0:
        raise NoConversation("cut off", "was cut off in something else than an answer")
    end = at + len(said)
    return text[:end], [(a, min(b, end)) for a, b in spans]


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a rendered text, and the characters of each, both int32."""
    marks = special_marks(tokenizer)
    if not any(mark in text for mark in marks):
        return tokenizer.encode_spans(text)
    ids, places = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
    begin = 0
    for at, character in enumerate([*text, None]):
        if character is not None and character not in marks:
            continue
        part_ids, part_places = tokenizer.encode_spans(text[begin:at])
        ids.append(part_ids)
        places.append(part_places + begin)
        if character is not None:
            ids.append(np.array([marks[character]], np.int32))
            places.append(np.array([[at, at + 1]], np.int32))
        begin = at + 1
    return np.concatenate(ids), np.concatenate(places)


def _inside(places: np.ndarray, spans: Iterable[Span]) -> np.ndarray:
    """True for tokens that stand for a character of a span, bool [tokens]."""
    learned = np.zeros(len(places), bool)
    for begin, end in spans:
        learned |= (places[:, 0] < end) & (places[:, 1] > begin)
    return learned


def _lacks_begin(ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    """True where begin of text is to be put in front of what a template wrote.

    Not for a tokenizer.json: its templates write it themselves, or mean to have none.
    """
    written = tokenizer.kind == "tokenizer.json"
    return not written and ids[:1].tolist() != [tokenizer.bos_id]


def _check_begin(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raises NoConversation if begin of text stands there twice."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise NoConversation(
            "begun twice",
            "begins with two begins of text: take one out of the template or the text",
        )


def _turn_end(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """The last learned id that is special, or ends a text."""
    special = getattr(tokenizer, "special_ids", frozenset()) | set(tokenizer.end_ids)
    found = [int(i) for i in ids[learned] if int(i) in special]
    return found[-1] if found else None
