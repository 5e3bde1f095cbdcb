"""Text files in, a corpus of token shards out.

The output depends on the input files and the options alone, not on how many processes
work: parts of the input are tokenized anywhere and written in order.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mtp_jax.data.chat_template import read_template
from mtp_jax.data.chat_tokenizing import chat_options, check_forms, with_turn_ends
from mtp_jax.data.corpus import (
    LEARNED,
    SPLITS,
    read_manifest,
    token_dtype,
    write_manifest,
)
from mtp_jax.data.documents import ReadOptions, split_into_parts
from mtp_jax.data.input_files import Found, find_files
from mtp_jax.data.output_folder import whole_folder
from mtp_jax.data.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mtp_jax.data.shard_writer import ShardWriter
from mtp_jax.data.tokenized import TaskResult
from mtp_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    with_template,
)
from mtp_jax.data.tokenizing import tokenized, training_texts
from mtp_jax.data.workers import check_workers
from mtp_jax.errors import UserError, counted, disk_errors_told

SHARD_TOKENS = 100_000_000  # of a shard, where nothing else is asked for
BLOCK_DOCUMENTS = 256  # of a block, where a split is ordered by them
# Documents of a split that are still ordered all at once: 70 MB in every process.
MOST_IN_ONE_ORDER = 1 << 22
Advance = Callable[[int], None]  # takes the bytes that were read since the last call
Progress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
_HOW_TO_CUT = (
    ", or cut text files into several, with --split_bytes={} or with --split_at=TEXT "
    "where a text stands between them"
)
StrPath = str | os.PathLike[str]


def prepare(
    inputs: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    tokenizer: str = "bytes",
    train_tokenizer: int | None = None,
    format: str = "text",
    chat_form: str | None = None,
    chat_template: StrPath | None = None,
    text_field: str = "text",
    skip_bad: bool = False,
    split_at: str | None = None,
    split_bytes: int | None = None,
    exclude: Sequence[str] = (),
    heldout: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    block_documents: int | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Tokenizes texts or conversations into a corpus, whole or not at all.

    With several workers, processes are spawned, so a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
      inputs: files or folders of .txt, .md, .rst, .py, .jsonl (also with .gz) or
        .parquet files; a file that is named itself may have any suffix.
      output: folder for the corpus; new, empty, or with `force` an earlier corpus.
      tokenizer: "bytes", or a SentencePiece model, a tokenizer.json, a folder of one.
      train_tokenizer: pieces of a SentencePiece model to be trained on the train split.
      format: "text", or "chat": conversations, whose answers are learned.
      chat_form: the form of the conversations; None: told by their fields.
      chat_template: a file with a chat template instead of the tokenizer's.
      text_field: field of the text in lines; OUTER.INNER for a field of a field.
      skip_bad: leave out and count (`skipped_bad`) what is not UTF-8, and lines without
        a text in that field or a conversation.
      split_at: cut text files where this text stands; it is left out, with line ends.
      split_bytes: cut text files at line ends, into so many bytes at most.
      exclude: names or globs of files and folders to leave out.
      heldout: share of documents held out, in [0, 1); chosen by their content.
      shard_tokens: tokens of a shard, at most; a longer document has its own.
      block_documents: documents of a block, for an order that no host has to hold
        (`order`); 0: none; None: 256 in a split of more than 4,194,304 documents.
      workers: processes; by default one a core. They do not change the output.
      force: replace an earlier corpus, when the new one is complete.
      progress: called with a title and the bytes of the input on disk; returns a
        context manager that gives a function to call with bytes that were read.
      report: called at the end with lines about files and a tokenizer's changes.

    Returns:
      The manifest: tokenizer, splits with shards and counts, skipped_empty, options.

    Raises:
      UserError: a bad option or bad input; the output folder is then untouched.
    """
    _check_options(output, tokenizer, train_tokenizer, heldout)
    _check_counts(train_tokenizer, shard_tokens, block_documents, workers)
    reading = _read_options(text_field, heldout, skip_bad, split_at, split_bytes)
    of_texts = train_tokenizer, split_at, split_bytes, block_documents or None
    reading = chat_options(reading, format, chat_form, chat_template, of_texts)
    names, folder = _names(inputs), pathlib.Path(output)
    progress = progress or _no_progress
    found = find_files(names, list(exclude))
    with disk_errors_told(f"--output={output}"), whole_folder(folder, force) as partial:
        used = _make_tokenizer(tokenizer, train_tokenizer, found, reading, progress)
        used = _templated(used, chat_template)
        with progress("preparing", sum(file.size for file in found.files)) as advance:
            parts = split_into_parts(found.files, reading)
            results = tokenized(parts, used, reading, workers or os.cpu_count() or 1)
            written = _write_shards(partial, results, used, shard_tokens, advance)
        counts = written.counts(skip_bad, block_documents)
        _check_splits(counts, reading, found)
        options = _options(names, exclude, shard_tokens, train_tokenizer, reading)
        ends = _complete(partial, used, written, {**counts, "options": options})
    for line in (*found.summary(), *written.warnings(used), *ends):
        (report or _no_report)(line)
    return read_manifest(folder)


