"""Batches as a function of the seed, the corpora and the rows consumed alone.

The state of a run's data is the number of rows it has consumed, which is steps times
batch size as long as that stays: reading again from any row gives the same batches,
with any number of hosts, reader processes and threads. Axes: B rows of this host,
S = seq_len + n_future_tokens.
"""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.corpus import SPLITS, Corpus, verify_files
from mtp_jax.data.packing import (
    ConcatenatedRows,
    HostBatches,
    PackedRows,
    Row,
    RowSequence,
    padding_row,
)
from mtp_jax.data.whole_rows import WholeRows, WhollyLearned
from mtp_jax.errors import UserError

Batch = dict[str, np.ndarray]
CorpusRows = PackedRows | WholeRows | WhollyLearned

# Rows come from memory maps, so more threads only contend for the interpreter.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
_ROW_SHUFFLE = 1  # tells the seed of rows from that of documents


def open_sources(
    cfg: Config,
    directories: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    part: tuple[int, int] = (0, 1),
    tokenizer: str | None = None,
) -> list[Corpus]:
    """Opens the corpora and checks that they fit the model and each other.

    Args:
      cfg: the run; `data.verify` says whether file contents are checked.
      directories: instead of `cfg.data.sources`.
      splits: those that will be read.
      part: (process, processes): each checks only its share of the file contents.
      tokenizer: fingerprint of that of the run; None: any.

    Raises:
      UserError: a corpus is missing, damaged or too short, has ids that the model
        lacks, or has another tokenizer than the first one.
    """
    names = list(cfg.data.sources if directories is None else directories)
    corpora = [Corpus.open(name) for name in names]
    for corpus in corpora:
        _check_tokenizer(corpus, corpora[0], tokenizer)
        _check_source(cfg, corpus, splits)
        if cfg.data.verify:
            verify_files(corpus, splits, part)
    return corpora


def cut_conversations(cfg: Config, sources: Sequence[Corpus]) -> list[str]:
    """Lines about sources with conversations that are longer than a row."""
    lines = []
    for source in sources:
        if not source.has_learned:
            continue
        lengths = source.documents("train").lengths
        most = cfg.data.seq_len + 1
        if long := int(np.count_nonzero(lengths > most)):
            lines.append(
                f"{source.directory}: {long} of {len(lengths)} conversations have more "
                f"than {most} tokens (config.data.seq_len + 1); their ends are left out"
            )
    return lines


def train_batches(
    cfg: Config,
    rows_of_this_host: np.ndarray,
    start_step: int,
    sources: Sequence[Corpus] | None = None,
    *,
    start_row: int | None = None,
) -> Generator[Batch, None, None]:
    """Batches of `start_step` and all steps after it, without end.

    Reader processes end when the generator is dropped.

    Args:
      cfg: the run.
      rows_of_this_host: rows of the global batch to give, see `rows_of_process`.
      start_step: global batches consumed before.
      sources: opened corpora; None: `open_sources(cfg)`.
      start_row: rows consumed before; None: `start_step` batches of today's size.

    Returns:
      Batches of tokens, segments and positions, int32 [B, S], and hash, uint32
      [B, 2], see `packing`; if a source is of conversations, also learned, int32
      [B, S], 1 for tokens that are to be learned. Where there are several sources they
      take turns by weight, which is met to within 1 %; each is shuffled again in every
      epoch.

    Raises:
      UserError: what `open_sources` raises.
    """
    corpora = open_sources(cfg) if sources is None else sources
    rows = _mixture(cfg, corpora)
    size = cfg.data.batch_size
    first = start_step * size if start_row is None else start_row
    n_batches = (sys.maxsize - first) // size  # row numbers must fit an int64
    batches = HostBatches(rows, size, rows_of_this_host, n_batches, first)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(_READ_OPTIONS)
    if cfg.data.workers:
        # Grain hands the command line's flags to its processes, even if none are used.
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=cfg.data.workers)
        )
    iterator = iter(dataset)
    plain = _in_own_memory(iterator)
    # Also at exit, while the modules that Grain needs to stop processes are alive.
    weakref.finalize(plain, iterator.close)
    return plain


