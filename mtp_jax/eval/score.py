"""Scores of given tokens: how likely, which rank, and what the model would have said.

Axes: B rows, T tokens of a row, C of a chunk, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import ModelConfig
from mtp_jax.data.positions import positions_of
from mtp_jax.decode.batch import bucket_size, on_host, put
from mtp_jax.decode.decoders.sampling import most_likely
from mtp_jax.errors import UserError
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import (
    HeadRunner,
    Parts,
    beside,
    tokens_before,
    visit_heads,
)
from mtp_jax.model.language_model import model_builder, run_trunk
from mtp_jax.model.layers import unembed
from mtp_jax.parallel.sharding import batch_shards, spec

Ids = Sequence[int] | np.ndarray

_CHUNK = 64  # tokens of a row whose logits are in memory at once
_LEAST = (
    32  # tokens of a row; rows come in doubles of this, so that programs are shared
)
BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of a continuation, in their order."""

    log_probs: np.ndarray  # natural logarithms, float32
    ranks: np.ndarray  # int32; 1: no token is likelier
    best: np.ndarray  # the most likely tokens, int32
    tokens: np.ndarray  # the continuation, int32

    @property
    def log_prob(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """True if every token is the most likely one after those before it."""
        return bool(np.array_equal(self.best, self.tokens))


def score_continuations(
    model: Restored,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    head: int = 1,
    batch_size: int = BATCH_SIZE,
    max_tokens: int | None = None,
) -> list[TokenScores]:
    """Scores continuations by the forward pass of training.

    Rows of similar length are scored together, padded to a power of two; the results
    come in the order of the pairs. Equal pairs are scored once.

    Args:
      model: a restored model, on any mesh.
      pairs: token ids of a context, begin of text included, and of what follows it. A
        context has at least `head` tokens.
      head: which head predicts: head i predicts a token from the text that ends i
        tokens before it.
      batch_size: rows at a time, rounded up to what the devices can split.
      max_tokens: the longest text that the model reads, as long as those of training if
        None. A context that is too long is cut from the left.

    Returns:
      Scores a pair. Log-probabilities are over the whole vocabulary; ranks and most
      likely tokens are among the ids that the tokenizer has.

    Raises:
      UserError: no such head, an empty or too long continuation, a context that is too
        short, ids that the model does not know.
    """
    cfg = model.config.model
    most = model.config.data.seq_len if max_tokens is None else max_tokens
    if not 1 <= head <= cfg.n_future_tokens:
        raise UserError(f"head is {head}; the model has 1 to {cfg.n_future_tokens}.")
    # The heads that this one does not read need not run.
    model = model.keep_heads(max(head, cfg.heads.least_kept(cfg.n_future_tokens)))
    rows = [_row(cfg, context, after, head, most) for context, after in pairs]
    unique = list(
        {(r.tokens.tobytes(), r.start): i for i, r in enumerate(rows)}.values()
    )
    unique.sort(key=lambda i: (len(rows[i].tokens), i))
    ids = min(cfg.vocab_size, model.tokenizer.vocab_size)
    found: dict[tuple[bytes, int], TokenScores] = {}
    with jax.set_mesh(model.mesh):
        shards = batch_shards(model.mesh)
        size = -(-batch_size // shards) * shards
        for start in range(0, len(unique), size):
            chosen = [rows[i] for i in unique[start : start + size]]
            for row, scores in zip(
                chosen, _score(model, chosen, head, size, ids), strict=True
            ):
                found[row.tokens.tobytes(), row.start] = scores
    return [found[row.tokens.tobytes(), row.start] for row in rows]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A text, and where in it the scored part begins."""

    tokens: np.ndarray
    start: int


def _row(cfg: ModelConfig, context: Ids, after: Ids, head: int, most: int) -> _Row:
    """A checked row: context and continuation, cut from the left to `most` inputs."""
    if not 1 <= len(after) <= most:
        raise UserError(
            f"a continuation has {len(after)} tokens; it can have 1 to {most}, the "
            "longest text that the model reads."
        )
    if len(context) < head:
        raise UserError(
            f"a context has {len(context)} tokens; head {head} reads at least {head} "
            "before what it predicts, begin of text included."
        )
    whole = np.concatenate([np.asarray(context), np.asarray(after)]).astype(np.int64)
    if not 0 <= whole.min() <= whole.max() < cfg.vocab_size:
        raise UserError(
            f"a text has token ids from {whole.min()} to {whole.max()}; the model "
            f"knows 0 to {cfg.vocab_size - 1}."
        )
    whole = whole[-(most + head) :]
    start = len(whole) - len(after)
    return _Row(whole.astype(np.int32), start)


def _score(
    model: Restored, rows: list[_Row], head: int, size: int, ids: int
) -> Iterator[TokenScores]:
    """Scores rows in one batch of `size`."""
    longest = max(len(row.tokens) for row in rows) - 1
    width = bucket_size(longest, least=_LEAST)
    tokens_BT = np.zeros((size, width), np.int32)
    targets_BT = np.zeros((size, width), np.int32)
    segments_BT = np.zeros((size, width), np.int32)
    for b, row in enumerate(rows):
        # Some heads read the token before the predicted one, none the last of all.
        n = len(row.tokens) - 1
        tokens_BT[b, :n] = row.tokens[:n]
        targets_BT[b, : n + 1 - head] = row.tokens[head:]
        segments_BT[b, :n] = 1
    arrays = (tokens_BT, segments_BT, positions_of(segments_BT), targets_BT)
    run = _program(model.config.model, head, ids)
    log_BT, rank_BT, best_BT = map(on_host, run(model.params, *map(put, arrays)))
    for b, row in enumerate(rows):
        at = slice(row.start - head, len(row.tokens) - head)
        yield TokenScores(
            log_BT[b, at], rank_BT[b, at], best_BT[b, at], row.tokens[row.start :]
        )


@functools.cache
def _program(cfg: ModelConfig, head: int, ids: int) -> Callable[..., Any]:
    """`f(params, tokens, segments, positions, targets)`, all [B, T], jitted.

    Returns log-probabilities, ranks and most likely tokens of the targets, [B, T].
    """
    _, build = model_builder(cfg)

    @jax.jit
    def program(params: Any, tokens_BT, segments_BT, positions_BT, targets_BT):
        model = build(params)
        rows = RowContext(model.angles(positions_BT), segments_BT)
        trunk_BTD = run_trunk(model, model.embed(tokens_BT), rows, "auto")
        parts = model.parts(trunk_BTD)
        factors = _factors(cfg, rows, parts, tokens_before(cfg, tokens_BT), head)

        def chunk(_, now):
            inputs, targets_BC = now
            out = spec("batch", None, "vocab")
            products = [
                unembed(x_BCX, w_VX, out)
                for x_BCX, (_, w_VX) in zip(inputs, factors, strict=True)
            ]
            logits_BCV = functools.reduce(jnp.add, products)
            return None, _of_targets(logits_BCV, targets_BC, ids)

        inputs = [_in_chunks(x_BTX) for x_BTX, _ in factors]
        scores = lax.scan(chunk, None, (inputs, _in_chunks(targets_BT)))[1]
        return tuple(_joined(x) for x in scores)

    return program


def _factors(
    cfg: ModelConfig,
    rows: RowContext,
    parts: Parts,
    before_NBT: jax.Array | None,
    head: int,
) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs [B, T, X] and [V, X] whose products add up to the logits of a head.

    They are its hidden states and the unembedding, and where there is a bias by the
    token before the predicted one, the factors of that.
    """

    def visit(weights, head_input, hidden_BTD):
        return hidden_BTD, beside(weights, head_input, cfg.compute_dtype)

    runner = HeadRunner(cfg, rows, "auto")
    inputs_NBTX = visit_heads(runner, parts, before_NBT, None, visit)
    both = parts.own | parts.common
    factors = []
    for x_NBTX, w in zip(inputs_NBTX, (both.unembedding, both.markov_out), strict=True):
        if x_NBTX is not None and w is not None:
            w_VX = w[head - 1] if w.ndim == 3 else w
            w_VX = w_VX.astype(cfg.compute_dtype)
            w_VX = jax.sharding.reshard(w_VX, spec("vocab", None))
            factors.append((x_NBTX[head - 1], w_VX))
    return factors


def _in_chunks(x_BT: jax.Array) -> jax.Array:
    """Chunks of the tokens in front, [T/C, B, C, ...]."""
    b, t, *rest = x_BT.shape
    c = min(t, _CHUNK)
    return jnp.moveaxis(x_BT.reshape(b, t // c, c, *rest), 1, 0)


def _joined(x_NBC: jax.Array) -> jax.Array:
    """Tokens of all chunks in a row again, [B, T]."""
    x_BNC = jnp.moveaxis(x_NBC, 0, 1)
    return x_BNC.reshape(x_BNC.shape[0], -1)


def _of_targets(
    logits_BCV: jax.Array, targets_BC: jax.Array, ids: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability and rank of each target, and the most likely token, [B, C].

    By sums over the vocabulary alone, which may be split over devices.
    """
    vocab = logits_BCV.shape[-1]
    number_11V = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    is_target_BCV = number_11V == targets_BC[..., None]
    target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
    top_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    total_BC = jnp.sum(jnp.exp(logits_BCV - top_BC1), axis=-1)
    log_BC = target_BC - top_BC1[..., 0] - jnp.log(total_BC)
    known_BCV = jnp.where(number_11V < ids, logits_BCV, -jnp.inf)
    likelier_BCV = known_BCV > target_BC[..., None]
    # Of equally likely ones the first is the most likely, as in decoding.
    before_BCV = (known_BCV == target_BC[..., None]) & (
        number_11V < targets_BC[..., None]
    )
    rank_BC = 1 + jnp.sum(likelier_BCV | before_BCV, axis=-1, dtype=jnp.int32)
    return log_BC, rank_BC, most_likely(known_BCV)


def rolling_windows(
    ids: Ids, prefix: int, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a text into pairs of context and continuation that predict every token once.

    Windows do not overlap in what they predict; the first begins with the prefix alone,
    a later one has a token of context, and the last as many as there is room for (as
    `get_rolling_token_windows`, `make_disjoint_window` of lm-evaluation-harness).

    Args:
      ids: tokens of the text.
      prefix: the token that stands before it, begin of text.
      most: tokens that the model reads at once.
    """
    whole = np.concatenate([[prefix], np.asarray(ids, np.int64)]).astype(np.int32)
    for start in range(1, len(whole), most):
        end = min(start + most, len(whole))
        yield whole[max(0, end - 1 - most) : start], whole[start:end]


def score_text(
    model: Restored,
    ids: Ids,
    *,
    batch_size: int = BATCH_SIZE,
    max_tokens: int | None = None,
) -> TokenScores:
    """Scores every token of a text of any length by head 1, in rolling windows.

    Args:
      model: a restored model.
      ids: tokens of the text, without begin of text; at least one.
      batch_size: windows at a time.
      max_tokens: of a window; as many as in training if None.

    Raises:
      UserError: no tokens, or ids that the model does not know.
    """
    most = model.config.data.seq_len if max_tokens is None else max_tokens
    pairs = list(rolling_windows(ids, model.tokenizer.bos_id, most))
    if not pairs:
        raise UserError("a text has no tokens; give some text.")
    scores = score_continuations(model, pairs, batch_size=batch_size, max_tokens=most)
    parts = [(s.log_probs, s.ranks, s.best, s.tokens) for s in scores]
    return TokenScores(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def context_and_continuation(
    encode: Callable[[str], Ids], bos_id: int, context: str, continuation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a context, begin of text first, and of its continuation.

    Spaces at the end of the context go to the continuation, and the continuation is
    what the tokens of both together have beyond those of the context: so a token is
    never cut (lm-evaluation-harness, `TemplateLM._encode_pair`).
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    before = np.asarray(encode(context), np.int32) if context else np.zeros(0, np.int32)
    both = np.asarray(encode(context + continuation), np.int32)
    begin = np.array([bos_id], np.int32)
    return np.concatenate([begin, before]), both[len(before) :]
