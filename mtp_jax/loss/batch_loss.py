"""What the heads must predict, and how well they do: sums and counts a head.

Axes: B batch, S = T + N tokens of a row, T positions, N heads, D width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.head_loss import Targets, head_loss
from mtp_jax.model.heads.parallel import Rows, attend_within
from mtp_jax.model.language_model import LanguageModel, run_trunk
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sharding import spec, time_parts


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


def batch_loss(
    model: LanguageModel,
    batch: dict[str, jax.Array],
    weight_N: jax.Array,
    z_loss: float,
    compute: ComputeConfig,
) -> tuple[jax.Array, HeadSums]:
    """The training loss of packed rows, and the sums and counts of every head.

    loss = sum over heads and targets of weight (nll + z_loss log_z^2), float32.

    Args:
      model: with n heads.
      batch: tokens, segments and positions, int32 [B, S]: token ids, document numbers
        with 0 for padding, and positions within the documents.
      weight_N: weight of each target of a head, float32.
      z_loss: weight of the squared log-partition.
      compute: how the arithmetic is carried out.
    """
    n = model.cfg.n_future_tokens
    # Every device has its rows whole, and so whatever its positions must predict.
    token_NBT, valid_NBT = map(
        split_time, future_targets(batch["tokens"], batch["segments"], n)
    )
    tokens_BT = split_time(batch["tokens"][:, :-n])
    positions_BT = split_time(batch["positions"][:, :-n])
    rows = Rows(model.angles(positions_BT), batch["segments"][:, :-n])
    trunk_BTD = run_trunk(
        model,
        model.embed(tokens_BT),
        rows.angles_BTk,
        attend_within(rows, compute.attention),
        compute.remat,
    )
    targets = Targets(token_NBT, jnp.where(valid_NBT, weight_N[:, None, None], 0.0))
    loss, scores = head_loss(model, trunk_BTD, rows, targets, z_loss, compute)
    return loss, _sums(scores, token_NBT, valid_NBT)


def split_time(x_BT: jax.Array) -> jax.Array:
    """Whole rows [..., B, T], laid out over the devices that share them."""
    parts = jax.sharding.get_abstract_mesh().shape["sequence"]
    outer = (None,) * (x_BT.ndim - 2)
    split = spec(*outer, "batch", "time")
    return jax.sharding.reshard(zigzag.deal(x_BT, parts, axis=-1), split)


def _whole_time(x_BT: jax.Array) -> jax.Array:
    """The inverse of `split_time`, of [B, T]."""
    parts = time_parts(x_BT)
    whole_BT = jax.sharding.reshard(x_BT, spec("batch", None))
    return zigzag.restore(whole_BT, parts, axis=-1)


def head_sums(
    model: LanguageModel, batch: dict[str, jax.Array], compute: ComputeConfig
) -> HeadSums:
    """Sums and counts of every head over a batch, as of `batch_loss`."""
    unweighted_N = jnp.zeros(model.cfg.n_future_tokens)
    return batch_loss(model, batch, unweighted_N, 0.0, compute)[1]


def _sums(scores: TokenScores, token_NBT: jax.Array, valid_NBT: jax.Array) -> HeadSums:
    def total_N(x_NBT):
        return jnp.sum(jnp.where(valid_NBT, x_NBT, 0), (1, 2), dtype=jnp.float32)

    return HeadSums(
        count_N=total_N(1.0),
        nll_N=total_N(scores.nll),
        z_N=total_N(jnp.square(scores.log_z)),
        correct_N=total_N(scores.said == token_NBT),
        **_acceptance(scores.said, valid_NBT),
    )


def _acceptance(said_NBT: jax.Array, valid_NBT: jax.Array) -> dict[str, jax.Array]:
    """How far heads 2..n, at t, agree with what head 1 says once it gets there.

    Teacher-forced: head 1 reads the true text. Token t + i is drafted by head i at t
    and spoken by head 1 at t + i - 1, so a position counts only if all n - 1 of those
    lie in the row and in its document.
    """
    n, _, t = said_NBT.shape
    inside_T = zigzag.positions(t, time_parts(said_NBT[0])) <= t - n
    window_BT = valid_NBT[-1] & inside_T[None]
    prefix_BT, accepted = window_BT, [window_BT]
    # What head 1 says further on may be said on another device.
    first_BT = _whole_time(said_NBT[0])
    for i in range(1, n):
        # Shifted by a pad of -i: jax 0.12 loses the sharding of a slice of one row.
        spoken_BT = jax.lax.pad(first_BT, jnp.int32(-1), [(0, 0, 0), (-i, i, 0)])
        prefix_BT = prefix_BT & (said_NBT[i] == split_time(spoken_BT))
        accepted.append(prefix_BT)
    accepted_N = jnp.sum(jnp.stack(accepted), axis=(1, 2), dtype=jnp.float32)
    return {"windows": accepted_N[0], "accepted_N": accepted_N}


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
