"""The order of a split's documents in the stream that rows are cut of.

It is a function of the seed and of the corpus alone. A small corpus has all documents
in one order, which takes sorting all of them. Where the manifest gives the size of a
block, shards have an order, the blocks of each shard have one, and the documents of a
block are in one of 64. A place in the stream is then found from the sizes of shards,
which the manifest has, and from where one shard's blocks and one block's documents
begin, which is read when it is needed. Rows are shuffled afterwards, so blocks only
decide which documents may share a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mtp_jax.data.corpus import Documents
from mtp_jax.errors import UserError

Piece = tuple[int, int, int]  # document, its first token, the token after its last

_BLOCKS = 2  # tells the seed of this order from those of the others
_ORDERS = 64  # of the documents of a block; blocks of a shard take them in turn
# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17).
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
        (np.uint64(27), np.uint64(0x94D049BB133111EB)))  # fmt: skip
_LAST_SHIFT = np.uint64(31)


class Order(Protocol):
    """Documents one after another, as a stream of `n_tokens` tokens."""

    n_tokens: int

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The parts of documents that make up tokens `start` to `stop` - 1."""
        ...


def order_of(documents: Documents, seed: Sequence[int] | None) -> Order:
    """The order of a split for a seed; None: as its documents are stored."""
    if documents.block is None:
        return WholeOrder(documents, seed)
    return BlockOrder(documents, documents.block, seed)


class WholeOrder:
    """All documents in one order, held in memory: 16 bytes a document."""

    def __init__(self, documents: Documents, seed: Sequence[int] | None):
        lengths = documents.lengths.astype(np.int64)
        self._order = document_order(len(lengths), seed)
        self._ends = np.cumsum(lengths[self._order])
        self.n_tokens = int(self._ends[-1])

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The parts of documents that make up tokens `start` to `stop` - 1."""
        return [
            (int(self._order[place]), first, end)
            for place, first, end in _cut(self._ends, start, stop)
        ]


class BlockOrder:
    """Shards in an order, blocks of a shard in one, documents of a block in one of 64.

    It takes memory for the shards, and 12 bytes for each block of a shard that was read
    from.
    """

    def __init__(self, documents: Documents, block: int, seed: Sequence[int] | None):
        """Puts the shards in order.

        Args:
          documents: at least one.
          block: documents of a block, those that are neighbours in a shard; the last
            block of a shard may have fewer.
          seed: decides the order; None: as the documents are stored.
        """
        self._documents = documents
        self._block = block
        self._keys: list[int | None] = [None] * 3
        if seed is not None:
            sequence = np.random.SeedSequence([*seed, _BLOCKS])
            self._keys = sequence.generate_state(3, np.uint64).tolist()
        sizes = documents.shard_tokens
        self._shards = _sorted(self._keys[0], 0, _multiples(len(sizes)))
        self._ends = np.cumsum(sizes[self._shards])
        self.n_tokens = int(self._ends[-1])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": {}, "_orders": {}}

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The parts of documents that make up tokens `start` to `stop` - 1."""
        found = []
        for place, *in_shard in _cut(self._ends, start, stop):
            shard = int(self._shards[place])
            blocks, block_ends = self._blocks_of(shard)
            for place, *in_block in _cut(block_ends, *in_shard):
                first, order, ends = self._block_of(shard, int(blocks[place]))
                for place, begin, end in _cut(ends, *in_block):
                    found.append((first + int(order[place]), begin, end))
        return found

    def _blocks_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of a shard's blocks in their order, and where each ends there.

        Raises:
          UserError: the shard has not the tokens that the manifest says.
        """
        if shard not in self._blocks:
            begins = self._documents.every_offset(shard, self._block)
            if begins[-1] != self._documents.shard_tokens[shard]:
                raise UserError(
                    f"{self._documents.directory}, shard {shard}: its offsets end at "
                    f"{begins[-1]} tokens, manifest.json says "
                    f"{self._documents.shard_tokens[shard]}: copy the corpus again or "
                    "run prepare again."
                )
            # A block's number is that of its first document: no other shard has it.
            first = int(self._documents.first[shard])
            multiples = _multiples(len(begins) - 1, self._block)
            order = _sorted(self._keys[1], first, multiples)
            ends = np.cumsum(np.diff(begins)[order])
            self._blocks[shard] = order.astype(np.int32), ends
        return self._blocks[shard]

    def _block_of(self, shard: int, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The first document of a block, and the order and ends of its documents."""
        begin = block * self._block
        offsets = self._documents.offsets(shard)[begin : begin + self._block + 1]
        first = int(self._documents.first[shard]) + begin
        offsets = offsets.view(np.int64)
        lengths = offsets[1:] - offsets[:-1]
        order = self._order_in(block % _ORDERS)
        if len(lengths) < self._block:
            order = order[order < len(lengths)]
        return first, order, lengths[order].cumsum()

    def _order_in(self, which: int) -> np.ndarray:
        """One of the orders of the documents of a block, int64 [block]."""
        if which not in self._orders:
            multiples = _multiples(self._block)
            first = which * self._block
            self._orders[which] = _sorted(self._keys[2], first, multiples)
        return self._orders[which]


def document_order(n_documents: int, seed: Sequence[int] | None) -> np.ndarray:
    """A permutation of the documents, int64 [documents]; None: as they are.

    Sorts by the raw output of Philox, which NumPy keeps the same in every release;
    its shuffling methods may change (NEP 19).
    """
    if seed is None:
        return np.arange(n_documents)
    key = np.random.Philox(np.random.SeedSequence(list(seed)))
    return np.argsort(key.random_raw(n_documents), kind="stable")


def _multiples(count: int, step: int = 1) -> np.ndarray:
    """The multiples of _GAMMA by 0, step, 2 step, ... modulo 2^64, uint64 [count]."""
    return np.arange(0, count * step, step, dtype=np.uint64) * np.uint64(_GAMMA)


def _sorted(key: int | None, first: int, multiples: np.ndarray) -> np.ndarray:
    """The order of first, first + step, ... by a random number of each, int64.

    Number i has the i-th output of SplitMix64 from the state `key`; None: as they are.
    No two outputs are equal, so every way to sort gives the same order.
    """
    if key is None:
        return np.arange(len(multiples))
    random = multiples + np.uint64((key + (first + 1) * _GAMMA) % 2**64)
    for shift, factor in _MIX:
        random ^= random >> shift
        random *= factor
    random ^= random >> _LAST_SHIFT
    return random.argsort()


def _cut(ends: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Cuts [start, stop) where intervals end that follow each other from 0 on.

    Yields the number of an interval, and the part of it, counted from its beginning.
    """
    place = int(ends.searchsorted(start, side="right"))
    begin = int(ends[place - 1]) if place else 0
    while start < stop:
        end = int(ends[place])
        yield place, start - begin, min(stop, end) - begin
        start = begin = end
        place += 1
