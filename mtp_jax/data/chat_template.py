"""Chat templates: Jinja texts that make one text of the messages of a conversation.

Rendered as transformers does (`apply_chat_template`): in Jinja's sandbox, with the same
filters, functions and variables. `{% generation %} ... {% endgeneration %}` marks what
the assistant says.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import UserError

Message = dict[str, Any]

# Characters that Unicode keeps out of texts: they mark places in what is rendered.
_BEGIN, _END, _BOS, _EOS = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = frozenset((_BEGIN, _END, _BOS, _EOS))
# What a template may end in.
_PROBLEMS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError),
    *(ArithmeticError, AttributeError, RecursionError),
)
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what the assistant says in it."""

    text: str
    said: tuple[tuple[int, int], ...]  # characters from, up to; of marked templates


class TemplateProblem(Exception):
    """The template does not take a conversation; the text says why."""


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, texts: Mapping[str, str], name: str):
        """Compiles the template.

        Args:
          source: Jinja.
          texts: of special tokens by their names, such as `bos_token`.
          name: for messages.

        Raises:
          UserError: it is not Jinja.
        """
        self._texts = dict(texts)
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{name} is not Jinja ({error}).") from None
        blocks = tree.find_all(jinja2.nodes.CallBlock)
        self.marked = any(_is_mark(block) for block in blocks)

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """True if content may be a list of texts, as in templates for images."""
        parts = [{"type": "text", "text": "a probe"}]
        roles = ("user", "assistant")
        messages = [{"role": role, "content": parts} for role in roles]
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None,
                add_generation_prompt=False, **self._texts,
            )  # fmt: skip
        except _PROBLEMS:
            return False
        return text.count("a probe") == 2 and "'text'" not in text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        ask: bool = False,
    ) -> Rendered:
        """Makes a text of messages.

        Args:
          messages: with `role` and `content`, and what else the template reads.
          tools: schemas of functions that the assistant may call.
          ask: end with the beginning of an answer (`add_generation_prompt`).

        Raises:
          TemplateProblem: the template refuses them, or fails.
        """
        given = [_normal(message) for message in messages]
        if not self._takes_parts:
            given = [_as_text(message) for message in given]
        if not MARKS.isdisjoint(json.dumps([given, tools], ensure_ascii=False)):
            raise TemplateProblem("a message holds U+FDD0 to U+FDD3, which mark places")
        try:
            marked = self._template.render(
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=ask,
                **self._texts,
            )
        except _PROBLEMS as error:
            raise TemplateProblem(str(error) or type(error).__name__) from None
        try:
            marked.encode()
        except UnicodeEncodeError:
            raise TemplateProblem("a message holds half of a surrogate pair") from None
        return _without_marks(marked)


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
      UserError: it has none, or one that is not Jinja.
    """
    if (source := tokenizer.chat_template) is None:
        raise UserError(
            f"{tokenizer.name} has no chat template; give a tokenizer whose files have "
            "chat_template.jinja or a chat_template in tokenizer_config.json, or name "
            "one with --chat_template=FILE."
        )
    return template_from(source, tokenizer, f"the chat template of {tokenizer.name}")


def template_from(source: str, tokenizer: Tokenizer, name: str) -> ChatTemplate:
    """Compiles a template for the special tokens of a tokenizer.

    Raises:
      UserError: it is not Jinja.
    """
    # Other kinds write their special tokens in no text: marks stand for them.
    texts = getattr(tokenizer, "special_texts", {"bos_token": _BOS, "eos_token": _EOS})
    return ChatTemplate(source, texts, name)


def read_template(path: str) -> str:
    """The text of a template's file.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"--chat_template={path} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--chat_template={path} is not UTF-8; convert it.") from None


def special_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that marks in a rendered text stand for; none for a tokenizer.json."""
    if tokenizer.kind == "tokenizer.json":
        return {}
    return {_BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id}


def _normal(message: Message) -> Message:
    """A message without empty fields, its reasoning under both names."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def _as_text(message: Message) -> Message:
    """A message whose content, if it is a list of texts, is one text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [x.get("text") for x in parts if isinstance(x, dict)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "".join(map(str, texts))}


def _without_marks(marked: str) -> Rendered:
    """Takes the marks of generation out of a text, and keeps where they stood."""
    if _BEGIN not in marked:
        return Rendered(marked, ())
    first, *rest = marked.split(_BEGIN)
    text, said = first, []
    for part in rest:
        inside, _, outside = part.partition(_END)
        said.append((len(text), len(text) + len(inside)))
        text += inside + outside.replace(_END, "")
    return Rendered(text, tuple(said))


class _Generation(jinja2.ext.Extension):
    """The tag `generation`: its content between two marks."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_between_marks")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _between_marks(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _is_mark(block: jinja2.nodes.CallBlock) -> bool:
    called = block.call.node
    return (
        isinstance(called, jinja2.nodes.ExtensionAttribute)
        and called.identifier == _Generation.identifier
    )


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
