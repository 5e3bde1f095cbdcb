"""A memory of head 1 while the heads after it are taught.

At most an activation of each: its output, which is their teacher; its gradient into the
trunk, which theirs are compared with; and how far ahead each token is to be predicted.

Axes: B rows, T positions, D model width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import LossConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.grouping import depth_of_groups
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import HeadInput
from mtp_jax.parallel.sequence import from_next


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that is not the model itself; empty: it is."""

    hidden_BTD: jax.Array | None = None  # normed output of its head 1
    unembedding_VD: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Things that heads leave to the next one; None: those that nothing asks for."""

    # The teacher's output where it predicts the token that the last head predicted.
    teacher_BTD: jax.Array | None = None
    first_BTD: jax.Array | None = None  # gradient of head 1 into the trunk
    depth_BT: jax.Array | None = None  # of `depth_of_groups`

    def heard(
        self, loss: LossConfig, head: HeadInput, hidden_BTD: jax.Array
    ) -> "Memory":
        """With the teacher's output for the tokens of this head."""
        if self.teacher_BTD is None:
            return self
        is_first = head.extra.number_N == 0
        now_BTD = hidden_BTD if loss.teacher == "self" else self.teacher_BTD
        now_BTD = now_BTD.astype(self.teacher_BTD.dtype)
        later_BTD = from_next(self.teacher_BTD)
        return dataclasses.replace(
            self, teacher_BTD=jnp.where(is_first, now_BTD, later_BTD)
        )

    def passed(self) -> "Memory":
        """After a head that did no work."""
        if self.teacher_BTD is None:
            return self
        return dataclasses.replace(self, teacher_BTD=from_next(self.teacher_BTD))

    def keep(self, head: HeadInput) -> jax.Array | None:
        """True where this head is to be trained; None: everywhere."""
        if self.depth_BT is None:
            return None
        return head.extra.number_N <= self.depth_BT

    def measured(
        self, loss: LossConfig, head: HeadInput, scores: TokenScores, rows: RowContext
    ) -> "Memory":
        """With the groups that the entropy of head 1 makes."""
        if self.depth_BT is None:
            return self
        assert scores.entropy is not None
        found_BT = depth_of_groups(
            scores.entropy, rows.segments_BT, loss.mask_threshold
        )
        is_first = head.extra.number_N == 0
        return dataclasses.replace(
            self, depth_BT=jnp.where(is_first, found_BT, self.depth_BT)
        )

    def pulled(
        self,
        loss: LossConfig,
        head: HeadInput,
        scores: TokenScores,
        d_trunk_BTD: jax.Array,
    ) -> tuple[TokenScores, jax.Array, "Memory"]:
        """The gradient that the trunk takes of a head, and how it compares to head 1's.

        Args:
          loss: of the run.
          head: with its targets.
          scores: of the head, to add what is measured to.
          d_trunk_BTD: the gradient of its weighted loss.
        """
        memory = self
        if memory.first_BTD is not None or head.extra.pull_N is not None:
            # Computed to the bit as where nothing is made of it.
            d_trunk_BTD = lax.optimization_barrier(d_trunk_BTD)
        if memory.first_BTD is not None:
            first_BTD = jnp.where(
                head.extra.number_N == 0, d_trunk_BTD, memory.first_BTD
            )
            memory = dataclasses.replace(memory, first_BTD=first_BTD)
            wide_BTD, first_BTD = (
                x.astype(jnp.float32) for x in (d_trunk_BTD, first_BTD)
            )
            product_BT = jnp.sum(wide_BTD * first_BTD, axis=-1)
            scores = dataclasses.replace(
                scores,
                with_first=jnp.sum(product_BT),
                squared=jnp.sum(jnp.square(wide_BTD)),
            )
            if loss.balance == "pcgrad":
                # Gradient surgery (arXiv:2001.06782) of each token's gradient.
                square_BT = jnp.sum(jnp.square(first_BTD), axis=-1)
                against_BT = jnp.minimum(product_BT, 0.0)
                share_BT = against_BT / jnp.maximum(square_BT, 1e-30)
                wide_BTD = wide_BTD - share_BT[..., None] * first_BTD
                d_trunk_BTD = wide_BTD.astype(d_trunk_BTD.dtype)
        if head.extra.pull_N is not None:
            d_trunk_BTD = d_trunk_BTD * head.extra.pull_N.astype(d_trunk_BTD.dtype)
        return scores, d_trunk_BTD, memory


def start_of_memory(loss: LossConfig, trunk_BTD: jax.Array, teacher: Teacher) -> Memory:
    """The memory before head 1."""
    hidden_BTD = teacher.hidden_BTD
    if hidden_BTD is not None:
        hidden_BTD = hidden_BTD.astype(trunk_BTD.dtype)
    elif loss.needs_teacher:
        hidden_BTD = jnp.zeros_like(trunk_BTD)
    first_BTD = jnp.zeros_like(trunk_BTD) if loss.measures_gradients else None
    depth_BT = None
    if loss.mask == "entropy":
        # Head 1 is trained everywhere.
        depth_BT = jnp.zeros_like(trunk_BTD[..., 0], jnp.int32)
    return Memory(hidden_BTD, first_BTD, depth_BT)
