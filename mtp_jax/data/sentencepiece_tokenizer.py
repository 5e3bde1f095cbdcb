"""SentencePiece models: their tokenizer, and training one that loses nothing."""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import sentencepiece

from mtp_jax.data.utf8 import MOST_BYTES, pending_bytes
from mtp_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"
_SPACE = "\u2581"  # stands for a space inside the pieces of SentencePiece
_SENTENCE_CHARS = 1000  # the trainer drops sentences of more than 4192 bytes


def template_files(chat_template: str | None) -> dict[str, bytes]:
    """The file of a chat template, if there is one, by its name."""
    return {} if chat_template is None else {TEMPLATE_FILE: chat_template.encode()}


class SentencePieceTokenizer:
    """A SentencePiece model.

    A model that puts a space in front of every text (`add_dummy_prefix`) gives that
    space back in the counts of `piece_bytes`, so bytes per token come out up to one
    byte a text too high; models of `train_sentencepiece` do not.
    """

    kind = "sentencepiece"

    def __init__(self, model_bytes: bytes, name: str, chat_template: str | None = None):
        """Loads a model from the content of its file; `name` is for messages.

        Raises:
          UserError: not a SentencePiece model, or one without ids for begin and end
            of text.
        """
        try:
            # An empty model would load, and fail at the first use.
            if not model_bytes:
                raise RuntimeError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError:
            raise UserError(
                f"{name} is not a SentencePiece model; give a .model file as its "
                "trainer writes it."
            ) from None
        self.model_bytes = model_bytes
        self.chat_template = chat_template
        self.files: Mapping[str, bytes] = {
            MODEL_FILE: model_bytes,
            **template_files(chat_template),
        }
        self.name = name
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{name} has no id for begin or end of text (bos {self.bos_id}, eos "
                f"{self.eos_id}); train it with both."
            )
        self.end_ids = (self.eos_id,)
        self.prompt_begin = (self.bos_id,)
        self._space_mark_ids = self._bytes_of_the_space_mark()

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens], without begin and end of text."""
        if self._space_mark_ids is None:
            return np.array(self._model.encode(text), np.int32)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += self._space_mark_ids if i else []
            ids += self._model.encode(part)
        return np.array(ids, np.int32)

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, int32 [tokens], and the characters of each, int32 [tokens, 2].

        The tokens of a character that has several all stand for it.
        """
        marks = self._space_mark_ids
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for part in [text] if marks is None else text.split(_SPACE):
            if at and marks is not None:
                ids += marks
                spans += [(at - 1, at)] * len(marks)
            # The library counts bytes.
            sizes = [len(character.encode()) for character in part]
            character_of = np.repeat(np.arange(len(part)), sizes)
            for piece in self._model.encode(part, return_type="proto").pieces:
                # The bytes of a character have no width but for the last of them.
                last = max(piece.end - 1, piece.begin)
                begin, end = character_of[[piece.begin, last]]
                ids.append(piece.id)
                spans.append((at + int(begin), at + int(end) + 1))
            at += len(part) + 1
        return np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; begin and end of text are left out."""
        return self._model.decode(np.asarray(ids, np.int64).tolist())

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of byte pieces at the end that only begin a character."""
        values: list[int] = []
        for i in reversed(np.asarray(ids, np.int64)[-MOST_BYTES:].tolist()):
            if not self._model.is_byte(i):
                break
            values.insert(0, int(self._model.id_to_piece(i)[1:-1], 16))  # <0xE2>
        return pending_bytes(bytes(values))

    def piece_bytes(self) -> np.ndarray:
        """The number of bytes of UTF-8 of each id, int32 [vocab_size].

        Control pieces and the unknown piece count 0, a byte piece 1.
        """
        return np.array([self._piece_bytes(i) for i in range(self.vocab_size)], "i4")

    def _piece_bytes(self, i: int) -> int:
        if self._model.is_byte(i):
            return 1
        if any(
            is_kind(i)
            for is_kind in (
                self._model.is_control,
                self._model.is_unknown,
                self._model.is_unused,
            )
        ):
            return 0
        return len(self._model.id_to_piece(i).replace(_SPACE, " ").encode())

    def _bytes_of_the_space_mark(self) -> list[int] | None:
        """The byte pieces of U+2581, which would otherwise come back as a space.

        None where cutting a text at that character is not possible: without byte
        pieces, or if every part would get a space in front.
        """
        ids = [self._model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        cuttable = self._model.encode("a\na") == [
            *self._model.encode("a\n"),
            *self._model.encode("a"),
        ]
        return ids if cuttable and all(map(self._model.is_byte, ids)) else None


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece model of `vocab_size` pieces; returns its file's content.

    Byte-pair encoding that loses nothing: no normalisation, every space kept, bytes
    for rare characters, the line feed a piece of its own. Ids 0, 1 and 2 are unknown,
    begin and end of text. The same texts give the same model.

    Raises:
      UserError: `vocab_size` is too small or too large for these texts (the text of
        the error has the bound), or there is no text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_training_problem(str(error), vocab_size)) from None
    return model.getvalue()


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _SENTENCE_CHARS):
                yield line[start : start + _SENTENCE_CHARS]


def _training_problem(message: str, vocab_size: int) -> str:
    """Says, for the trainer's message in C++, which vocabulary would work."""
    where = f"a SentencePiece vocabulary of {vocab_size}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{where} is too small for the bytes and characters of these texts; give "
            f"at least {found[1]}."
        )
    if found := re.search(r"value <= (\d+)", message):
        return f"{where} is too large for so little text; give at most {found[1]}."
    if "sentences_.empty()" in message:
        return f"{where} cannot be trained: there is no text but line feeds."
    return f"{where} cannot be trained: {message}"
