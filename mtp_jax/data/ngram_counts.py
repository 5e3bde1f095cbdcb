"""Counts of tokens that follow each other in a corpus: made, kept in a file, read.

Counts of single tokens, of pairs and of triples, within documents, begin and end of
text included. They are a tree, of which only what was seen is kept: the pairs are the
children of their first token, the triples those of their first two.

Axes: V vocabulary, E entries of a level, R rows, the entries of the level before.
"""

import dataclasses
import itertools
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_jax.data.corpus import Corpus, Documents, verify_files
from mtp_jax.errors import UserError
from mtp_jax.storage import whole_file

FORMAT = 1
_CHUNK_TOKENS = 1 << 22  # tokens that are counted at once
_NONE = -1  # stands between documents


@dataclasses.dataclass(frozen=True)
class CountLevel:
    """Runs of one length, sparse: those of row r are start_R[r] to start_R[r + 1]."""

    start_R: np.ndarray  # int64 [rows + 1]
    token_E: np.ndarray  # the last token of each run, int32, rising within a row
    count_E: np.ndarray  # int64


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Counts of the runs of 1 to `order` tokens."""

    fingerprint: str  # of the tokenizer
    count_V: np.ndarray  # of single tokens, int64
    levels: tuple[CountLevel, ...]  # of pairs, and of triples where they were counted

    @property
    def order(self) -> int:
        """Tokens of the longest runs."""
        return 1 + len(self.levels)


def count_corpus(
    corpus: Corpus | str | pathlib.Path, output: str | pathlib.Path, *, order: int = 3
) -> NGrams:
    """Counts the train split of a corpus, writes the file, and returns the counts.

    Args:
      corpus: a prepared corpus, or its folder.
      output: the .npz file; one that is there is replaced.
      order: tokens of the longest runs that are counted, 2 or 3. Triples take most of
        the file.

    Raises:
      UserError: another order, no corpus or a damaged one, no place to write to.
    """
    if order not in (2, 3):
        raise UserError(f"order is {order}; give 2 or 3.")
    source = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    verify_files(source, ["train"])
    tokenizer = source.tokenizer
    documents = source.documents("train")
    ngrams = count(documents, tokenizer.vocab_size, tokenizer.fingerprint, order)
    save(ngrams, output)
    return ngrams


def count(
    documents: Documents, vocab_size: int, fingerprint: str, order: int
) -> NGrams:
    """Counts runs of up to `order` tokens, 2 or 3, of all documents."""
    count_V = np.zeros(vocab_size, np.int64)
    longer = [_nothing() for _ in range(2, order + 1)]
    for tokens_T in _chunks(documents, order):
        # The last tokens of a chunk are there for longer runs; the next has them too.
        first_T = tokens_T[: tokens_T.size - (order - 1)]
        count_V += np.bincount(first_T[first_T != _NONE], minlength=vocab_size)
        key_T, ok_T = first_T, first_T != _NONE
        for length in range(2, order + 1):
            last_T = tokens_T[length - 1 :][: first_T.size]
            key_T, ok_T = key_T * vocab_size + last_T, ok_T & (last_T != _NONE)
            new = np.unique(key_T[ok_T], return_counts=True)
            longer[length - 2] = _merged(longer[length - 2], new)
    levels, rows_R = [], np.arange(vocab_size)
    for key_E, count_E in longer:
        start_R = np.searchsorted(key_E // vocab_size, rows_R)
        start_R = np.append(start_R, key_E.size)
        token_E = (key_E % vocab_size).astype(np.int32)
        levels.append(CountLevel(start_R.astype(np.int64), token_E, count_E))
        rows_R = key_E
    return NGrams(fingerprint, count_V, tuple(levels))


def save(ngrams: NGrams, path: str | pathlib.Path) -> None:
    """Writes one compressed .npz file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    arrays = {
        "format": np.array(FORMAT),
        "fingerprint": np.array(ngrams.fingerprint),
        "1": ngrams.count_V,
    }
    for length, level in enumerate(ngrams.levels, 2):
        for name in ("start_R", "token_E", "count_E"):
            arrays[f"{length}_{name}"] = getattr(level, name)
    try:
        # A name alone might get a suffix.
        with whole_file(pathlib.Path(path)) as part, open(part, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def load(path: str | pathlib.Path, fingerprint: str) -> NGrams:
    """Reads a file of `save`.

    Args:
      path: the file.
      fingerprint: of the tokenizer that the counts must be of.

    Raises:
      UserError: no such file, a damaged one, or one of another tokenizer.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        raise _damaged(path) from None
    except OSError as error:
        why = error.strerror or "it is no file of arrays"
        raise UserError(f"{path} cannot be read: {why}.") from None
    try:
        ngrams = _of_arrays(arrays)
        fits = _fits(ngrams)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise _damaged(path) from None
    if not fits:
        raise _damaged(path)
    if ngrams.fingerprint != fingerprint:
        raise UserError(
            f"{path} was counted with another tokenizer (sha256 "
            f"{ngrams.fingerprint[:12]}..., the model's is {fingerprint[:12]}...); "
            "count the corpus of the model."
        )
    return ngrams


def _damaged(path: str | pathlib.Path) -> UserError:
    return UserError(f"{path} is not a file of counts, or damaged; run count again.")


def _of_arrays(arrays: dict[str, Any]) -> NGrams:
    """The counts of the arrays of a file."""
    if int(arrays["format"]) != FORMAT:
        raise ValueError
    levels = []
    for length in (2, 3):
        if f"{length}_start_R" in arrays or length == 2:
            names = ("start_R", "token_E", "count_E")
            levels.append(CountLevel(*(arrays[f"{length}_{name}"] for name in names)))
    return NGrams(str(arrays["fingerprint"]), arrays["1"], tuple(levels))


def _fits(ngrams: NGrams) -> bool:
    """Returns True if any look-up in the arrays stays within them."""
    rows, vocab = ngrams.count_V.size, ngrams.count_V.size
    sound = ngrams.count_V.shape == (vocab,) and ngrams.count_V.dtype == np.int64
    for level in ngrams.levels:
        start_R, token_E = level.start_R, level.token_E
        sound = sound and (
            (start_R.dtype, token_E.dtype, level.count_E.dtype)
            == (np.int64, np.int32, np.int64)
            and start_R.shape == (rows + 1,)
            and token_E.shape == level.count_E.shape == (start_R[-1],)
            and start_R[0] == 0
            and bool((np.diff(start_R) >= 0).all())
            and bool(((token_E >= 0) & (token_E < vocab)).all())
            and bool((level.count_E > 0).all())
        )
        if not sound:
            return False
        rows = token_E.size
    return bool(sound)


def _chunks(documents: Documents, order: int) -> Iterator[np.ndarray]:
    """Yields tokens of many documents, int64; the last order - 1 begin no run.

    A document that does not fit is cut, and its next chunk begins with the tokens that
    this one only looked at.
    """
    gap = np.full(order - 1, _NONE, np.int64)
    parts: list[np.ndarray] = []
    size = 0
    lengths = itertools.chain.from_iterable(documents.lengths_by_shard())
    for i, length in enumerate(lengths):
        done = 0
        while done < length:
            taken = min(int(length) - done, _CHUNK_TOKENS - size)
            parts.append(documents.tokens(i, done, done + taken).astype(np.int64))
            size, done = size + taken, done + taken
            after = documents.tokens(i, done, done + order - 1).astype(np.int64)
            if size == _CHUNK_TOKENS:
                yield np.concatenate([*parts, after, gap[after.size :]])
                parts, size = [], 0
            else:
                parts.append(gap)
    yield np.concatenate([*parts, gap])


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    """Keys and counts of no runs."""
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def _merged(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The keys of both, rising, and their summed counts."""
    key = np.concatenate([a[0], b[0]])
    number = np.concatenate([a[1], b[1]])
    order = np.argsort(key, kind="stable")  # two rising runs: a merge
    key, number = key[order], number[order]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: key.size])
    return key[first], np.add.reduceat(number, first) if first.size else number
