"""Conversations in the forms in which instruction data is passed on.

| form | fields |
|---|---|
| messages | `messages`: a list of {role, content}; `tools` |
| sharegpt | `conversations`: a list of {from, value}; `system`, `tools` |
| alpaca | `instruction`, `input`, `output`; `system`, `history` [[question, answer]] |
| prompt_completion | `prompt` and `completion`: two texts, or two lists of messages |

A continuation that `generate` wrote is a conversation, too: with `--chat` in the form
messages, else a prompt with `text` as its completion. One that ended because it was
long enough has no end to learn.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

# Who speaks, by the names that ShareGPT and its like have for it.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
    "developer": "developer",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for a chat template, or a prompt and its completion without one."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] | None = None
    first: int = 0  # number of the first message that may be learned
    texts: tuple[str, str] | None = None  # prompt and completion instead of messages
    complete: bool = True  # False: the last answer was cut off


class NoConversation(Exception):
    """A record holds none; `kind` is for counting, the text says what is wrong."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def conversation_of(
    record: dict[str, Any], form: str | None = None
) -> tuple[str, Conversation]:
    """The form of a record, and the conversation in it.

    Args:
      record: an object of JSON.
      form: a name in FORMS; None: told by the fields.

    Raises:
      NoConversation: it is of no known form, or not of this one; or there is no answer
        of an assistant in it.
    """
    if form is None:
        form = next((name for name, (keys, _) in FORMS.items() if keys(record)), None)
    if form is None:
        raise NoConversation(
            "of no known form",
            f"is of no known form (it has {', '.join(record) or 'no fields'}); give "
            "messages, conversations, instruction and output, or prompt and completion",
        )
    has_fields, parse = FORMS[form]
    if not has_fields(record):
        raise NoConversation(
            "of another form",
            f"is not of the form {form} (it has {', '.join(record) or 'no fields'})",
        )
    found = parse(record)
    if found.texts is None and not any(
        message["role"] == "assistant" for message in found.messages[found.first :]
    ):
        raise NoConversation(
            "without an answer",
            "has no message of the assistant, so there is nothing to learn",
        )
    return form, found


def messages_of(record: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """The messages up to the last one that is not the assistant's, and the tools.

    What a model is asked: an answer at the end of the record is left out.

    Raises:
      NoConversation: no messages, or none that could be answered.
    """
    if isinstance(record.get("prompt"), str) and not _is_messages(record):
        asked = Conversation(({"role": "user", "content": record["prompt"]},))
    else:
        form = next((name for name, (keys, _) in FORMS.items() if keys(record)), None)
        if form is None:
            raise NoConversation("of no known form", "has no messages and no prompt")
        asked = FORMS[form][1](record)
    messages = list(asked.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise NoConversation("without a question", "has no message to answer")
    return messages, None if asked.tools is None else list(asked.tools)


def _is_messages(record: dict[str, Any]) -> bool:
    return isinstance(record.get("messages"), list)


def _is_sharegpt(record: dict[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list)


def _is_alpaca(record: dict[str, Any]) -> bool:
    return "instruction" in record and "output" in record


def _is_prompt_completion(record: dict[str, Any]) -> bool:
    return "prompt" in record and ("completion" in record or _is_generated(record))


def _is_generated(record: dict[str, Any]) -> bool:
    """True for a line that `generate` wrote."""
    return {"text", "finish", "tokens"} <= record.keys()


def _messages(record: dict[str, Any]) -> Conversation:
    return Conversation(
        tuple(_message(entry) for entry in record["messages"]),
        _tools(record),
        complete=record.get("finish") != "length",
    )


def _sharegpt(record: dict[str, Any]) -> Conversation:
    messages = [_turn(entry) for entry in record["conversations"]]
    return Conversation((*_system(record), *messages), _tools(record))


def _alpaca(record: dict[str, Any]) -> Conversation:
    asked = _text(record, "instruction")
    if record.get("input"):
        asked += "\n" + _text(record, "input")
    turns = [*(record.get("history") or []), [asked, _text(record, "output")]]
    messages = list(_system(record))
    for turn in turns:
        if not (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(text, str) for text in turn)
        ):
            raise NoConversation("damaged", "has a `history` that is not [[q, a], ...]")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return Conversation(tuple(messages))


def _prompt_completion(record: dict[str, Any]) -> Conversation:
    prompt = record["prompt"]
    completion = record.get("completion", record.get("text"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise NoConversation("without an answer", "has an empty completion")
        return Conversation(
            texts=(prompt, completion), complete=record.get("finish") != "length"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [_message(entry) for entry in prompt]
        said = [_message(entry) for entry in completion]
        return Conversation((*asked, *said), _tools(record), first=len(asked))
    raise NoConversation(
        "damaged", "has a prompt and a completion that are not both texts or messages"
    )


# By name: whether a record is of this form, and how it is read. The first counts.
FORMS: dict[str, tuple[Callable[[dict], bool], Callable[[dict], Conversation]]] = {
    "messages": (_is_messages, _messages),
    "sharegpt": (_is_sharegpt, _sharegpt),
    "alpaca": (_is_alpaca, _alpaca),
    "prompt_completion": (_is_prompt_completion, _prompt_completion),
}
FIELDS = (
    *("messages", "conversations", "instruction", "input", "output", "system"),
    *("history", "prompt", "completion", "tools", "text", "finish", "tokens"),
)


def _message(entry: Any) -> Message:
    """A message with a role, and a content or calls of tools."""
    if isinstance(entry, dict) and "role" not in entry and "from" in entry:
        return _turn(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise NoConversation("damaged", "has a message without a role")
    content = entry.get("content")
    parts = content if isinstance(content, list) else []
    known = isinstance(content, str) or (
        bool(parts) and all(isinstance(part, dict) for part in parts)
    )
    if not known and not entry.get("tool_calls"):
        raise NoConversation(
            "damaged", f"has a message of {entry['role']} without text"
        )
    return entry


def _turn(entry: Any) -> Message:
    """A message of ShareGPT's form, in the other one."""
    if isinstance(entry, dict) and "from" not in entry and "role" in entry:
        return _message(entry)
    if not (isinstance(entry, dict) and isinstance(entry.get("value"), str)):
        raise NoConversation("damaged", "has a turn without from and value")
    who, text = entry.get("from"), entry["value"]
    role = _ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise NoConversation(
            "damaged", f"has a turn from {who!r}; known are {', '.join(_ROLES)}"
        )
    if who == "function_call":
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            call = None
        if isinstance(call, dict) and {"name", "arguments"} <= call.keys():
            calls = [{"type": "function", "function": call}]
            return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": text}


def _system(record: dict[str, Any]) -> tuple[Message, ...]:
    if not record.get("system"):
        return ()
    return ({"role": "system", "content": _text(record, "system")},)


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(value := record[key], str):
        raise NoConversation("damaged", f"has a field {key!r} that is not a text")
    return value


def _tools(record: dict[str, Any]) -> tuple[Any, ...] | None:
    """The tools, also where they are JSON within a text, as is usual in parquet."""
    value = record.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = {}
    if not value and not isinstance(value, dict):
        return None
    if not isinstance(value, list):
        raise NoConversation("damaged", "has `tools` that are not a list")
    return tuple(value)
