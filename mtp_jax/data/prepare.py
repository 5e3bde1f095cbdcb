"""The verb `prepare`: text files in, a corpus of token shards out.

The output depends on the input files and the options alone, not on how many processes
work: parts of the input are tokenized anywhere and written in order.
"""

import argparse
import contextlib
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import rich.console
import rich.progress

from mtp_jax.cli.args import Parser, positive_int
from mtp_jax.data.corpus import SPLITS, own_files, token_dtype, write_manifest
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
from mtp_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Runs `prepare` with its command line; 0 when the corpus stands.

    Raises:
      UserError: a bad option or bad input; the output folder is then untouched.
    """
    args = _parse(argv)
    output = pathlib.Path(args.output)
    _check_output(output, args.force)
    files = find_files(args.input, args.exclude)
    reading = ReadOptions(args.text_field, args.heldout)
    tokenizer = _make_tokenizer(args, files, reading)
    partial = _make_partial(output)
    try:
        size = sum(file.size for file in files)
        with _progress("preparing", size) as advance:
            parts = split_into_parts(files)
            results = tokenized(parts, tokenizer, reading, args.workers)
            counts = _write_shards(partial, results, tokenizer, args, advance)
        save_tokenizer(tokenizer, partial)
        manifest = _describe(tokenizer, counts, args)
        write_manifest(partial, manifest)
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print_summary(manifest, output)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mtp-jax prepare", "Tokenizes text files into a corpus for training."
    )
    add = parser.add_argument
    add("--input", action="append", required=True, metavar="PATH",
        help="a file or directory of .txt, .md, .rst, .py or .jsonl files, also "
        "with .gz; may be given several times")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="where the corpus goes")
    add("--tokenizer", default="bytes", metavar="bytes|FILE.model",
        help="the bytes of UTF-8 (default), or a SentencePiece model")  # fmt: skip
    add("--train_tokenizer", type=positive_int, metavar="V",
        help="train a SentencePiece model of V pieces on the train split")  # fmt: skip
    add("--text_field", default="text", help="field of the text in .jsonl lines")
    add("--exclude", action="append", default=[], metavar="NAME",
        help="name or glob of files and directories to leave out; may be given "
        "several times")  # fmt: skip
    add("--heldout", type=_share, default=0.05,
        help="share of documents held out (default 0.05); 0: none")  # fmt: skip
    add("--shard_tokens", type=positive_int, default=100_000_000,
        help="tokens of a shard (default 100000000)")  # fmt: skip
    add("--workers", type=positive_int, default=os.cpu_count() or 1,
        help="processes (default: one a core)")  # fmt: skip
    add("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_args(argv)
    if not args.output.strip():
        parser.error("--output is empty; name a directory")
    if args.train_tokenizer and args.tokenizer != "bytes":
        parser.error("--tokenizer and --train_tokenizer exclude each other; keep one")
    return args


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1)")
    return value


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


def _put_in_place(partial: pathlib.Path, output: pathlib.Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        replaced = partial.with_suffix(".replaced")
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced)
    else:
        partial.rename(output)


def _make_tokenizer(
    args: argparse.Namespace, files: list[InputFile], reading: ReadOptions
) -> Tokenizer:
    if not args.train_tokenizer:
        return load_tokenizer(args.tokenizer)
    size = sum(file.size for file in files)
    with _progress("training a tokenizer", size) as advance:
        texts = training_texts(split_into_parts(files), reading, size, advance)
        # Drawn before the trainer runs: it would swallow an error in the texts.
        model = train_sentencepiece(iter(list(texts)), args.train_tokenizer)
    return SentencePieceTokenizer(model, "tokenizer.model")


def _write_shards(
    directory: pathlib.Path,
    results: Iterable[TaskResult],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Writes all shards; what the manifest says of them."""
    dtype = token_dtype(tokenizer.vocab_size)
    skipped_empty = 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(directory, split, dtype, args.shard_tokens)
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
    _check_splits(splits, skipped_empty, args.heldout)
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


def _describe(
    tokenizer: Tokenizer, counts: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        **counts,
        "options": {
            "input": [_without_machine(text) for text in args.input],
            "exclude": args.exclude,
            "text_field": args.text_field,
            "heldout": args.heldout,
            "shard_tokens": args.shard_tokens,
            "train_tokenizer": args.train_tokenizer,
        },
    }


def _without_machine(text: str) -> str:
    """An input as it was given; of an absolute path only the last name."""
    path = pathlib.Path(text)
    return path.name if path.is_absolute() else text


@contextlib.contextmanager
def _progress(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that advances by bytes read; nothing without a terminal."""
    console = rich.console.Console(stderr=True)
    hidden = not sys.stderr.isatty()
    with rich.progress.Progress(
        console=console, disable=hidden, transient=True
    ) as progress:
        task = progress.add_task(title, total=size)
        yield lambda read_bytes: progress.advance(task, read_bytes)


def _print_summary(manifest: dict[str, Any], output: pathlib.Path) -> None:
    for split, entry in manifest["splits"].items():
        line = (
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['bytes']:,} bytes"
        )
        if entry["tokens"]:
            line += f", {entry['bytes'] / entry['tokens']:.3f} bytes per token"
        print(line)
    if manifest["skipped_empty"]:
        print(f"{manifest['skipped_empty']:,} empty documents skipped")
    print(f"corpus in {output}")
