"""Text files in, a corpus of token shards out.

The output depends on the input files and the options alone, not on how many processes
work: parts of the input are tokenized anywhere and written in order.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.corpus import (
    SPLITS,
    own_files,
    read_manifest,
    token_dtype,
    write_manifest,
)
from mtp_jax.data.documents import InputFile, find_files, split_into_parts
from mtp_jax.data.shard_writer import ShardWriter
from mtp_jax.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_sentencepiece,
)
from mtp_jax.data.tokenizing import ReadOptions, TaskResult, tokenized, training_texts
from mtp_jax.errors import UserError, disk_errors_told

SHARD_TOKENS = 100_000_000  # of a shard, where nothing else is asked for
Advance = Callable[[int], None]  # takes the bytes that were read since the last call
Progress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
StrPath = str | os.PathLike[str]


def prepare(
    inputs: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    tokenizer: str = "bytes",
    train_tokenizer: int | None = None,
    text_field: str = "text",
    exclude: Sequence[str] = (),
    heldout: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenizes text files into a corpus and returns its manifest.

    The folder appears complete or not at all. With several workers, processes are
    spawned, so a script that calls this needs `if __name__ == "__main__":`.

    Args:
      inputs: a file or folder, or several, of .txt, .md, .rst, .py or .jsonl files,
        also with .gz; a file that is named itself may have any suffix.
      output: folder for the corpus; new, empty, or with `force` an earlier corpus.
      tokenizer: "bytes" of UTF-8, or the path of a SentencePiece model.
      train_tokenizer: pieces of a SentencePiece model to be trained on the train split.
      text_field: field of the text in .jsonl lines.
      exclude: names or globs of files and folders to leave out.
      heldout: share of documents held out, in [0, 1); chosen by their content.
      shard_tokens: tokens of a shard, at most; a longer document has its own.
      workers: processes; by default one a core. They do not change the output.
      force: replace an earlier corpus, when the new one is complete.
      progress: called with a title and the bytes of the input on disk; returns a
        context manager that gives a function to call with bytes that were read.

    Returns:
      The content of the corpus's `manifest.json`: tokenizer, splits with their shards
      and numbers of documents, tokens and bytes, skipped_empty, options.

    Raises:
      UserError: a bad option or bad input; the output folder is then untouched.
    """
    _check_options(output, tokenizer, train_tokenizer, heldout, shard_tokens, workers)
    texts = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    names = [os.fspath(path) for path in texts]
    folder = pathlib.Path(output)
    _check_output(folder, force)
    files = find_files(names, list(exclude))
    reading = ReadOptions(text_field, heldout)
    progress = progress or _no_progress
    used = _make_tokenizer(tokenizer, train_tokenizer, files, reading, progress)
    partial = _make_partial(folder)
    with _removed(partial), disk_errors_told(f"--output={output}"):
        size = sum(file.size for file in files)
        with progress("preparing", size) as advance:
            parts = split_into_parts(files)
            results = tokenized(parts, used, reading, workers or os.cpu_count() or 1)
            counts = _write_shards(
                partial, results, token_dtype(used.vocab_size), shard_tokens, advance
            )
        _check_splits(counts["splits"], counts["skipped_empty"], heldout)
        save_tokenizer(used, partial)
        options = {
            "input": [_without_machine(name) for name in names],
            "exclude": list(exclude),
            "text_field": text_field,
            "heldout": float(heldout),
            "shard_tokens": shard_tokens,
            "train_tokenizer": train_tokenizer,
        }
        described = {"tokenizer": _describe(used), **counts, "options": options}
        write_manifest(partial, described)
        _put_in_place(partial, folder)
    return read_manifest(folder)


def summary(manifest: dict[str, Any]) -> list[str]:
    """Lines for people about a manifest: the sizes of both splits, what was skipped."""
    lines = []
    for split, entry in manifest["splits"].items():
        line = (
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['bytes']:,} bytes"
        )
        if entry["tokens"]:
            line += f", {entry['bytes'] / entry['tokens']:.3f} bytes per token"
        lines.append(line)
    if manifest["skipped_empty"]:
        lines.append(f"{manifest['skipped_empty']:,} empty documents skipped")
    return lines


