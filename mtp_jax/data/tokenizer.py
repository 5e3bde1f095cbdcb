"""Text to token ids and back: the bytes themselves, or a SentencePiece model.

Texts round-trip exactly with the byte tokenizer and with every model that
`train_sentencepiece` makes. A model from elsewhere keeps its own normalisation.
"""

import codecs
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from mtp_jax.errors import UserError

_MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # stands for a space inside the pieces of SentencePiece
_MOST_BYTES = 4  # of a character in UTF-8
_SENTENCE_CHARS = 1000  # the trainer drops sentences of more than 4192 bytes


class Tokenizer(Protocol):
    """The interface of a tokenizer, as the rest of the package uses it."""

    kind: str  # "bytes" or "sentencepiece"
    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str  # equal for two tokenizers that give the same ids

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens], without begin and end of text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; begin and end of text are left out."""
        ...

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of ids at the end that begin a character and do not end it."""
        ...

    def piece_bytes(self) -> np.ndarray:
        """The number of bytes of UTF-8 of each id, int32 [vocab_size]."""
        ...


class ByteTokenizer:
    """The 256 bytes; two that UTF-8 never contains begin and end a text."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 256
    bos_id = 0xFE
    eos_id = 0xFF
    fingerprint = hashlib.sha256(b"utf-8 bytes, begin 254, end 255").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, int32 [bytes]."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        values = np.asarray(ids, np.int64)
        special = (values == self.bos_id) | (values == self.eos_id)
        return bytes(values[~special].tolist()).decode(errors="replace")

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of bytes at the end that begin a character and do not end it."""
        return _pending_bytes(bytes(np.asarray(ids, np.int64)[-_MOST_BYTES:].tolist()))

    def piece_bytes(self) -> np.ndarray:
        """1 for each byte, 0 for begin and end of text, int32 [256]."""
        sizes_V = np.ones(self.vocab_size, np.int32)
        sizes_V[[self.bos_id, self.eos_id]] = 0
        return sizes_V


class SentencePieceTokenizer:
    """A SentencePiece model.

    A model that puts a space in front of every text (`add_dummy_prefix`) gives that
    space back in the counts of `piece_bytes`, so bytes per token come out up to one
    byte a text too high; models of `train_sentencepiece` do not.
    """

    kind = "sentencepiece"

    def __init__(self, model_bytes: bytes, name: str):
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

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; begin and end of text are left out."""
        return self._model.decode(np.asarray(ids, np.int64).tolist())

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of byte pieces at the end that only begin a character."""
        values: list[int] = []
        for i in reversed(np.asarray(ids, np.int64)[-_MOST_BYTES:].tolist()):
            if not self._model.is_byte(i):
                break
            values.insert(0, int(self._model.id_to_piece(i)[1:-1], 16))  # <0xE2>
        return _pending_bytes(bytes(values))

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


def _pending_bytes(data: bytes) -> int:
    """The number of bytes at the end of UTF-8 that wait for the rest of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


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


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads the tokenizer "bytes", or one from the path of a SentencePiece .model file.

    Raises:
      UserError: the file does not exist, cannot be read, or is not a model.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec)
    try:
        model_bytes = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer {spec} cannot be read ({error.strerror}); give bytes or the "
            "path of a SentencePiece .model file."
        ) from None
    try:
        return SentencePieceTokenizer(model_bytes, path.name)
    except UserError as error:
        raise UserError(f"tokenizer {spec}: {error}") from None


def save_tokenizer(tokenizer: Tokenizer, directory: str | epath.Path) -> None:
    """Writes `tokenizer.model`; the byte tokenizer needs no file."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        path = epath.Path(directory) / _MODEL_FILE
        path.write_bytes(tokenizer.model_bytes)


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """Identifies a tokenizer in a run's files, as JSON."""
    return {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}


def tokenizer_from_dir(directory: str | epath.Path, kind: str) -> Tokenizer:
    """Loads the tokenizer that `save_tokenizer` put into a directory.

    Raises:
      UserError: an unknown kind, or no valid `tokenizer.model` in the directory.
    """
    if kind not in ("bytes", "sentencepiece"):
        raise UserError(
            f"{directory} names a tokenizer of kind {kind!r}; known are bytes and "
            "sentencepiece."
        )
    path = epath.Path(directory) / _MODEL_FILE
    return load_tokenizer("bytes" if kind == "bytes" else str(path))
