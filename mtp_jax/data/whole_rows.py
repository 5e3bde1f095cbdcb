"""Rows of whole conversations: none is cut in two, and none is missing a target.

Axes: S tokens of a row.
"""

from collections.abc import Sequence

import numpy as np

from mtp_jax.data.corpus import Documents
from mtp_jax.data.order import Piece, document_order
from mtp_jax.data.packing import PackedRows, Row, check_ids, fill, padding_row
from mtp_jax.errors import UserError


class WholeRows:
    """The rows of a split of conversations, each of which is whole in one row.

    A row has T positions, and N tokens more for their targets. Conversations go into it
    as long as every token but the first is a target of head 1, which is up to T + 1
    tokens. The longest go first, each to the row with the least room that is enough
    (best fit decreasing); an epoch has every conversation once. A conversation that is
    longer has a row of its own and is cut at its end; one of which nothing is left to
    learn then is left out.
    """

    def __init__(
        self,
        documents: Documents,
        row_len: int,
        stride: int,
        vocab_size: int,
        seed: Sequence[int] | None,
    ):
        """Puts the conversations into rows.

        Args:
          documents: the conversations; at least one.
          row_len: S, tokens of a row.
          stride: T, its positions.
          vocab_size: ids of the model; a larger id in the data is refused.
          seed: decides among conversations of one length; None: as they are stored.

        Raises:
          UserError: no conversation has anything to learn in its first S tokens.
        """
        self._documents = documents
        self._row_len = row_len
        self._vocab_size = vocab_size
        lengths = documents.lengths.astype(np.int64)
        order = document_order(len(lengths), seed)
        order = order[np.argsort(-lengths[order], kind="stable")]
        room = stride + 1
        long = [int(i) for i in order if lengths[i] > room]
        kept = [i for i in long if documents.learned(i, 1, row_len).any()]
        self.cut, self.left_out = len(long), len(long) - len(kept)
        rows = [[i] for i in kept]
        rows += _best_fit(order[len(long) :].tolist(), lengths, room)
        if not rows:
            raise UserError(
                f"{documents.directory}: no conversation has an answer within its "
                f"first {row_len} tokens; give a larger config.data.seq_len."
            )
        self._members = np.array([i for row in rows for i in row], np.int64)
        self._ends = np.cumsum([len(row) for row in rows])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:
        """Row `index`: tokens, segments, positions and learned, each int32 [S].

        Segments count the conversations from 1 and are 0 in padding; positions count
        from 0 in each; learned is 1 for tokens that are to be learned.

        Raises:
          UserError: an id of the data is not in the model's vocabulary.
        """
        row = padding_row(self._row_len, learned=True)
        pieces = self.pieces(index)
        fill(row, self._documents, pieces)
        check_ids(row, self._documents, pieces, self._vocab_size)
        return row

    def pieces(self, index: int) -> list[Piece]:
        """(conversation, 0, tokens of it) of each segment of a row."""
        begin = int(self._ends[index - 1]) if index else 0
        members = self._members[begin : int(self._ends[index])]
        sizes = [len(self._documents.tokens(int(i))) for i in members]
        return [
            (int(i), 0, min(size, self._row_len))
            for i, size in zip(members, sizes, strict=True)
        ]


class WhollyLearned:
    """The rows of texts among those of conversations: every token is learned."""

    def __init__(self, rows: PackedRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return {**row, "learned": (row["segments"] != 0).astype(np.int32)}

    def pieces(self, index: int) -> list[Piece]:
        """As of `PackedRows`."""
        return self._rows.pieces(index)


def _best_fit(documents: list[int], lengths: np.ndarray, room: int) -> list[list[int]]:
    """Documents, the longest first, in rows: each where it leaves the least room.

    A bit of an integer tells whether a row with so much room is there, so the row is
    found in a few steps however many there are.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # numbers of rows
    there = 0
    for document in documents:
        length = int(lengths[document])
        if enough := there >> length:
            free = length + (enough & -enough).bit_length() - 1
            number = with_room[free].pop()
            if not with_room[free]:
                there ^= 1 << free
        else:
            free, number = room, len(rows)
            rows.append([])
        rows[number].append(document)
        if left := free - length:
            with_room[left].append(number)
            there |= 1 << left
    return rows
