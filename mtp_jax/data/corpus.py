"""A prepared corpus on disk: flat token files, document offsets and a manifest.

A directory holds `manifest.json`, for SentencePiece `tokenizer.model`, and for each
shard of the splits "train" and "heldout" three files: `.tokens`, little-endian ids,
each document between begin and end of text; `.offsets`, uint64 [documents + 1], where
documents begin; `.names`, a UTF-8 line a document, `\\` and line feeds escaped.

Format 2 has in the manifest's entry of a split `block_documents`, by which its
documents are ordered (`order`), and is else format 1. Older versions, which would take
them in another order, refuse it. Format 3 is one of conversations, which are not cut
(`whole_rows`): `learned`, tokens of a split that are learned, is in its entry, and a
shard has a fourth file, `.learned`, a byte a token: 1 for those.
"""

import dataclasses
import hashlib
import itertools
import json
import mmap
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.tokenizer import Tokenizer, tokenizer_files, tokenizer_from_dir
from mtp_jax.errors import UserError

FORMATS = (1, 2, 3)
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
SHARD_FILES = ("tokens", "offsets", "names")
LEARNED = "learned"  # a fourth file, in corpora of conversations

_SAMPLED = 1 << 20  # documents
_MOST_OPEN = 1 << 13  # maps of a split; Linux allows a process some 65,000 in all


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned integer that holds every id."""
    for name, limit in (("<u1", 2**8), ("<u2", 2**16)):
        if vocab_size <= limit:
            return np.dtype(name)
    return np.dtype("<u4")


class Documents:
    """The documents of a split, read through memory maps that pickling drops."""

    def __init__(
        self,
        directory: pathlib.Path,
        shards: list[dict],
        dtype: np.dtype,
        block: int | None = None,
        has_learned: bool = False,
    ):
        """Opens nothing yet.

        Args:
          directory: that of the corpus.
          shards: their entries in the manifest.
          dtype: of ids in the files.
          block: documents of a block, see `order`; None: the split has no blocks.
          has_learned: True for conversations, of which not every token is learned.
        """
        self.has_learned = has_learned
        self.directory = directory
        self.block = block
        self.first = np.cumsum([0] + [shard["documents"] for shard in shards])
        self.shard_tokens = np.array([shard["tokens"] for shard in shards], np.int64)
        self._stems = [shard["name"] for shard in shards]
        self._dtype = dtype
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document with begin and end of text, uint64 [documents]."""
        return np.concatenate([np.zeros(0, np.uint64), *self.lengths_by_shard()])

    @property
    def sampled_lengths(self) -> np.ndarray:
        """Those of the first documents, for who needs some of them and not all.

        All of them, unless the split is ordered by blocks and has over a million: then
        of its first shards, a million documents or the first shard at least.
        """
        if self.block is None:
            return self.lengths
        n_shards = 1 + int((self.first[1:-1] < _SAMPLED).sum())
        parts = itertools.islice(self.lengths_by_shard(), n_shards)
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def lengths_by_shard(self) -> Iterator[np.ndarray]:
        """Tokens of the documents of one shard after another, uint64 each."""
        for shard in range(len(self._stems)):
            yield np.diff(self.offsets(shard)).astype(np.uint64, copy=False)

    def offsets(self, shard: int) -> np.ndarray:
        """Where the documents of a shard begin, and the last ends, uint64."""
        return self._map(f"{self._stems[shard]}.offsets", np.dtype("<u8"))

    def every_offset(self, shard: int, step: int) -> np.ndarray:
        """Where every `step`-th document of a shard begins, and the last ends, int64.

        The file is read, not mapped: its pages are not kept by this process.
        """
        path = self.directory / f"{self._stems[shard]}.offsets"
        try:
            offsets = np.fromfile(path, "<u8").astype(np.int64, copy=False)
        except OSError as error:
            raise _unreadable(path, error) from error
        return np.append(offsets[:-1:step], offsets[-1])

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids of document `i`, or of a slice of it, in the type of the file."""
        return self._slice("tokens", self._dtype, i, start, stop)

    def learned(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """1 for the tokens of document `i`, or a slice of it, to be learned, uint8."""
        return self._slice(LEARNED, np.dtype("u1"), i, start, stop)

    def _slice(
        self, kind: str, dtype: np.dtype, i: int, start: int, stop: int | None
    ) -> np.ndarray:
        shard, row = self._locate(i)
        begin, end = map(int, self.offsets(shard)[row : row + 2])
        stop = end if stop is None else min(begin + stop, end)
        return self._map(f"{self._stems[shard]}.{kind}", dtype)[begin + start : stop]

    def name(self, i: int) -> str:
        """The origin of document `i`: path, or path:line."""
        shard, row = self._locate(i)
        key = f"{self._stems[shard]}.names"
        if key not in self._open:
            self._open[key] = (self.directory / key).read_bytes().split(b"\n")
        return _unescape(self._open[key][row].decode())

    def _locate(self, i: int) -> tuple[int, int]:
        """The shard of a document, and its number in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        shard = int(self.first.searchsorted(i, side="right")) - 1
        return shard, i - int(self.first[shard])

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A file as an array, through a memory map."""
        if (found := self._open.get(name)) is not None:
            return found
        while len(self._open) >= _MOST_OPEN:
            self._open.pop(next(iter(self._open)), None)
        # No np.memmap: its slices, and it itself, are slow to make.
        try:
            with open(self.directory / name, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _unreadable(self.directory / name, error) from error
        self._open[name] = array = np.frombuffer(mapped, dtype)
        return array


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared directory whose manifest, tokenizer and file sizes fit together."""

    directory: pathlib.Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def open(cls, directory: str | pathlib.Path) -> "Corpus":
        """Reads the manifest and the tokenizer and checks the sizes of all files.

        Raises:
          UserError: no prepared corpus, one of another format, a file that is missing
            or has the wrong size, or a tokenizer that is not the one that was used.
        """
        path = pathlib.Path(directory)
        manifest = read_manifest(path)
        try:
            return cls._checked(path, manifest)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path / MANIFEST} is damaged; run prepare again."
            ) from None

    @classmethod
    def _checked(cls, path: pathlib.Path, manifest: dict[str, Any]) -> "Corpus":
        used = manifest["tokenizer"]
        tokenizer = tokenizer_from_dir(path, used["kind"])
        if tokenizer.fingerprint != used["fingerprint"]:
            raise UserError(
                f"{path}/{next(iter(tokenizer.files), 'bytes')} is not the tokenizer "
                f"the corpus was made with (sha256 {tokenizer.fingerprint[:12]}..., "
                f"manifest.json says {used['fingerprint'][:12]}...); put the right "
                "file back or run prepare again."
            )
        corpus = cls(path, manifest, tokenizer)
        for split in SPLITS:
            block = manifest["splits"][split].get("block_documents", 1)
            if type(block) is not int or block < 1:
                raise TypeError
        for name, recorded in corpus._files(SPLITS):
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != recorded["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"{file} {found}; manifest.json says {recorded['bytes']} bytes: "
                    "copy the corpus again or run prepare again."
                )
        return corpus

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the train split: 12 digits of the sha256 of its manifest."""
        text = json.dumps(self.manifest["splits"]["train"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def documents(self, split: str) -> Documents:
        """The documents of "train" or "heldout"."""
        shards = self.manifest["splits"][split]["shards"]
        dtype = token_dtype(self.manifest["tokenizer"]["vocab_size"])
        block = self.manifest["splits"][split].get("block_documents")
        return Documents(self.directory, shards, dtype, block, self.has_learned)

    @property
    def has_learned(self) -> bool:
        """True for conversations, of which not every token is learned."""
        return LEARNED in self.manifest["splits"]["train"]

    def _files(self, splits: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        """Names of all shard files, each with its recorded bytes and sha256."""
        return [
            (f"{shard['name']}.{kind}", shard["files"][kind])
            for split in splits
            for shard in self.manifest["splits"][split]["shards"]
            for kind in shard["files"]
        ]


def verify_files(
    corpus: Corpus, splits: Sequence[str] = SPLITS, part: tuple[int, int] = (0, 1)
) -> None:
    """Compares the sha256 of shard files with the manifest.

    Args:
      corpus: the corpus to check.
      splits: the splits to check.
      part: (index, count) to check every count-th file only, from the index-th on, so
        that several processes share the reading.

    Raises:
      UserError: a file is damaged.
    """
    index, count = part
    for name, recorded in corpus._files(splits)[index::count]:
        with open(corpus.directory / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != recorded["sha256"]:
            raise UserError(
                f"{corpus.directory / name} is damaged (its sha256 is {found[:12]}..., "
                f"manifest.json says {recorded['sha256'][:12]}...): copy the corpus "
                "again or run prepare again."
            )


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """The manifest of a prepared directory.

    Raises:
      UserError: there is none, or it is of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{directory} is not a prepared corpus (no {MANIFEST}); make one with "
            f"prepare --input=PATH --output={directory}."
        )
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); run prepare again.") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in FORMATS:
        raise UserError(
            f"{path} is of format {version}; this version reads formats "
            f"{', '.join(map(str, FORMATS[:-1]))} and {FORMATS[-1]}: run prepare again."
        )
    return manifest


def write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest.json`, with the format's version in front."""
    in_blocks = any("block_documents" in x for x in manifest["splits"].values())
    version = 3 if LEARNED in manifest["splits"]["train"] else FORMATS[in_blocks]
    numbered = {"format": version, **manifest}
    text = json.dumps(numbered, indent=1, ensure_ascii=False)
    # A file's name may be no UTF-8; what Python has for its bytes is escaped in JSON.
    content = (text + "\n").encode("utf-8", "backslashreplace")
    (directory / MANIFEST).write_bytes(content)


def own_files(directory: pathlib.Path) -> set[str]:
    """Names of all files that prepare wrote into a directory."""
    manifest = read_manifest(directory)
    shards = [
        shard for split in manifest["splits"].values() for shard in split["shards"]
    ]
    names = {f"{shard['name']}.{k}" for shard in shards for k in shard["files"]}
    return names | {MANIFEST} | tokenizer_files(manifest["tokenizer"]["kind"])


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read any more: {error.strerror}; put the corpus back and "
        "run the same command again."
    )


def _unescape(text: str) -> str:
    return "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))
