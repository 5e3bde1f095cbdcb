"""What the heads must predict, and how well they do: sums and counts a head.

Axes: B batch, S = T + N tokens of a row, T positions, N heads, D width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.attention import causal_attention
from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.heads import scan_heads
from mtp_jax.model import LanguageModel, run_trunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadSums:
    """Sums over targets, float32, to be added up over batches before any division."""

    count_N: jax.Array  # targets
    nll_N: jax.Array  # negative log likelihood, nats
    z_N: jax.Array  # squared log-partition
    correct_N: jax.Array  # targets that were the most likely token
    windows: jax.Array  # positions from which all n tokens lie in one document
    accepted_N: jax.Array  # windows of which head 1 would say the drafts up to head i


def no_sums(n: int) -> HeadSums:
    """The sums over no target at all, to begin with."""
    zero_N, zero = jnp.zeros(n), jnp.zeros(())
    return HeadSums(zero_N, zero_N, zero_N, zero_N, windows=zero, accepted_N=zero_N)


def head_weights(cfg: LossConfig, n: int) -> jax.Array:
    """Weight of each head's mean loss, float32 [N]; all 1 is the paper's sum."""
    if cfg.head_weights:
        return jnp.array(cfg.head_weights, jnp.float32)
    return cfg.head_decay ** jnp.arange(n, dtype=jnp.float32)


def future_targets(
    tokens_BS: jax.Array, segments_BS: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """What head i must predict at position t: token t + i, if in the same document.

    Args:
      tokens_BS: token ids; S = T + n, so that each head has a target everywhere.
      segments_BS: document number of each token; 0 is padding.
      n: how many tokens ahead are predicted.

    Returns:
      targets_NBT, int32, and valid_NBT, False where the target lies in another document
      or in padding.

    Raises:
      ValueError: rows are too short to hold one position.
    """
    t = tokens_BS.shape[1] - n
    if t < 1:
        raise ValueError(
            f"rows of {tokens_BS.shape[1]} tokens hold no position with {n} tokens "
            "after it; rows must hold seq_len + n tokens."
        )
    offsets = range(1, n + 1)
    targets_NBT = jnp.stack([tokens_BS[:, i : i + t] for i in offsets])
    segments_NBT = jnp.stack([segments_BS[:, i : i + t] for i in offsets])
    here_BT = segments_BS[:, :t]
    return targets_NBT, (segments_NBT == here_BT[None]) & (here_BT[None] != 0)


def target_counts(segments_BS: jax.Array, n: int) -> jax.Array:
    """Number of targets of each head, float32 [N]."""
    _, valid_NBT = future_targets(segments_BS, segments_BS, n)
    return jnp.sum(valid_NBT, axis=(1, 2), dtype=jnp.float32)


def head_sums(
    model: LanguageModel, batch: dict[str, jax.Array], compute: ComputeConfig
) -> HeadSums:
    """Sums and counts of every head over a batch of packed rows.

    Args:
      model: with n heads.
      batch: tokens, segments and positions, int32 [B, S]: token ids, document numbers
        with 0 for padding, and positions within the documents.
    """
    n = model.cfg.n_future_tokens
    targets_NBT, valid_NBT = future_targets(batch["tokens"], batch["segments"], n)
    tokens_BT, segments_BT = batch["tokens"][:, :-n], batch["segments"][:, :-n]
    angles_BTk = model.angles(batch["positions"][:, :-n])

    def attend(q_BTHK, k_BTGK, v_BTGK):
        kernel = compute.attention
        return causal_attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, kernel), None

    trunk_BTD = run_trunk(
        model, model.embed(tokens_BT), angles_BTk, attend, compute.remat
    )
    unembedding_VD = model.unembedding()  # gathered once, not once a head

    def score(head_BTD, target_and_valid):
        targets_BT, valid_BT = target_and_valid
        logits_BTV = model.logits(head_BTD, unembedding_VD)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        said_BT = most_likely(jax.lax.stop_gradient(logits_BTV))
        sums = {
            "count_N": valid_BT,
            "nll_N": jnp.where(valid_BT, log_z_BT - pick(logits_BTV, targets_BT), 0.0),
            "z_N": jnp.where(valid_BT, jnp.square(log_z_BT), 0.0),
            "correct_N": valid_BT & (said_BT == targets_BT),
        }
        return {k: jnp.sum(x, dtype=jnp.float32) for k, x in sums.items()}, said_BT

    xs = (targets_NBT, valid_NBT)
    sums, said_NBT = scan_heads(model, trunk_BTD, angles_BTk, attend, score, xs)
    return HeadSums(**sums, **_acceptance(said_NBT, valid_NBT))


def most_likely(logits_BTV: jax.Array) -> jax.Array:
    """The first token of the highest score, int32 [B, T].

    Two plain reductions instead of argmax: they stay on their shards when V is split,
    and compilers make vector code of them.
    """
    vocab = logits_BTV.shape[-1]
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    ids_11V = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    return jnp.min(jnp.where(logits_BTV == top_BT1, ids_11V, vocab - 1), axis=-1)


def pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The score of each target, [B, T].

    By comparison, not by a gather, which would collect a split V on every device.
    """
    ids_11V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.sum(jnp.where(ids_11V == targets_BT[:, :, None], logits_BTV, 0.0), -1)


def _acceptance(said_NBT: jax.Array, valid_NBT: jax.Array) -> dict[str, jax.Array]:
    """How far heads 2..n, at t, agree with what head 1 says once it gets there.

    Teacher-forced: head 1 reads the true text. Token t + i is drafted by head i at t
    and spoken by head 1 at t + i - 1, so a position counts only if all n - 1 of those
    lie in the row and in its document.
    """
    n, _, t = said_NBT.shape
    inside_T = jnp.arange(t) <= t - n
    window_BT = valid_NBT[-1] & inside_T[None]
    prefix_BT, accepted = window_BT, [window_BT]
    for i in range(1, n):
        # Shifted by a pad of -i: jax 0.12 loses the sharding of a slice of one row.
        spoken_BT = jax.lax.pad(said_NBT[0], jnp.int32(-1), [(0, 0, 0), (-i, i, 0)])
        prefix_BT = prefix_BT & (said_NBT[i] == spoken_BT)
        accepted.append(prefix_BT)
    accepted_N = jnp.sum(jnp.stack(accepted), axis=(1, 2), dtype=jnp.float32)
    return {"windows": accepted_N[0], "accepted_N": accepted_N}


def objective(
    sums: HeadSums, count_N: jax.Array, weights_N: jax.Array, z_loss: float
) -> jax.Array:
    """Weighted sum of the heads' mean losses, nats, a scalar.

    count_N counts the targets of the whole global batch, so that the parts of a batch
    add up to the loss of the batch, however it is split.
    """
    mean_N = (sums.nll_N + z_loss * sums.z_N) / jnp.maximum(count_N, 1.0)
    return jnp.sum(weights_N * mean_N)


def summarize(sums: HeadSums) -> dict[str, jax.Array]:
    """Means of the sums: `loss_N` in nats, `accuracy_N`, `accepted_N` (share of windows
    accepted up to head i; 1 for head 1) and `accept_length`, tokens a forward pass."""
    count_N = jnp.maximum(sums.count_N, 1.0)
    accepted_N = sums.accepted_N / jnp.maximum(sums.windows, 1.0)
    return {
        "loss_N": sums.nll_N / count_N,
        "accuracy_N": sums.correct_N / count_N,
        "accepted_N": accepted_N,
        "accept_length": 1.0 + jnp.sum(accepted_N[1:]),
    }
