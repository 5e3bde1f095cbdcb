"""Tokenizes conversations: what `tokenizing` does for texts."""

import collections
import dataclasses

from mtp_jax.data.chat import encode_conversation
from mtp_jax.data.chat_template import ChatTemplate, template_of
from mtp_jax.data.conversations import FORMS, NoConversation, conversation_of
from mtp_jax.data.corpus import token_dtype
from mtp_jax.data.documents import Part, ReadOptions, records_of
from mtp_jax.data.json_tokenizer import JsonTokenizer
from mtp_jax.data.tokenized import TaskResult, Tokenized, split_of
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import UserError

_END = "repair the line, or leave out what cannot be learned from with --skip_bad"


def tokenize_conversations(
    task: list[Part], tokenizer: Tokenizer, options: ReadOptions
) -> TaskResult:
    """Tokenizes the conversations of a task, in order.

    Raises:
      UserError: a line without a conversation that can be learned from, or there is no
        chat template where messages need one.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    template: ChatTemplate | None = None
    found = TaskResult([], 0, sum(part.read_bytes for part in task))
    for part in task:
        if not part.file.holds_lines:
            raise UserError(
                f"{part.file.path} holds no conversations; give .jsonl or .parquet "
                f"files, or leave it out with --exclude={part.file.path.name}."
            )
        for name, where, record in records_of(part, options, found.bad):
            try:
                form, conversation = conversation_of(record, options.chat_form)
                if conversation.texts is None and template is None:
                    template = template_of(tokenizer)
                encoded = encode_conversation(conversation, tokenizer, template)
                if encoded.turn_end is None and conversation.complete:
                    raise NoConversation(
                        "without an end of turn",
                        "has no token after the answer that ends it, so a model would "
                        "never learn to stop: write {{ eos_token }} after an answer in "
                        "the chat template, within its {% generation %} marks if it "
                        "has any",
                    )
            except NoConversation as error:
                if not options.skip_bad:
                    raise UserError(f"{where} {error}; {_END}.") from None
                found.bad[error.kind] += 1
                continue
            found.forms.setdefault(form, where)
            if encoded.turn_end is not None:
                found.turn_ends[encoded.turn_end] += 1
            text = encoded.text.encode(errors="replace")
            found.documents.append(
                Tokenized(
                    split_of(text, options.heldout),
                    name,
                    encoded.ids.astype(dtype),
                    len(text),
                    encoded.learned,
                )
            )
    return found


def check_forms(forms: dict[str, str]) -> None:
    """Raises UserError if conversations are of several forms.

    `forms` has the place of the first of each.
    """
    if len(forms) > 1:
        (one, here), (other, there), *_ = forms.items()
        raise UserError(
            f"{here} is of the form {one}, {there} of {other}; prepare them apart, or "
            "name one with --chat_form and leave out the others with --skip_bad."
        )


def chat_options(
    reading: ReadOptions,
    format: str,
    form: str | None,
    template: object,
    for_texts: tuple[object, ...],
) -> ReadOptions:
    """The options of reading, with those of conversations.

    Args:
      reading: those for all documents.
      format: "text" or "chat".
      form: a name in FORMS, or None.
      template: a file, or None.
      for_texts: options that conversations do not have; None where not given.

    Raises:
      UserError: an unknown format or form, or an option of the other format.
    """
    if format not in ("text", "chat"):
        raise UserError(f"format is {format!r}; give text or chat.")
    if format == "text":
        if form is not None or template is not None:
            raise UserError(
                "chat_form and chat_template are for conversations; give --format=chat."
            )
        return reading
    if form is not None and form not in FORMS:
        raise UserError(f"chat_form is {form!r}; known are {', '.join(FORMS)}.")
    if any(x is not None for x in for_texts) or reading.text_field != "text":
        raise UserError(
            "train_tokenizer, text_field, split_at, split_bytes and block_documents "
            "are for texts; leave them out with --format=chat."
        )
    return dataclasses.replace(reading, chat=True, chat_form=form)


def with_turn_ends(
    tokenizer: Tokenizer, turn_ends: collections.Counter[int]
) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, texts of which end where turns do, and a line for people if so."""
    lines: list[str] = []
    new = [i for i, _ in turn_ends.most_common() if i not in tokenizer.end_ids]
    for end_id in new:
        assert isinstance(tokenizer, JsonTokenizer)  # others have one end alone
        lines.append(
            f"turns end with {tokenizer.text_of(end_id)}, which the tokenizer's files "
            "do not name as an end of text: from now on it is one"
        )
        tokenizer = tokenizer.with_end(end_id)
    return tokenizer, lines