def different_rows(cfg: Config, sources: Sequence[Corpus]) -> int:
    """The number of first rows of `train_batches` of which none comes twice.

    With several sources it is theirs by weight, which is met to within 1 %.
    """
    learned = any(corpus.has_learned for corpus in sources)
    weights = cfg.data.weights or (1.0,) * len(sources)
    return int(
        min(
            len(_packed(cfg, corpus, "train", (cfg.data.seed, i), learned))
            * (sum(weights) / weight)
            for i, (corpus, weight) in enumerate(zip(sources, weights, strict=True))
        )
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of a document that stand in a row, in the order of the row."""

    source: int  # number of the corpus in the run
    document: int
    begin: int  # first token, in the document with its begin and end of text
    end: int  # token after the last


def pieces_of_step(
    cfg: Config, step: int, sources: Sequence[Corpus], *, start_row: int | None = None
) -> list[list[Piece]]:
    """The pieces of documents in each row of global batch `step`, counted from 0.

    `start_row` is the row that it begins with; None: after `step` batches of its size.
    """
    rows = _mixture(cfg, sources, _RowPieces)
    size = cfg.data.batch_size
    first = step * size if start_row is None else start_row
    return [rows[first + r] for r in range(size)]


def heldout_batches(
    cfg: Config,
    sources: Sequence[Corpus] | None = None,
    rows_of_this_host: np.ndarray | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Batches of the held-out documents of all sources, in the order of the files.

    Args:
      cfg: the run.
      sources: opened corpora; None: `open_sources(cfg)`.
      rows_of_this_host: rows of the global batch to give; None: all.
      limit: at most so many batches; their rows are spread evenly over the split.

    Returns:
      The same batches every time, in the form of `train_batches`; the last one is
      filled up with rows of padding.

    Raises:
      UserError: what `open_sources` raises, or no source has held-out documents.
    """
    corpora = open_sources(cfg) if sources is None else sources
    rows = _heldout_rows(cfg, corpora)
    size = cfg.data.batch_size
    needed = -(-len(rows) // size)
    n_batches = needed if limit is None else min(limit, needed)
    if rows_of_this_host is None:
        rows_of_this_host = np.arange(size)
    spread = _SpreadRows(
        rows,
        min(len(rows), n_batches * size),
        padding_row(cfg.row_len, learned=any(c.has_learned for c in corpora)),
    )
    batches = HostBatches(spread, size, rows_of_this_host, n_batches)
    return (batches[i] for i in range(n_batches))


def _in_own_memory(iterator: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Copies of batches: Grain's reader processes send shared memory."""

    def copied(batch: Batch) -> Batch:
        return {key: np.array(value) for key, value in batch.items()}

    yield from map(copied, iterator)


class _SpreadRows:
    """A sequence of `n_rows` rows at even distances out of `rows`, then padding."""

    def __init__(self, rows: RowSequence, n_rows: int, padding: Row):
        self._rows = rows
        self._n_rows = n_rows
        self._padding = padding

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, index: int) -> Row:
        if index >= self._n_rows:
            return self._padding
        return self._rows[index * len(self._rows) // self._n_rows]


def _check_tokenizer(corpus: Corpus, first: Corpus, wanted: str | None) -> None:
    """Raises UserError if it is not that of the run, or of the first corpus."""
    used, other = (c.manifest["tokenizer"]["name"] for c in (first, corpus))
    if wanted is not None and corpus.tokenizer.fingerprint != wanted:
        raise UserError(
            f"{corpus.directory} was made with another tokenizer ({other}) than the "
            "run's; prepare it with the one in the workdir, or choose another workdir."
        )
    if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise UserError(
            f"{corpus.directory} was made with another tokenizer ({other}) than "
            f"{first.directory} ({used}); prepare both with the same one."
        )


def _check_source(cfg: Config, corpus: Corpus, splits: Sequence[str]) -> None:
    """Raises UserError if a corpus does not fit the model."""
    vocab_size = corpus.tokenizer.vocab_size
    if vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"{corpus.directory} has a vocabulary of {vocab_size} ids, "
            f"config.model.vocab_size is {cfg.model.vocab_size}; give at least "
            f"{vocab_size}."
        )
    n_tokens = corpus.manifest["splits"]["train"]["tokens"]
    if "train" in splits and n_tokens < cfg.row_len and not corpus.has_learned:
        raise UserError(
            f"{corpus.directory} has {n_tokens} tokens to train on, less than a row of "
            f"{cfg.row_len} (config.data.seq_len + config.model.n_future_tokens); give "
            "more text or a smaller config.data.seq_len."
        )


class _RowPieces:
    """The rows of a corpus as lists of the pieces of documents in them."""

    def __init__(self, rows: CorpusRows, source: int):
        self._rows = rows
        self._source = source

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Piece]:
        return [Piece(self._source, *piece) for piece in self._rows.pieces(index)]


def _mixture(
    cfg: Config,
    corpora: Sequence[Corpus],
    view: Callable[[CorpusRows, int], Any] = lambda rows, source: rows,
) -> grain.MapDataset:
    """Endless rows of all sources in the order of training, or a view of them."""
    datasets = []
    learned = any(corpus.has_learned for corpus in corpora)
    for i, corpus in enumerate(corpora):
        seed_of_rows = (cfg.data.seed, i)
        rows = view(_packed(cfg, corpus, "train", seed_of_rows, learned), i)
        seed = np.random.SeedSequence([cfg.data.seed, i, _ROW_SHUFFLE])
        dataset = grain.MapDataset.source(rows)
        dataset = dataset.shuffle(seed=int(seed.generate_state(1)[0]))
        datasets.append(dataset.repeat())
    weights = cfg.data.weights or (1.0,) * len(datasets)
    return grain.MapDataset.mix(datasets, weights)


def _heldout_rows(cfg: Config, corpora: Sequence[Corpus]) -> RowSequence:
    """The held-out rows of all corpora, one after another."""
    learned = any(corpus.has_learned for corpus in corpora)
    sources = [
        _packed(cfg, corpus, "heldout", None, learned)
        for corpus in corpora
        if len(corpus.documents("heldout"))
    ]
    if not sources:
        names = ", ".join(str(corpus.directory) for corpus in corpora)
        raise UserError(
            f"there are no held-out documents in {names}; run prepare with --heldout "
            "above 0."
        )
    return ConcatenatedRows(sources)


def _packed(
    cfg: Config,
    corpus: Corpus,
    split: str,
    seed: tuple[int, int] | None,
    learned: bool,
) -> CorpusRows:
    """The rows of a split of a corpus; with `learned` they say what is learned."""
    documents = corpus.documents(split)
    of = (documents, cfg.row_len, cfg.data.seq_len, cfg.model.vocab_size, seed)
    if corpus.has_learned:
        return WholeRows(*of)
    return WhollyLearned(PackedRows(*of)) if learned else PackedRows(*of)