def _check_options(
    output: StrPath,
    tokenizer: str,
    train_tokenizer: int | None,
    heldout: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    if not os.fspath(output).strip():
        raise UserError("output is empty; name a directory.")
    if train_tokenizer is not None and tokenizer != "bytes":
        raise UserError("tokenizer and train_tokenizer exclude each other; keep one.")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; give a share in [0, 1).")
    counts = {
        "train_tokenizer": train_tokenizer,
        "shard_tokens": shard_tokens,
        "workers": workers,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give a whole number above 0.")


def _check_output(output: pathlib.Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a directory.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        foreign = {path.name for path in output.iterdir()} - own_files(output)
    except (UserError, LookupError, TypeError, AttributeError):
        foreign = {path.name for path in output.iterdir()}
    if foreign:
        raise UserError(
            f"--output={output} holds something that prepare did not write "
            f"({min(foreign)}); name another directory."
        )
    if not force:
        raise UserError(
            f"--output={output} holds a corpus already; name another directory, or "
            "replace it with --force."
        )


def _make_partial(output: pathlib.Path) -> pathlib.Path:
    """A folder beside the output, on the same disk, to be renamed when complete."""
    partial = output.parent / f".{output.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be written ({error.strerror}); name a directory "
            "that can."
        ) from None
    return partial


@contextlib.contextmanager
def _removed(partial: pathlib.Path) -> Iterator[None]:
    """Removes what is left of an unfinished folder at the end."""
    try:
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: pathlib.Path, output: pathlib.Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        replaced = partial.with_suffix(".replaced")
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced)
    else:
        partial.rename(output)


def _make_tokenizer(
    name: str,
    pieces: int | None,
    files: list[InputFile],
    reading: ReadOptions,
    progress: Progress,
) -> Tokenizer:
    if pieces is None:
        return load_tokenizer(name)
    size = sum(file.size for file in files)
    with progress("training a tokenizer", size) as advance:
        texts = training_texts(split_into_parts(files), reading, size, advance)
        # Drawn before the trainer runs: it would swallow an error in the texts.
        model = train_sentencepiece(iter(list(texts)), pieces)
    return SentencePieceTokenizer(model, "tokenizer.model")


def _write_shards(
    directory: pathlib.Path,
    results: Iterable[TaskResult],
    dtype: np.dtype,
    shard_tokens: int,
    advance: Advance,
) -> dict[str, Any]:
    """Writes all shards; returns `splits` and `skipped_empty` of the manifest."""
    skipped_empty = 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(directory, split, dtype, shard_tokens)
            )
            for split in SPLITS
        }
        for result in results:
            skipped_empty += result.n_empty
            for document in result.documents:
                writer = writers[document.split]
                writer.add(document.tokens, document.name, document.n_bytes)
            advance(result.read_bytes)
        splits = {split: writer.finish() for split, writer in writers.items()}
    return {"splits": splits, "skipped_empty": skipped_empty}


def _check_splits(splits: dict[str, Any], skipped_empty: int, heldout: float) -> None:
    counts = {split: entry["documents"] for split, entry in splits.items()}
    total = sum(counts.values())
    if total == 0:
        raise UserError(
            f"the corpus is empty: no documents with text in it ({skipped_empty} empty "
            "ones); give files with text."
        )
    if counts["train"] == 0:
        raise UserError(
            f"no documents to train on: all {total} are held out with "
            f"--heldout={heldout}; give more documents or a smaller share."
        )
    if counts["heldout"] == 0 and heldout > 0:
        raise UserError(
            f"no held-out documents: none of {total} fell into the share "
            f"--heldout={heldout}; give more documents, a larger share, or "
            "--heldout=0 for no held-out split."
        )


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


@contextlib.contextmanager
def _no_progress(title: str, size: int) -> Iterator[Advance]:
    yield lambda read_bytes: None
