"""Text to token ids and back: bytes, a SentencePiece model, or a tokenizer.json.

Texts round-trip exactly with the byte tokenizer and with every model that
`train_sentencepiece` makes. A model from elsewhere keeps its own normalisation.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from mtp_jax.data.sentencepiece_tokenizer import (
    MODEL_FILE,
    TEMPLATE_FILE,
    SentencePieceTokenizer,
    template_files,
)
from mtp_jax.data.utf8 import MOST_BYTES, pending_bytes
from mtp_jax.errors import UserError

KINDS = ("bytes", "sentencepiece", "tokenizer.json")


class Tokenizer(Protocol):
    """The interface of a tokenizer, as the rest of the package uses it."""

    kind: str  # of KINDS
    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    files: Mapping[str, bytes]  # all that it is made of, by the names of the files
    fingerprint: str  # equal for two tokenizers that give the same ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids each of which ends a text that is generated; `eos_id` first."""
        ...

    @property
    def prompt_begin(self) -> tuple[int, ...]:
        """The ids in front of a prompt: `bos_id`, or none."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that makes a text of a conversation; None: there is none."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens], without begin and end of text."""
        ...

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, int32 [tokens], and the characters of each, int32 [tokens, 2].

        Those from the first number up to the second.
        """
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

    def __init__(self, chat_template: str | None = None):
        """Needs nothing; a chat template comes with it where it is given."""
        self.chat_template = chat_template
        self.files: Mapping[str, bytes] = template_files(chat_template)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """End of text alone."""
        return (self.eos_id,)

    @property
    def prompt_begin(self) -> tuple[int, ...]:
        """Begin of text."""
        return (self.bos_id,)

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text, int32 [bytes]."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, int32 [bytes], and the character of each, int32 [bytes, 2]."""
        sizes = [len(character.encode()) for character in text]
        first = np.repeat(np.arange(len(text), dtype=np.int32), sizes)
        return self.encode(text), np.stack([first, first + 1], axis=1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        values = np.asarray(ids, np.int64)
        special = (values == self.bos_id) | (values == self.eos_id)
        return bytes(values[~special].tolist()).decode(errors="replace")

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of bytes at the end that begin a character and do not end it."""
        return pending_bytes(bytes(np.asarray(ids, np.int64)[-MOST_BYTES:].tolist()))

    def piece_bytes(self) -> np.ndarray:
        """1 for each byte, 0 for begin and end of text, int32 [256]."""
        sizes_V = np.ones(self.vocab_size, np.int32)
        sizes_V[[self.bos_id, self.eos_id]] = 0
        return sizes_V


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads the tokenizer "bytes", or one from files.

    Args:
      spec: "bytes"; a SentencePiece .model file; a tokenizer.json, with the files
        beside it; or a folder that has one of the two, of which tokenizer.json counts.

    Raises:
      UserError: the file does not exist, cannot be read, or is no tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec)
    try:
        if path.is_dir():
            path = _in_folder(path)
        files = _read(path)
    except OSError as error:
        raise UserError(
            f"tokenizer {spec} cannot be read ({error.strerror}); give bytes, the "
            "path of a SentencePiece .model file, or a folder with tokenizer.json."
        ) from None
    kind = "sentencepiece" if MODEL_FILE in files else "tokenizer.json"
    try:
        return tokenizer_of(kind, files, path.name)
    except UserError as error:
        raise UserError(f"tokenizer {spec}: {error}") from None


def _in_folder(folder: epath.Path) -> epath.Path:
    """The file of a folder that makes it one of a tokenizer."""
    names = ("tokenizer.json", MODEL_FILE)
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"tokenizer {folder} is a folder without {' or '.join(names)}; give one that "
        "has it, bytes, or the path of a SentencePiece .model file."
    )


def _read(path: epath.Path) -> dict[str, bytes]:
    """The files of the tokenizer at a path, by the names that they are kept under.

    Raises:
      OSError: one that is there cannot be read.
    """
    if path.suffix.lower() != ".json":
        files = {MODEL_FILE: path.read_bytes()}
        if (template := path.parent / TEMPLATE_FILE).exists():
            files[TEMPLATE_FILE] = template.read_bytes()
        return files
    from mtp_jax.data import json_tokenizer

    files = {json_tokenizer.RULES: path.read_bytes()}
    for name in (*json_tokenizer.FILES[1:], json_tokenizer.MODEL):
        if (beside := path.parent / name).exists():
            files[name] = beside.read_bytes()
    of_model = files.pop(json_tokenizer.MODEL, None)
    stops = None if of_model is None else json_tokenizer.stops_of_model(of_model)
    if stops is not None:
        files.setdefault(json_tokenizer.GENERATION, stops)
    return files


def tokenizer_of(kind: str, files: Mapping[str, bytes], name: str) -> Tokenizer:
    """Makes a tokenizer of its kind and the content of its files.

    Raises:
      UserError: the files are not those of a tokenizer of this kind.
    """
    try:
        template = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else None
    except UnicodeDecodeError:
        raise UserError(f"{TEMPLATE_FILE} of {name} is not UTF-8.") from None
    if kind == "bytes":
        return ByteTokenizer(template)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(files[MODEL_FILE], name, template)
    # Not read where no such tokenizer is used.
    from mtp_jax.data.json_tokenizer import JsonTokenizer

    return JsonTokenizer(files, name)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A tokenizer with another chat template.

    Raises:
      UserError: its files are damaged.
    """
    files = {**tokenizer.files, TEMPLATE_FILE: template.encode()}
    return tokenizer_of(tokenizer.kind, files, tokenizer.name)


def save_tokenizer(tokenizer: Tokenizer, directory: str | epath.Path) -> None:
    """Writes the files of a tokenizer; that of bytes alone needs none."""
    for name, content in tokenizer.files.items():
        (epath.Path(directory) / name).write_bytes(content)


def tokenizer_files(kind: str) -> set[str]:
    """Names of all files that `save_tokenizer` may write for a kind."""
    if kind != "tokenizer.json":
        return {MODEL_FILE, TEMPLATE_FILE}
    from mtp_jax.data.json_tokenizer import FILES

    return set(FILES)


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """Identifies a tokenizer in a run's files, as JSON."""
    return {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}


def tokenizer_from_dir(directory: str | epath.Path, kind: str) -> Tokenizer:
    """Loads the tokenizer that `save_tokenizer` put into a directory.

    Raises:
      UserError: an unknown kind, or no valid tokenizer of it in the directory.
    """
    if kind not in KINDS:
        raise UserError(
            f"{directory} names a tokenizer of kind {kind!r}; known are "
            f"{', '.join(KINDS[:-1])} and {KINDS[-1]}."
        )
    folder = epath.Path(directory)
    if kind == "bytes":
        template = folder / TEMPLATE_FILE
        files = {TEMPLATE_FILE: template.read_bytes()} if template.exists() else {}
        return tokenizer_of(kind, files, kind)
    return load_tokenizer(str(folder / (MODEL_FILE if kind == KINDS[1] else kind)))
