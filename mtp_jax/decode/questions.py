"""Conversations that a model is to go on with: from messages to prompts, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mtp_jax.data.chat import prompt_ids
from mtp_jax.data.chat_template import (
    ChatTemplate,
    Message,
    TemplateProblem,
    read_template,
    template_from,
    template_of,
)
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.decode.prompt_list import WholePrompt
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """Messages to be answered, and their prompt."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None
    prompt: WholePrompt

    def answered(self, text: str) -> dict[str, Any]:
        """The conversation with an answer, in a form that `prepare` takes."""
        answer = {"role": "assistant", "content": text}
        found: dict[str, Any] = {"messages": [*self.messages, answer]}
        return found if self.tools is None else {**found, "tools": list(self.tools)}


def questions_of(
    asked: Sequence[tuple[list[Message], list[Any] | None]],
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    template: str | None = None,
) -> list[Question]:
    """Renders messages, each list up to where the model's answer begins.

    Args:
      asked: messages, and the tools that the model may call.
      tokenizer: of the model, with its chat template.
      system: a message in front of those that do not begin with one of the system.
      template: a file with another chat template.

    Raises:
      UserError: there is no chat template, it cannot be read, or it refuses messages.
    """
    chat_template = _template(tokenizer, template)
    found = []
    for number, (messages, tools) in enumerate(asked, 1):
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            ids = prompt_ids(messages, tools, tokenizer, chat_template)
        except TemplateProblem as error:
            raise UserError(
                f"prompt {number} is refused by the chat template: {error}."
            ) from None
        kept = None if tools is None else tuple(tools)
        found.append(Question(tuple(messages), kept, WholePrompt(ids)))
    return found


def _template(tokenizer: Tokenizer, path: str | None) -> ChatTemplate:
    if path is None:
        return template_of(tokenizer)
    return template_from(read_template(path), tokenizer, path)
