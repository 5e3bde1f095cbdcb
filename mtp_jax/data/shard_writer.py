"""Writes the shards of a prepared corpus, in the format that `corpus` describes."""

import contextlib
import hashlib
import pathlib
from typing import IO, Any

import numpy as np

from mtp_jax.data.corpus import LEARNED, SHARD_FILES


class ShardWriter:
    """Writes the documents of a split; a context, so that an error closes the files.

    Where a shard ends depends on the documents alone: one that would pass the limit
    begins the next shard.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
    ):
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._bytes = 0
        self._learned: int | None = None
        self._start()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # all of them, also if the disk is full
            for file in self._files.values():
                stack.callback(file.close)

    def add(
        self,
        tokens: np.ndarray,
        name: str,
        n_bytes: int,
        learned: np.ndarray | None = None,
    ) -> None:
        """Appends a document, begin and end of text included.

        `learned` tells which tokens are to be learned, bool, where not all are: then it
        does so for every document.
        """
        filled = self._offsets[-1]
        if filled and filled + len(tokens) > self._shard_tokens:
            self._close()
            self._start()
        self._write("tokens", tokens.astype(self._dtype, copy=False).tobytes())
        self._write("names", _escape(name).encode(errors="backslashreplace") + b"\n")
        if learned is not None:
            self._write(LEARNED, learned.astype(np.uint8).tobytes())
            self._learned = (self._learned or 0) + int(learned.sum())
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._bytes += n_bytes

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the split's entry of the manifest."""
        if len(self._offsets) > 1:
            self._close()
        learned = {} if self._learned is None else {"learned": self._learned}
        return {
            "documents": sum(shard["documents"] for shard in self._shards),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "bytes": self._bytes,
            **learned,
            "shards": self._shards,
        }

    def _start(self) -> None:
        self._stem = f"{self._split}-{len(self._shards):05d}"
        self._files: dict[str, IO[bytes]] = {}
        self._sums = {kind: hashlib.sha256() for kind in (*SHARD_FILES, LEARNED)}
        self._offsets = [0]

    def _write(self, kind: str, data: bytes) -> None:
        # Opened at the first write: a split without documents leaves no file.
        if kind not in self._files:
            path = self._directory / f"{self._stem}.{kind}"
            self._files[kind] = open(path, "wb")  # noqa: SIM115 (closed below)
        self._files[kind].write(data)
        self._sums[kind].update(data)

    def _close(self) -> None:
        self._write("offsets", np.array(self._offsets, "<u8").tobytes())
        sizes = {kind: file.tell() for kind, file in self._files.items()}
        for file in self._files.values():
            file.close()
        self._shards.append(
            {
                "name": self._stem,
                "documents": len(self._offsets) - 1,
                "tokens": self._offsets[-1],
                "files": {
                    kind: {"bytes": sizes[kind], "sha256": self._sums[kind].hexdigest()}
                    for kind in (*SHARD_FILES, LEARNED)
                    if kind in sizes
                },
            }
        )


def _escape(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n")
