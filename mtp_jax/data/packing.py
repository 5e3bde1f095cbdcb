"""Packing: documents to rows, and rows to the part of a batch that a host needs.

A row holds S = T + N tokens: T positions to train, and N more so that each of them has
a target for every head. Rows begin T apart in the stream of all documents, so each
pair of position and head occurs once an epoch. Axes: B rows, S tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mtp_jax.data.corpus import Documents
from mtp_jax.data.order import Piece, order_of
from mtp_jax.errors import UserError

Row = dict[str, np.ndarray]


class RowSequence(Protocol):
    """A sequence of rows, each made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class PackedRows:
    """The rows of a split: documents one after another, cut every `stride` tokens.

    Nothing is copied or written: a row is found by binary search when it is asked for
    (`order`).
    """

    def __init__(
        self,
        documents: Documents,
        row_len: int,
        stride: int,
        vocab_size: int,
        seed: Sequence[int] | None,
    ):
        """Puts the documents in order.

        Args:
          documents: the documents to pack; at least one.
          row_len: S, tokens of a row.
          stride: T, by how much a row begins after the one before.
          vocab_size: ids of the model; a larger id in the data is refused.
          seed: decides the order of the documents; None: as they are stored.
        """
        self._documents = documents
        self._row_len = row_len
        self._stride = stride
        self._vocab_size = vocab_size
        self._order = order_of(documents, seed)

    def __len__(self) -> int:
        # The last token is no position to train: nothing follows it.
        return max(1, -(-(self._order.n_tokens - 1) // self._stride))

    def __getitem__(self, index: int) -> Row:
        """Row `index`: tokens, segments and positions, each int32 [S].

        Segments count the documents within the row from 1 and are 0 in padding;
        positions count from 0 at each document and at the beginning of the row.

        Raises:
          UserError: an id of the data is not in the model's vocabulary.
        """
        row = padding_row(self._row_len)
        pieces = self.pieces(index)
        fill(row, self._documents, pieces)
        check_ids(row, self._documents, pieces, self._vocab_size)
        return row

    def pieces(self, index: int) -> list[Piece]:
        """(document, first token, token after the last) of each segment of a row."""
        start = index * self._stride
        stop = min(start + self._row_len, self._order.n_tokens)
        return self._order.pieces(start, stop)


def fill(row: Row, documents: Documents, pieces: list[Piece]) -> None:
    """Writes pieces of documents into a row of padding, one after another."""
    filled = 0
    for segment, (document, begin, stop) in enumerate(pieces, 1):
        slots = slice(filled, filled + stop - begin)
        row["tokens"][slots] = documents.tokens(document, begin, stop)
        row["segments"][slots] = segment
        row["positions"][slots] = np.arange(stop - begin)
        if "learned" in row:
            row["learned"][slots] = documents.learned(document, begin, stop)
        filled = slots.stop


def check_ids(
    row: Row, documents: Documents, pieces: list[Piece], vocab_size: int
) -> None:
    """Raises UserError for the first document with an id outside the vocabulary."""
    # As stored: an id of 32 bits may have become a negative number.
    if int(row["tokens"].view(np.uint32).max()) < vocab_size:
        return
    largest, document = next(
        (largest, document)
        for document, begin, stop in pieces
        if (largest := int(documents.tokens(document, begin, stop).max())) >= vocab_size
    )
    raise UserError(
        f"{documents.directory}, document {documents.name(document)}: "
        f"id {largest} is outside the model's vocabulary (config.model.vocab_size "
        f"is {vocab_size}); use the tokenizer of the corpus, or a larger vocabulary."
    )


class ConcatenatedRows:
    """The rows of several sources, one after another."""

    def __init__(self, sources: Sequence[RowSequence]):
        self._sources = sources
        self._ends = np.cumsum([len(rows) for rows in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        source = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return self._sources[source][index - before]


class HostBatches:
    """The rows of global batch `step` that one host needs, for any step.

    The rows of a global batch, and their hashes, do not depend on how many hosts share
    them.
    """

    def __init__(
        self,
        rows: RowSequence,
        batch_size: int,
        rows_of_this_host: np.ndarray,
        n_batches: int,
        first_row: int = 0,
    ):
        """Cuts `rows` into batches; rows past the end of `rows` are padding.

        Args:
          rows: rows in the order of training.
          batch_size: rows of a global batch.
          rows_of_this_host: those of them to give, int [B of this host].
          n_batches: how many batches there are.
          first_row: the row that batch 0 begins with.
        """
        self._rows = rows
        self._batch_size = batch_size
        self._rows_of_this_host = [int(r) for r in rows_of_this_host]
        self._n_batches = n_batches
        self._first_row = first_row

    def __len__(self) -> int:
        return self._n_batches

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Tokens, segments, positions, int32 [B, S], and hash, uint32 [B, 2].

        Where there are conversations among the sources, also learned, int32 [B, S].
        """
        rows = [self._row(step, r) for r in self._rows_of_this_host]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        batch["hash"] = np.stack(
            [
                row_hash(*pair)
                for pair in zip(rows, self._rows_of_this_host, strict=True)
            ]
        )
        return batch

    def _row(self, step: int, r: int) -> Row:
        return self._rows[self._first_row + step * self._batch_size + r]


def padding_row(row_len: int, learned: bool = False) -> Row:
    """A row of nothing: token, segment and position 0, each int32 [S].

    With `learned` another entry of this name, of 0.
    """
    keys = ["tokens", "segments", "positions", *["learned"] * learned]
    return {key: np.zeros(row_len, np.int32) for key in keys}


def row_hash(row: Row, index: int) -> np.ndarray:
    """Fingerprint of a row at its place in the global batch, uint32 [2]."""
    tokens, segments = (
        row[key].astype("<i4", copy=False).tobytes() for key in ("tokens", "segments")
    )
    digest = hashlib.blake2b(tokens, digest_size=8)
    digest.update(segments)
    if "learned" in row:
        digest.update(row["learned"].astype("<i4", copy=False).tobytes())
    digest.update(index.to_bytes(8, "little"))
    return np.frombuffer(digest.digest(), "<u4").astype(np.uint32)


def batch_hash(hashes: np.ndarray) -> np.ndarray:
    """Fingerprint of a batch, uint32 [2], of its rows' hashes, uint32 [B, 2].

    A sum that wraps around: parts of the batch may be summed anywhere, in any order.
    """
    return hashes.sum(axis=0, dtype=np.uint32)


def format_hash(pair: np.ndarray) -> str:
    """The 16 hexadecimal digits of a batch's fingerprint, uint32 [2]."""
    low, high = (int(word) for word in pair)
    return f"{high << 32 | low:016x}"
