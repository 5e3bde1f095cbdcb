"""Documents from text files.

A text file is one document, or several if it is cut; a line of a .jsonl file is one.
Both may be gzipped, and may begin with a byte order mark, which is left out. A row of a
.parquet file is one, too; rows go to workers as lines of JSON.
"""

import collections
import contextlib
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

from mtp_jax.data.conversations import FIELDS
from mtp_jax.data.input_files import InputFile
from mtp_jax.errors import UserError

_BLOCK_BYTES = 4_000_000  # of text that is read, and sent to a worker, together
_BATCH_ROWS = 1000  # of a .parquet file, in a part
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_END = "or leave out what cannot be read with --skip_bad"


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Options that decide what is a document, and the split that it goes to."""

    text_field: str  # of .jsonl lines; with dots, a field of a field
    heldout: float  # share of documents
    skip_bad: bool = False  # leave out documents that cannot be read, and count them
    split_at: str | None = None  # a text at which text files are cut, and which goes
    split_bytes: int | None = None  # of a piece of a text file, at most; cut at lines
    chat: bool = False  # documents are conversations
    chat_form: str | None = None  # in which they are; None: told by their fields


@dataclasses.dataclass(frozen=True)
class Part:
    """A whole text file, still unread, or pieces of one, or lines of a .jsonl file."""

    file: InputFile
    read_bytes: int  # bytes on disk that this part stands for
    # None: the whole file, one document. Else (number of its first line, text).
    pieces: tuple[tuple[int, bytes], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Bad:
    """A document that cannot be read."""

    kind: str  # for counting
    message: str  # where it is, what is wrong, and what would be right


def split_into_parts(files: list[InputFile], options: ReadOptions) -> Iterator[Part]:
    """Cuts files into parts that can be read or parsed apart from each other.

    Raises:
      UserError: a file that is cut cannot be read.
    """
    cut = options.split_at is not None or options.split_bytes is not None
    for file in files:
        if file.holds_rows:
            yield from _parts_of_rows(file, options)
            continue
        if not (file.holds_lines or cut):
            yield Part(file, file.size)
            continue
        try:
            with open(file.path, "rb") as raw, _unpacked(file, raw) as stream:
                position = 0
                for pieces in _blocks(file, stream, options):
                    yield Part(file, raw.tell() - position, pieces)
                    position = raw.tell()
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None


def documents_of(
    part: Part, options: ReadOptions, bad: collections.Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, UTF-8 bytes) of each document of a part; some may be empty.

    Args:
      part: of the input.
      options: how to read it.
      bad: counts what cannot be read, by kind, if it is to be skipped.

    Raises:
      UserError: a file that cannot be read; where nothing is to be skipped, also a text
        that is not UTF-8, or a line that is not a JSON object with a text in its field.
    """
    for name, text in _texts(part, options):
        if not isinstance(text, Bad):
            yield name, text
        elif options.skip_bad:
            bad[text.kind] += 1
        else:
            raise UserError(text.message)


def records_of(
    part: Part, options: ReadOptions, bad: collections.Counter[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (name, place for messages, object) of each line of a part.

    Args:
      part: of a file that holds lines.
      options: how to read it.
      bad: counts what cannot be read, by kind, if it is to be skipped.

    Raises:
      UserError: where nothing is to be skipped, a line that is not a JSON object.
    """
    for name, where, line in _lines(part):
        record = _record_of_line(line, where)
        if not isinstance(record, Bad):
            yield name, where, record
        elif options.skip_bad:
            bad[record.kind] += 1
        else:
            raise UserError(record.message)


def _lines(part: Part) -> Iterator[tuple[str, str, bytes]]:
    """Yields (name, place for messages, content) of the lines that are not empty."""
    for first_line, lines in part.pieces or ():
        for number, line in enumerate(lines.split(b"\n"), first_line):
            if line.strip():
                yield f"{part.file.name}:{number}", f"{part.file.path}:{number}", line


def _texts(part: Part, options: ReadOptions) -> Iterator[tuple[str, bytes | Bad]]:
    file = part.file
    if part.pieces is None:
        text = _read(file).removeprefix(_BYTE_ORDER_MARK)
        yield file.name, _not_utf8(text, str(file.path)) or text
    elif not file.holds_lines:
        for number, text in part.pieces:
            yield f"{file.name}:{number}", _not_utf8(text, f"{file.path}") or text
    else:
        for name, where, line in _lines(part):
            yield name, _text_of_line(line, options.text_field, where)


def _parts_of_rows(file: InputFile, options: ReadOptions) -> Iterator[Part]:
    """The rows of a .parquet file as lines of JSON, in parts.

    Raises:
      UserError: it cannot be read, or pyarrow is not there.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.path} needs pyarrow to be read: pip install 'mtp-jax[parquet]', or "
            f"leave it out with --exclude={file.path.name}."
        ) from None
    wanted = {*FIELDS, *options.text_field.split(".")[:1], options.text_field}
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        names = [name for name in table.schema_arrow.names if name in wanted]
        # None of them: then all, for a message about what there is.
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=names or None)
        first, total, done = 1, max(table.metadata.num_rows, 1), 0
        for batch in batches:
            rows = [json.dumps(row, default=str) for row in batch.to_pylist()]
            lines = "\n".join(rows).encode()
            before, done = done, done + len(rows)
            read = file.size * done // total - file.size * before // total
            yield Part(file, read, ((first, lines),))
            first += len(rows)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file.path} cannot be read ({reason}); mend it, or leave it out with "
            f"--exclude={file.path.name}."
        ) from None


