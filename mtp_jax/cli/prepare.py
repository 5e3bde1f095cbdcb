"""The verb `prepare`: text files in, a corpus of token shards out."""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

import rich.console
import rich.progress

from mtp_jax.cli.args import Parser, positive_int, unescape, whole
from mtp_jax.data.conversations import FORMS
from mtp_jax.data.prepare import (
    BLOCK_DOCUMENTS,
    MOST_IN_ONE_ORDER,
    SHARD_TOKENS,
    Advance,
    prepare,
    summary,
)
from mtp_jax.errors import on_terminal


def main(argv: list[str]) -> int:
    """Runs `prepare` with its command line; 0 when the corpus stands.

    Raises:
      UserError: a bad option or bad input; the output folder is then untouched.
    """
    args = _parse(argv)
    told: list[str] = []
    manifest = prepare(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        train_tokenizer=args.train_tokenizer,
        format=args.format,
        chat_form=args.chat_form,
        chat_template=args.chat_template,
        text_field=args.text_field,
        skip_bad=args.skip_bad,
        split_at=args.split_at,
        split_bytes=args.split_bytes,
        exclude=args.exclude,
        heldout=args.heldout,
        shard_tokens=args.shard_tokens,
        block_documents=args.block_documents,
        workers=args.workers,
        force=args.force,
        progress=_bar,
        report=told.append,
    )
    for line in (*summary(manifest), *told):
        print(line)
    # Without "./" and doubled slashes, as messages name folders.
    print(f"corpus in {pathlib.Path(args.output)}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mtp-jax prepare", "Tokenizes text files into a corpus for training."
    )
    parser.usage = "mtp-jax prepare --input=PATH --output=DIR [options]"
    add = parser.add_argument
    add("--input", action="append", required=True, metavar="PATH",
        help="a file or directory of .txt, .md, .rst, .py or .jsonl files, also "
        "with .gz, or .parquet files; may be given several times")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="where the corpus goes")
    add("--tokenizer", default="bytes", metavar="bytes|PATH",
        help="the bytes of UTF-8 (default), a SentencePiece .model file, or a "
        "tokenizer.json or the folder of one")  # fmt: skip
    add("--train_tokenizer", type=positive_int, metavar="V",
        help="train a SentencePiece model of V pieces on the train split")  # fmt: skip
    add("--format", choices=("text", "chat"), default="text",
        help="chat: lines are conversations, of which what the assistant says is "
        "learned")  # fmt: skip
    add("--chat_form", choices=tuple(FORMS), help="of conversations; as found")
    add("--chat_template", metavar="FILE", help="instead of the tokenizer's")
    add("--text_field", default="text", metavar="NAME",
        help="field of the text in .jsonl lines (default text); OUTER.INNER for a "
        "field of a field")  # fmt: skip
    add("--skip_bad", action="store_true",
        help="leave out and count what is not UTF-8, and lines without a text in "
        "that field")  # fmt: skip
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--split_at", type=unescape, metavar="TEXT",
        help=r"cut text files into documents where this stands; \n, \t and \\ are "
        "known")  # fmt: skip
    cut.add_argument("--split_bytes", type=positive_int, metavar="N",
        help="cut text files into documents of at most N bytes, at line "
        "ends")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="NAME",
        help="name or glob of files and directories to leave out; may be given "
        "several times")  # fmt: skip
    add("--heldout", type=_share, default=0.05,
        help="share of documents held out (default 0.05); 0: none")  # fmt: skip
    add("--shard_tokens", type=positive_int, default=SHARD_TOKENS,
        help=f"tokens of a shard (default {SHARD_TOKENS})")  # fmt: skip
    add("--block_documents", type=_count, metavar="N",
        help="order shards, blocks of N documents and documents of a block, so that "
        "the start and memory of a host do not grow with the documents (default "
        f"{BLOCK_DOCUMENTS} for more than {MOST_IN_ONE_ORDER} of them); 0: all in "
        "one order")  # fmt: skip
    add("--workers", type=positive_int, default=os.cpu_count() or 1,
        help="processes (default: one a core)")  # fmt: skip
    add("--force", action="store_true", help="replace an earlier result")
    args = parser.parse_args(argv)
    if not args.output.strip():
        parser.error("--output is empty; name a directory")
    if args.train_tokenizer and args.tokenizer != "bytes":
        parser.error("--tokenizer and --train_tokenizer exclude each other; keep one")
    return args


def _count(text: str) -> int:
    digits = whole(text)
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(digits)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1)")
    return value


@contextlib.contextmanager
def _bar(title: str, size: int) -> Iterator[Advance]:
    """A bar on stderr that advances by bytes read; nothing without a terminal."""
    if not on_terminal(sys.stderr):
        yield lambda read_bytes: None
        return
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=size)
        yield lambda read_bytes: progress.advance(task, read_bytes)