def _templated(tokenizer: Tokenizer, path: StrPath | None) -> Tokenizer:
    """The tokenizer with the chat template of a file, if there is one."""
    if path is None:
        return tokenizer
    return with_template(tokenizer, read_template(os.fspath(path)))


def _complete(
    partial: pathlib.Path, made: Tokenizer, written: "_Written", counts: dict[str, Any]
) -> list[str]:
    """Writes the tokenizer and the manifest; returns lines for people about it."""
    used, lines = with_turn_ends(made, written.turn_ends)
    save_tokenizer(used, partial)
    write_manifest(partial, {"tokenizer": _describe(used), **counts})
    return lines


def _names(inputs: StrPath | Sequence[StrPath]) -> list[str]:
    texts = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    return [os.fspath(path) for path in texts]


def summary(manifest: dict[str, Any]) -> list[str]:
    """Lines for people about a manifest: sizes of both splits, skipped documents."""
    lines = []
    for split, entry in manifest["splits"].items():
        line = (
            f"{split}: {counted(entry['documents'], 'document')}, "
            f"{counted(entry['tokens'], 'token')}, {counted(entry['bytes'], 'byte')}"
        )
        if LEARNED in entry:
            line += f", {counted(entry[LEARNED], 'token')} to learn"
        elif entry["tokens"]:
            line += f", {entry['bytes'] / entry['tokens']:.3f} bytes per token"
        lines.append(line)
    if manifest["skipped_empty"]:
        empty = counted(manifest["skipped_empty"], "empty document")
        lines.append(f"{empty} skipped")
    if bad := manifest.get("skipped_bad"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.items())
        lines.append(f"bad documents skipped: {kinds}")
    return lines


def _check_options(
    output: StrPath, tokenizer: str, train_tokenizer: int | None, heldout: float
) -> None:
    if not os.fspath(output).strip():
        raise UserError("output is empty; name a directory.")
    if train_tokenizer is not None and tokenizer != "bytes":
        raise UserError("tokenizer and train_tokenizer exclude each other; keep one.")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; give a share in [0, 1).")


def _check_counts(
    train_tokenizer: int | None,
    shard_tokens: int,
    block_documents: int | None,
    workers: int | None,
) -> None:
    counts = {
        "train_tokenizer": train_tokenizer,
        "shard_tokens": shard_tokens,
        "workers": workers,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give a whole number above 0.")
    check_workers("workers", workers or 1)
    if block_documents is not None and block_documents < 0:
        raise UserError(f"block_documents is {block_documents}; give 0 or more.")


def _read_options(
    text_field: str,
    heldout: float,
    skip_bad: bool,
    split_at: str | None,
    split_bytes: int | None,
) -> ReadOptions:
    """The options of reading, checked."""
    if split_at is not None and split_bytes is not None:
        raise UserError("split_at and split_bytes exclude each other; keep one.")
    if split_at == "":
        raise UserError("split_at is empty; give the text that stands between two.")
    if split_bytes is not None and split_bytes < 4:
        raise UserError(f"split_bytes is {split_bytes}; a character may have 4 bytes.")
    return ReadOptions(text_field, heldout, skip_bad, split_at, split_bytes)


def _make_tokenizer(
    name: str,
    pieces: int | None,
    found: Found,
    reading: ReadOptions,
    progress: Progress,
) -> Tokenizer:
    if pieces is None:
        return load_tokenizer(name)
    size = sum(file.size for file in found.files)
    with progress("training a tokenizer", size) as advance:
        parts = split_into_parts(found.files, reading)
        texts = training_texts(parts, reading, size, advance)
        # Drawn before the trainer runs: it would swallow an error in the texts.
        model = train_sentencepiece(iter(list(texts)), pieces)
    return SentencePieceTokenizer(model, "tokenizer.model")


@dataclasses.dataclass
class _Written:
    """The content of a manifest that was counted, and texts that came back changed."""

    splits: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped_empty: int = 0
    bad: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    tried: int = 0
    changed: int = 0
    example: str = ""
    forms: dict[str, str] = dataclasses.field(default_factory=dict)
    turn_ends: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )

    def counts(self, skip_bad: bool, block_documents: int | None) -> dict[str, Any]:
        """The entries of the manifest."""
        for entry in self.splits.values():
            size = block_documents
            many = entry["documents"] > MOST_IN_ONE_ORDER
            if size is None and many and LEARNED not in entry:
                size = BLOCK_DOCUMENTS
            if size:
                entry["block_documents"] = size
        counts: dict[str, Any] = {"splits": self.splits}
        counts["skipped_empty"] = self.skipped_empty
        if skip_bad:
            counts["skipped_bad"] = dict(sorted(self.bad.items()))
        return counts

    def warnings(self, tokenizer: Tokenizer) -> list[str]:
        """A line about a tokenizer that does not give texts back as they were."""
        if not self.changed:
            return []
        return [
            f"{tokenizer.name} changes texts: {self.changed:,} of {self.tried:,} that "
            f"were decoded again came back otherwise, for example {self.example}"
        ]


