"""Typical acceptance: a draft need not be head 1's choice, only likely enough for it.

Medusa's rule (arXiv:2401.10774, section 2.3.1): where head 1 has the distribution p,
of entropy H, a draft x is accepted if p(x) > min(epsilon, delta exp(-H)). The longest
path of accepted nodes is committed, of equally long ones the most likely, and then head
1's most likely token. Nothing is drawn. Texts follow neither head 1's choice nor its
distribution; tokens that are not its most likely are counted. Greedy, it is `tree`.

Axes: W nodes of the tree with the root, N heads, B batch, D model width, V vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtp_jax.decode.cache import at_slot
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes
from mtp_jax.decode.decoders.passes import PassOutput
from mtp_jax.decode.decoders.sampling import Sampler, most_likely
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    commit,
    next_logits,
    target_probs,
)
from mtp_jax.decode.decoders.token_tree import TokenTree
from mtp_jax.decode.decoders.tree import Tree, commit_path, read_nodes
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import spec


@dataclasses.dataclass(frozen=True)
class Typical:
    """Drafts that are likely enough are taken: lossy."""

    lossy: ClassVar[bool] = True

    epsilon: float = dataclasses.field(
        default=0.09, metadata={"help": "a draft at least so likely is accepted"}
    )
    delta: float = dataclasses.field(
        default=0.3, metadata={"help": "or so likely times exp(-entropy)"}
    )
    tree: str = dataclasses.field(
        default="",
        metadata={"help": "file that calibrate wrote; if not given, a built-in tree"},
    )
    # The same drafts with exact verification.
    exact: Tree = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; it must be 0 to 1.")
        object.__setattr__(self, "exact", Tree(self.tree))

    def heads(self, n: int) -> int:
        """Head 1 and those of the n - 1 others that the tree has candidates of."""
        return self.exact.heads(n)

    def width(self, n: int) -> int:
        """The number of nodes of the tree."""
        return self.exact.width(n)

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits head 1's most likely token at the prompt's end."""
        next_B1 = most_likely(next_logits(model, state, end.hidden_B1D))
        none_B = jnp.zeros_like(state.length_B)
        state = commit(state, next_B1, none_B + 1, none_B)
        sampler = Sampler(state.keys, state.length_B)
        drafting = end.drafting(model, state)
        return passes.drafted(self.exact, model, state, drafting, sampler)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the tree, commits its longest accepted path and one token more."""
        if state.sampling.greedy:
            return self.exact.step(model, state, depth)
        tree = self.exact.used(depth, model.choices)
        out = read_nodes(model, state, tree)
        target_BWV = target_probs(state, out.logits_BWV)
        prob_BW = _of_drafts(tree, out, target_BWV)
        accepted_BW = prob_BW > _after_parent(tree, self._least(target_BWV))
        predicted_BW = most_likely(out.logits_BWV)
        end_B = _longest(tree, accepted_BW, prob_BW)
        return commit_path(
            model,
            state,
            tree,
            out,
            end_B,
            at_slot(predicted_BW, end_B)[:, None],
            self.exact.used(len(model.heads), model.choices),
            out.new.tokens_BW != _after_parent(tree, predicted_BW),
        )

    def _least(self, target_BWV: jax.Array) -> jax.Array:
        """The probability that a draft after each node must exceed, float32 [B, W]."""
        entropy_BW = -jnp.sum(jax.scipy.special.xlogy(target_BWV, target_BWV), axis=-1)
        return jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy_BW))


def _after_parent(tree: TokenTree, x_BWX: jax.Array) -> jax.Array:
    """Gives each node its parent's entry, [B, W, ...]; the root gets any entry."""
    out = spec("batch", *[None] * (x_BWX.ndim - 1))
    return x_BWX.at[:, tree.parent_W].get(out_sharding=out)


def _of_drafts(tree: TokenTree, out: PassOutput, target_BWV: jax.Array) -> jax.Array:
    """The probability of each node after its parent by head 1, float32 [B, W]."""
    ids_11V = jnp.arange(target_BWV.shape[-1])[None, None]
    is_draft_BWV = out.new.tokens_BW[:, :, None] == ids_11V
    return jnp.sum(
        jnp.where(is_draft_BWV, _after_parent(tree, target_BWV), 0.0), axis=-1
    )


def _longest(tree: TokenTree, accepted_BW: jax.Array, prob_BW: jax.Array) -> jax.Array:
    """The end of the longest accepted path, of equals the most likely, [B]."""
    is_root_1W = (tree.depth_W == 0)[None]
    in_path_1WW = tree.ancestors_WW[None]
    ok_BW = accepted_BW | is_root_1W
    path_ok_BW = jnp.all(ok_BW[:, None] | ~in_path_1WW, axis=2)
    length_BW = jnp.where(path_ok_BW, tree.depth_W[None], -1)
    longest_BW = length_BW == jnp.max(length_BW, axis=1, keepdims=True)
    log_BW = jnp.where(is_root_1W, 0.0, jnp.log(prob_BW))
    path_log_BW = jnp.sum(jnp.where(in_path_1WW, log_BW[:, None], 0.0), axis=2)
    best_BW = jnp.where(longest_BW, path_log_BW, -jnp.inf)
    return jnp.argmax(best_BW, axis=1).astype(jnp.int32)