def _unpacked(file: InputFile, raw: IO[bytes]) -> contextlib.AbstractContextManager:
    return gzip.GzipFile(fileobj=raw) if file.gzipped else contextlib.nullcontext(raw)


def _blocks(
    file: InputFile, stream: IO[bytes], options: ReadOptions
) -> Iterator[tuple[tuple[int, bytes], ...]]:
    """Yields the pieces of a file, about as many together as are worth sending."""
    if file.holds_lines:
        yield from ((block,) for block in _blocks_of_lines(stream))
        return
    together: list[tuple[int, bytes]] = []
    size = 0
    for piece in _pieces(stream, options):
        together.append(piece)
        size += len(piece[1])
        if size >= _BLOCK_BYTES:
            yield tuple(together)
            together, size = [], 0
    yield tuple(together)


def _blocks_of_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields blocks that end with a line, each with the number of its first line."""
    first_line = 1
    while block := stream.read(_BLOCK_BYTES):
        # Only a line feed ends a line: U+2028 and its like may stand inside the
        # strings of JSON.
        lines = block + stream.readline()
        without = lines.removeprefix(_BYTE_ORDER_MARK) if first_line == 1 else lines
        yield first_line, without
        first_line += lines.count(b"\n")


def _pieces(stream: IO[bytes], options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """Yields the pieces of a text that is cut, each with the number of its line."""
    if options.split_at is not None:
        separator = options.split_at.encode()
        cut = _cut_at(stream, separator)
    else:
        separator = b""
        cut = _cut_by_size(stream, options.split_bytes or _BLOCK_BYTES)
    line = 1
    for i, piece in enumerate(cut):
        text = piece.removeprefix(_BYTE_ORDER_MARK) if i == 0 else piece
        if separator:  # line ends beside it belong to it
            text = text.lstrip(b"\r\n")
            before = piece[: len(piece) - len(text)].count(b"\n")
            text = text.rstrip(b"\r\n")
        else:
            before = 0
        if text.strip():
            yield line + before, text
        line += (piece + separator).count(b"\n")


def _cut_at(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """Yields what stands between separators."""
    held, searched = bytearray(), 0
    while block := stream.read(_BLOCK_BYTES):
        held += block
        begin = 0
        while (end := held.find(separator, max(searched, begin))) >= 0:
            yield bytes(held[begin:end])
            begin = end + len(separator)
        del held[:begin]
        searched = max(0, len(held) - len(separator) + 1)
    yield bytes(held)


def _cut_by_size(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """Yields a text in pieces of at most `size` bytes, at least 4 for a character."""
    held = b""
    while block := stream.read(max(_BLOCK_BYTES, size)):
        held += block
        begin = 0
        while len(held) - begin > size:
            end = _end_of_piece(held, begin, size)
            yield held[begin:end]
            begin = end
        held = held[begin:]
    yield held


def _end_of_piece(text: bytes, begin: int, size: int) -> int:
    """The last end of a line that is near enough, else of a word, of a character."""
    limit = begin + size
    for end in (b"\n", b" "):
        after = text.rfind(end, begin, limit) + 1
        if after > begin:
            return after
    for back in range(4):  # the other bytes of a character of UTF-8 are 0b10......
        if text[limit - back] & 0xC0 != 0x80:
            return limit - back
    return limit


def _read(file: InputFile) -> bytes:
    try:
        data = file.path.read_bytes()
        return gzip.decompress(data) if file.gzipped else data
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: InputFile, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"{file.path} cannot be read ({reason}); mend it, or leave it out with "
        f"--exclude={file.path.name}."
    )


def _not_utf8(data: bytes, where: str) -> Bad | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Bad(
            "not UTF-8",
            f"{where} is not UTF-8 at byte {error.start} ({data[error.start]:#04x}); "
            f"convert it, leave the file out with --exclude=NAME, {_END}.",
        )
    return None


def _record_of_line(line: bytes, where: str) -> dict[str, Any] | Bad:
    if bad := _not_utf8(line, where):
        return bad
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return Bad(
            "not JSON",
            f"{where} is not JSON ({error}); give one object a line, {_END}.",
        )
    if not isinstance(record, dict):
        return Bad(
            "not an object",
            f"{where} is not a JSON object; give one a line, {_END}.",
        )
    return record


def _text_of_line(line: bytes, text_field: str, where: str) -> bytes | Bad:
    record = _record_of_line(line, where)
    if isinstance(record, Bad):
        return record
    try:
        text = _field(record, text_field)
    except LookupError:
        return Bad(
            "lack the field",
            f"{where} has no field {text_field!r}; it has "
            f"{', '.join(record) or 'none'}: name the field of the text with "
            f"--text_field (OUTER.INNER for a field of a field), {_END}.",
        )
    if not isinstance(text, str):
        return Bad(
            "null" if text is None else "not a string",
            f"{where}: field {text_field!r} is not a string; repair the line, {_END}.",
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        return Bad(
            "half a surrogate pair",
            f"{where}: character {error.start} of field {text_field!r} is half of a "
            f"surrogate pair, which no UTF-8 text can hold; repair the line, {_END}.",
        )


def _field(record: dict, name: str) -> object:
    """The field of this very name, else the one that it leads to by its dots.

    Raises:
      LookupError: there is neither.
    """
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        if not isinstance(value, dict):
            raise LookupError
        value = value[part]
    return value
