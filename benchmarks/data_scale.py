"""The start of a host on a corpus of very many documents: seconds and memory.

The corpora are made up: where documents begin is real, 8 bytes each, and the tokens
are holes in files. Each figure is of a new process, which opens the corpus, goes to a
step and makes one whole global batch; before the first and the resumed one the kernel
is asked to forget the files. With --order=all the documents have one order, as those of
small corpora do.

python -m benchmarks.data_scale --documents 100000000 1000000000
python -m benchmarks.data_scale --documents 10000000 --order=all
python -m benchmarks.data_scale --documents 4000000 --speed=1
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.timing import (
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ratio,
)
from mtp_jax.config import Config, default, freeze
from mtp_jax.data.batches import open_sources, train_batches
from mtp_jax.data.corpus import SHARD_FILES, write_manifest
from mtp_jax.data.packing import batch_hash, format_hash
from mtp_jax.data.prepare import BLOCK_DOCUMENTS, SHARD_TOKENS
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError

_HOSTS = 4  # among whom a batch is shared to compare it with that of one


@script
def main(argv: list[str]) -> int:
    """Prints a row for each size, and whether hosts agree."""
    args = options(
        argv,
        "Time to the first batch, and memory, by the number of documents.",
        documents=[10_000_000],
        tokens=1000,  # of a document, in the mean
        shard_tokens=SHARD_TOKENS,
        seq_len=1024,
        batch_size=128,
        order="blocks",  # or all
        speed=0,  # 1: compares tokens by second of CPU of both orders instead
        rounds=7,
        batches=64,  # read in a round
        folder="",  # for the corpora, 8 GB for 1e9 documents; empty: a temporary one
        measure="",  # of its own processes: the corpus to open
        first_row=0,  # and the row to begin with
        part=0,  # and which host it is
        of=1,  # of how many
    )
    if args.order not in ("blocks", "all"):
        raise UserError(f"--order={args.order}; give blocks or all.")
    if args.measure:
        print(json.dumps(_measured(args)))
        return 0
    print_environment(args.rounds)
    rows: list[Sequence[str]] = [
        ("documents", "tokens", "shards", "first batch, s", "again, s", "resume, s",
         "memory, MB", "after 32 batches, MB", "hosts agree")
    ]  # fmt: skip
    for n_documents in args.documents:
        folder = tempfile.mkdtemp(dir=args.folder or None)
        try:
            tokens, shards = _make(pathlib.Path(folder), n_documents, args)
            if args.speed:
                _print_speed(folder, args)
            else:
                rows.append((f"{n_documents:.0e}", f"{tokens:.2e}", str(shards),
                             *_figures(folder, tokens, args)))  # fmt: skip
        finally:
            shutil.rmtree(folder)
    if not args.speed:
        print_table(*rows)
    return 0


def _make(
    folder: pathlib.Path, n_documents: int, args: argparse.Namespace
) -> tuple[int, int]:
    """Writes a corpus of documents of log-normal lengths; its tokens and shards."""
    rng = np.random.default_rng(0)
    shards = []
    most = max(1, args.shard_tokens // args.tokens)
    for number, first in enumerate(range(0, n_documents, most)):
        n = min(most, n_documents - first)
        lengths = rng.lognormal(np.log(args.tokens) - 0.5, 1.0, n).astype(np.int64) + 2
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<u8")
        sizes = {"tokens": int(offsets[-1]), "offsets": 8 * (n + 1), "names": n}
        stem = f"train-{number:05d}"
        offsets.tofile(folder / f"{stem}.offsets")
        for kind in ("tokens", "names"):
            with open(folder / f"{stem}.{kind}", "wb") as file:
                file.truncate(sizes[kind])
        files = {k: {"bytes": sizes[k], "sha256": "0" * 64} for k in SHARD_FILES}
        shards.append({"name": stem, "documents": n, "tokens": sizes["tokens"],
                       "files": files})  # fmt: skip
    used = ByteTokenizer()
    tokens = sum(shard["tokens"] for shard in shards)
    train = {"documents": n_documents, "tokens": tokens, "bytes": tokens,
             "shards": shards}  # fmt: skip
    if args.order == "blocks":
        train["block_documents"] = BLOCK_DOCUMENTS
    none = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    described = {name: getattr(used, name)
                 for name in ("kind", "name", "vocab_size", "fingerprint")}  # fmt: skip
    splits = {"train": train, "heldout": none}
    write_manifest(folder, {"tokenizer": described, "splits": splits})
    return tokens, len(shards)


def _figures(folder: str, tokens: int, args: argparse.Namespace) -> list[str]:
    """Cells of a row: seconds of starts, memory, and whether hosts have one batch."""
    n_rows = tokens // args.seq_len
    far = random.Random(0).randrange(n_rows // 2, n_rows)
    first, again = (_child(folder, args, cold=cold) for cold in (True, False))
    resumed = _child(folder, args, cold=True, first_row=far)
    parts = [_child(folder, args, first_row=far, part=i, of=_HOSTS)
             for i in range(_HOSTS)]  # fmt: skip
    total = batch_hash(np.array([part["hash"] for part in parts], np.uint32))
    agree = format_hash(total) == format_hash(np.array(resumed["hash"], np.uint32))
    return [
        *(f"{found['seconds']:.1f}" for found in (first, again, resumed)),
        f"{max(found['peak_mb'] for found in (first, again, resumed)):.0f}",
        f"{first['after_mb']:.0f}",
        "yes" if agree else "NO",
    ]


def _child(
    folder: str, args: argparse.Namespace, cold: bool = False, **more: int
) -> dict:
    """The figures of a new process; `cold`: the kernel is asked to forget files."""
    if cold:
        os.sync()
        for path in pathlib.Path(folder).iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    given = {"seq_len": args.seq_len, "batch_size": args.batch_size, **more}
    command = [sys.executable, "-m", "benchmarks.data_scale", f"--measure={folder}"]
    command += [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _config(folder: str, args: argparse.Namespace) -> Config:
    tree = default()
    tree.data.update(sources=(folder,), seq_len=args.seq_len, verify=False,
                     batch_size=args.batch_size)  # fmt: skip
    return freeze(tree)


def _measured(args: argparse.Namespace) -> dict:
    """Opens the corpus, makes the batch that begins with a row, and 32 more."""
    peak = _PeakMemory()
    began = time.perf_counter()
    cfg = _config(args.measure, args)
    rows = np.arange(args.part, args.batch_size, args.of)
    batches = train_batches(cfg, rows, 0, open_sources(cfg), start_row=args.first_row)
    batch = next(batches)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "peak_mb": peak.stop(),
             "hash": batch_hash(batch["hash"]).tolist()}  # fmt: skip
    for _ in itertools.islice(batches, 32):
        pass
    return {**found, "after_mb": _anonymous_mb()}


def _print_speed(folder: str, args: argparse.Namespace) -> None:
    """Compares the orders, in turn, on the same files, by CPU time."""
    cfg = _config(folder, args)
    manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    manifest.pop("format")
    every = np.arange(args.batch_size)
    streams = {}
    for name, block in (("all", {}), ("blocks", {"block_documents": BLOCK_DOCUMENTS})):
        train = manifest["splits"]["train"]
        train.pop("block_documents", None)
        train |= block
        write_manifest(pathlib.Path(folder), manifest)
        streams[name] = train_batches(cfg, every, 0, open_sources(cfg))
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(args.rounds + 1):
        for name, batches in streams.items():
            began = time.process_time()
            for _ in itertools.islice(batches, args.batches):
                pass
            seconds[name].append(time.process_time() - began)
    tokens = args.batches * args.batch_size * args.seq_len
    per_s = {name: np.divide(tokens, x[1:]) for name, x in seconds.items()}
    print_table(("order", "tokens/s of CPU", "to all in one"), *(
        (name, f"{np.median(x):.0f}", show_ratio(ratio(x, per_s["all"])))
        for name, x in per_s.items()
    ))  # fmt: skip


class _PeakMemory:
    """The most anonymous memory of this process, in MB, as seen every 20 ms."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> float:
        """Ends the watch; returns the peak."""
        self._over.set()
        self._thread.join()
        return max(self._peak, _anonymous_mb())

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._peak = max(self._peak, _anonymous_mb())


def _anonymous_mb() -> float:
    """Memory of this process without pages of files, which the kernel takes back."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
