"""Documents as tokens, on their way from workers to shards."""

import collections
import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A document ready to be written."""

    split: str
    name: str
    tokens: np.ndarray  # begin and end of text included, in the type of the shards
    n_bytes: int
    learned: np.ndarray | None = None  # bool: tokens to be learned; None: all


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The documents of a few parts of the input."""

    documents: list[Tokenized]
    n_empty: int
    read_bytes: int
    # Documents that were skipped, by kind.
    bad: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    tried: int = 0  # documents that were decoded again
    # Of those, a line for each that came back as another text.
    changed: list[str] = dataclasses.field(default_factory=list)
    # Of conversations: where the first of each form stands, and ids that end turns.
    forms: dict[str, str] = dataclasses.field(default_factory=dict)
    turn_ends: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )


def split_of(text: bytes, heldout: float) -> str:
    """The split of a text, by its hash, so that copies of a document stay together."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "little") < heldout * 2**64 else "train"