def _write_shards(
    directory: pathlib.Path,
    results: Iterable[TaskResult],
    tokenizer: Tokenizer,
    shard_tokens: int,
    advance: Advance,
) -> _Written:
    """Writes all shards."""
    written = _Written()
    dtype = token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(directory, split, dtype, shard_tokens)
            )
            for split in SPLITS
        }
        for result in results:
            written.skipped_empty += result.n_empty
            written.bad += result.bad
            written.tried += result.tried
            written.changed += len(result.changed)
            written.example = written.example or next(iter(result.changed), "")
            written.forms = {**result.forms, **written.forms}
            written.turn_ends += result.turn_ends
            for document in result.documents:
                writer = writers[document.split]
                writer.add(
                    document.tokens, document.name, document.n_bytes, document.learned
                )
            advance(result.read_bytes)
        check_forms(written.forms)
        written.splits = {split: writer.finish() for split, writer in writers.items()}
    return written


def _check_splits(counts: dict[str, Any], reading: ReadOptions, found: Found) -> None:
    splits, heldout = counts["splits"], reading.heldout
    of_split = {split: entry["documents"] for split, entry in splits.items()}
    total = sum(of_split.values())
    if total == 0:
        bad = sum(counts.get("skipped_bad", {}).values())
        raise UserError(
            f"the corpus is empty: no documents with text in it "
            f"({counts['skipped_empty']} empty ones{f', {bad} bad ones' * (bad > 0)})"
            f"{found.aside}; "
            "give files with text."
        )
    size = sum(entry["bytes"] for entry in splits.values())
    whole = reading.split_at is None and reading.split_bytes is None
    cut = ""
    if whole and not all(file.holds_lines for file in found.files):
        cut = _HOW_TO_CUT.format(max(100, size // 200))
    if of_split["train"] == 0:
        raise UserError(
            f"no documents to train on: all {total}{found.aside} are held out with "
            f"--heldout={heldout}; give more documents or a smaller share{cut}."
        )
    if of_split["heldout"] == 0 and heldout > 0:
        raise UserError(
            f"no held-out documents: none of {total}{found.aside} fell into the share "
            f"--heldout={heldout}; give more documents, a larger share, or "
            f"--heldout=0 for no held-out split{cut}."
        )


def _options(
    names: list[str],
    exclude: Sequence[str],
    shard_tokens: int,
    train_tokenizer: int | None,
    reading: ReadOptions,
) -> dict[str, Any]:
    options = {
        "input": [_without_machine(name) for name in names],
        "exclude": list(exclude),
        "text_field": reading.text_field,
        "heldout": float(reading.heldout),
        "shard_tokens": shard_tokens,
        "train_tokenizer": train_tokenizer,
    }
    # Named only where they are used, so that other manifests stay what they were.
    later = ("skip_bad", "split_at", "split_bytes", "chat", "chat_form")
    return options | {k: getattr(reading, k) for k in later if getattr(reading, k)}


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "kind": tokenizer.kind,
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }


def _without_machine(text: str) -> str:
    """An input as it was given; of an absolute path only the last name."""
    path = pathlib.Path(text)
    return path.name if path.is_absolute() else text


def _no_report(line: str) -> None:
    """Takes a line and does nothing."""


@contextlib.contextmanager
def _no_progress(title: str, size: int) -> Iterator[Advance]:
    yield lambda read_bytes: None
