"""Tokenizes parts of the input, in order, on several processes."""

import collections
import concurrent.futures
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mtp_jax.data.chat_tokenizing import tokenize_conversations
from mtp_jax.data.corpus import token_dtype
from mtp_jax.data.documents import Part, ReadOptions, documents_of
from mtp_jax.data.tokenized import TaskResult, Tokenized, split_of
from mtp_jax.data.tokenizer import Tokenizer, tokenizer_of
from mtp_jax.distributed.lifetime import end_with_parent, signals_held

_TASK_BYTES = 4_000_000  # of input a worker takes at once
_TASK_PARTS = 256
_TRIED_BYTES = 50_000  # of each task, to see if the tokenizer gives texts back
_TRAINING_BYTES = 200_000_000  # of text that a tokenizer is trained on, about


def training_texts(
    parts: Iterable[Part],
    options: ReadOptions,
    size: int,
    advance: Callable[[int], None],
) -> Iterator[str]:
    """Yields texts of the train split; of a large input a share, chosen by content.

    Args:
      parts: the input.
      options: how to read it.
      size: bytes of the input on disk, about.
      advance: called with the bytes that were read.
    """
    share = min(1.0, _TRAINING_BYTES / max(size, 1))
    for part in parts:
        for _, text in documents_of(part, options, collections.Counter()):
            digest = hashlib.blake2b(text, digest_size=8, key=b"tokenizer").digest()
            chosen = int.from_bytes(digest, "little") < share * 2**64
            if chosen and split_of(text, options.heldout) == "train":
                yield text.decode()
        advance(part.read_bytes)


def _grouped(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Groups parts into tasks worth sending to a worker."""
    task: list[Part] = []
    for part in parts:
        task.append(part)
        if len(task) == _TASK_PARTS or sum(p.read_bytes for p in task) >= _TASK_BYTES:
            yield task
            task = []
    if task:
        yield task


def _tokenize(
    task: list[Part], tokenizer: Tokenizer, options: ReadOptions
) -> TaskResult:
    """Tokenizes the documents of a task, in order."""
    if options.chat:
        return tokenize_conversations(task, tokenizer, options)
    dtype = token_dtype(tokenizer.vocab_size)
    documents: list[Tokenized] = []
    bad: collections.Counter[str] = collections.Counter()
    changed: list[str] = []
    n_empty = tried = tried_bytes = 0
    for part in task:
        for name, text in documents_of(part, options, bad):
            if not text.strip():
                n_empty += 1
                continue
            decoded = text.decode()
            ids = tokenizer.encode(decoded)
            tokens = np.empty(len(ids) + 2, dtype)
            tokens[0], tokens[1:-1], tokens[-1] = (
                tokenizer.bos_id,
                ids,
                tokenizer.eos_id,
            )
            split = split_of(text, options.heldout)
            documents.append(Tokenized(split, name, tokens, len(text)))
            if tokenizer.kind != "bytes" and tried_bytes < _TRIED_BYTES:
                tried, tried_bytes = tried + 1, tried_bytes + len(text)
                if (back := tokenizer.decode(ids)) != decoded:
                    changed.append(f"{name}: {_difference(decoded, back)}")
    read_bytes = sum(part.read_bytes for part in task)
    return TaskResult(documents, n_empty, read_bytes, bad, tried, changed)


def _difference(text: str, back: str) -> str:
    """The first place where two texts differ, of each a few characters."""
    pairs = enumerate(zip(text, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    part = slice(max(0, at - 10), at + 10)
    return f"{text[part]!r} comes back as {back[part]!r}"


_worker: dict[str, Any] = {}  # of a worker process: its tokenizer and ReadOptions


def _start_worker(
    kind: str, files: dict[str, bytes], name: str, options: ReadOptions, parent: int
) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this
    _worker["options"] = options
    _worker["tokenizer"] = tokenizer_of(kind, files, name)


def _tokenize_in_worker(task: list[Part]) -> TaskResult:
    return _tokenize(task, _worker["tokenizer"], _worker["options"])


def tokenized(
    parts: Iterable[Part], tokenizer: Tokenizer, options: ReadOptions, workers: int
) -> Iterator[TaskResult]:
    """Yields the tokenized documents of all parts, in order, a task at a time.

    Raises:
      UserError: what `documents_of` raises.
    """
    tasks = _grouped(parts)
    first = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(first, tasks)
    if workers == 1 or len(first) < 2:  # starting processes would take longer
        for task in tasks:
            yield _tokenize(task, tokenizer, options)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (tokenizer.kind, dict(tokenizer.files), tokenizer.name, options, os.getpid()),
    )
    try:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for task in tasks:
            with signals_held():  # starts a worker
                pending.append(pool.submit(_tokenize_in_worker, task))
            # Results wait in memory, so only a few tasks may run ahead.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
