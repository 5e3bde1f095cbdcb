"""Documents from text files: the files of a command line, cut into documents.

A text file is one document; a line of a .jsonl file is one. All may be gzipped.
"""

import dataclasses
import fnmatch
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator

from mtp_jax.errors import UserError

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_LINES_SUFFIX = ".jsonl"
_ALWAYS_EXCLUDED = ("__pycache__", ".*")
_BLOCK_BYTES = 4_000_000  # of lines that are read, and sent to a worker, together


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read, and the name of its documents."""

    path: pathlib.Path
    name: str
    size: int  # bytes on disk

    @property
    def holds_lines(self) -> bool:
        return _suffix(self.path) == _LINES_SUFFIX

    @property
    def gzipped(self) -> bool:
        return self.path.name.lower().endswith(".gz")


@dataclasses.dataclass(frozen=True)
class Part:
    """A whole text file, still unread, or some lines of a .jsonl file."""

    file: InputFile
    read_bytes: int  # bytes on disk that this part stands for
    lines: bytes | None = None  # None: the whole file, one document
    first_line: int = 1


def find_files(inputs: list[str], excluded: list[str]) -> list[InputFile]:
    """Lists the files of `inputs` in the order given, those of a directory sorted.

    Args:
      inputs: files, of any suffix, and directories, of which the known suffixes count.
      excluded: names or globs; a file or folder below an input that matches one is
        left out, like hidden ones and `__pycache__`.

    Raises:
      UserError: an input does not exist, or there is no file in all of them.
    """
    found: dict[str, InputFile] = {}  # by real path: no file counts twice
    for text in inputs:
        root = pathlib.Path(text)
        if root.is_dir():
            paths = sorted(_walk(root, [*excluded, *_ALWAYS_EXCLUDED]))
        elif root.is_file():
            paths = [] if _matches(root.name, excluded) else [root]
        else:
            raise UserError(f"--input={text} does not exist; give a file or directory.")
        for path in paths:
            name = path.relative_to(root.parent).as_posix()
            file = InputFile(path, name, path.stat().st_size)
            found.setdefault(os.path.realpath(path), file)
    if not found:
        raise UserError(
            f"there is no file to read in {', '.join(inputs)}; known are "
            f"{', '.join((*_TEXT_SUFFIXES, _LINES_SUFFIX))}, also with .gz, and any "
            "text file that --input names itself."
        )
    return list(found.values())


def split_into_parts(files: list[InputFile]) -> Iterator[Part]:
    """Cuts files into parts that can be read or parsed apart from each other.

    Raises:
      UserError: a .jsonl file cannot be read.
    """
    for file in files:
        if not file.holds_lines:
            yield Part(file, file.size)
            continue
        try:
            yield from _line_parts(file)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None


def documents_of(part: Part, text_field: str) -> Iterator[tuple[str, bytes]]:
    """Yields (name, UTF-8 bytes) of each document of a part; some may be empty.

    Raises:
      UserError: a file that cannot be read or is not UTF-8, or a line that is not a
        JSON object with a text in `text_field`.
    """
    if part.lines is None:
        text = _read(part.file)
        _check_utf8(text, str(part.file.path))
        yield part.file.name, text
        return
    for number, line in enumerate(part.lines.split(b"\n"), part.first_line):
        if line.strip():
            text = _text_of_line(line, text_field, f"{part.file.path}:{number}")
            yield f"{part.file.name}:{number}", text


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _walk(root: pathlib.Path, excluded: list[str]) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _matches(name, excluded)]
        for name in names:
            path = pathlib.Path(folder, name)
            known = _suffix(path) in (*_TEXT_SUFFIXES, _LINES_SUFFIX)
            if known and not _matches(name, excluded) and path.is_file():
                yield path


def _line_parts(file: InputFile) -> Iterator[Part]:
    with open(file.path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.gzipped else raw
        first_line = 1
        position = 0
        while block := stream.read(_BLOCK_BYTES):
            # A block ends with a line, and only a line feed ends one: U+2028 and
            # its like may stand inside the strings of JSON.
            lines = block + stream.readline()
            yield Part(file, raw.tell() - position, lines, first_line)
            position = raw.tell()
            first_line += lines.count(b"\n")


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


def _check_utf8(data: bytes, where: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {error.start} ({data[error.start]:#04x}); "
            "convert it, or leave the file out with --exclude=NAME."
        ) from None


def _text_of_line(line: bytes, text_field: str, where: str) -> bytes:
    _check_utf8(line, where)
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); one object a line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; one object a line.")
    if text_field not in record:
        raise UserError(
            f"{where} has no field {text_field!r}; it has {', '.join(record) or 'none'}"
            ": name the field of the text with --text_field."
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is not a string.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of field {text_field!r} is half of a "
            "surrogate pair, which no UTF-8 text can hold; repair the line."
        ) from None
