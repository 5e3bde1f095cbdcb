"""Drafts as a tree: several candidates of each head, verified in one forward pass.

The tree is Medusa's (arXiv:2401.10774, section 2.1.2), with heads that are transformer
layers and with exact verification: head 1 chooses the next token at every node, and the
longest path of nodes that are its choices is committed, and one token more. If head 1
samples, it draws at each node of that path: a draw that is among the node's children
goes on there, any other ends the path. That is multi-round rejection (SpecInfer,
arXiv:2305.09781, algorithm 2) of proposals that are certain of one token each, so texts
have the distribution of `plain`'s.

The trunk and head 1 read the whole tree; their entries in the cache then move to where
the committed path has them. The other heads read that path only.

Axes: W nodes of the tree with the root, N nodes of its longest path with the root, M
drafting heads, K candidates of a head, P nodes of a path, B batch, D model width, V
vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.cache import NewTokens, at_slot, chain, keep_path
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes
from mtp_jax.decode.decoders.passes import PassOutput
from mtp_jax.decode.decoders.sampling import Sampler, most_likely
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    commit,
    last_token,
    target_probs,
)
from mtp_jax.decode.decoders.token_tree import TokenTree, default_tree, read_tree
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.parallel.sharding import spec


@dataclasses.dataclass(frozen=True)
class Tree:
    """Candidates of each head as a static tree; exact, greedy or sampled."""

    lossy: ClassVar[bool] = False

    tree: str = dataclasses.field(
        default="",
        metadata={"help": "file that calibrate wrote; if not given, a built-in tree"},
    )
    # The tree of the file, read once.
    given: TokenTree | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        given = read_tree(self.tree) if self.tree else None
        object.__setattr__(self, "given", given)

    def heads(self, n: int) -> int:
        """Head 1 and those of the n - 1 others that the tree has candidates of."""
        return self.used(n).depth + 1

    def width(self, n: int) -> int:
        """The number of nodes of the tree."""
        return len(self.used(n).paths)

    def used(self, heads: int, vocab: int | None = None) -> TokenTree:
        """The tree of a model with so many heads, and tokens to choose from."""
        tree = default_tree(heads - 1) if self.given is None else self.given
        return tree.cut(heads - 1, tree.ranks if vocab is None else vocab)

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits head 1's token at the prompt's end; the others give candidates."""
        return passes.begin(self, model, state, end)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the tree, commits its longest accepted path and one token more."""
        tree = self.used(depth, model.choices)
        out = read_nodes(model, state, tree)
        sampler = Sampler(state.keys, state.length_B)
        end_B, next_B1 = exact_path(state, tree, out, sampler)
        state = dataclasses.replace(state, keys=sampler.next_keys())
        whole = self.used(len(model.heads), model.choices)
        return commit_path(model, state, tree, out, end_B, next_B1, whole)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        drafting: Drafting,
        sampler: Sampler,
    ) -> jax.Array:
        """The tokens of the tree's nodes but the root, int32 [B, W - 1]."""
        del sampler
        tree = self.used(len(model.heads), model.choices)
        return node_tokens(drafting, tree, last_token(state))


def read_nodes(model: DecodeModel, state: DecodeState, tree: TokenTree) -> PassOutput:
    """Runs the trunk and head 1 over the nodes, whose tokens the carry has.

    Those of a deeper tree, of which this is the top, come after them there.
    """
    drafts_BW = state.carry[:, : len(tree.paths) - 1]
    start_B = state.length_B - 1
    new = NewTokens(
        tokens_BW=jnp.concatenate([last_token(state), drafts_BW], axis=1),
        positions_BW=start_B[:, None] + tree.depth_W[None],
        start_B=start_B,
        ancestors_WW=tree.ancestors_WW,
    )
    return passes.read_new(model, state, new)


def exact_path(
    state: DecodeState, tree: TokenTree, out: PassOutput, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
    """The node that ends the longest accepted path, [B], and the next token, [B, 1]."""
    if state.sampling.greedy:
        chosen_BW = most_likely(out.logits_BWV)
    node_B = jnp.zeros_like(state.length_B)
    ended_B = jnp.zeros_like(state.done_B)
    next_B = node_B
    for _ in range(tree.depth + 1):
        # Draws after the end of a path are for nothing: the shapes are static.
        if state.sampling.greedy:
            chosen_B = at_slot(chosen_BW, node_B)
        else:
            logits_B1V = at_slot(out.logits_BWV, node_B)[:, None]
            chosen_B = sampler.sample(target_probs(state, logits_B1V))[:, 0]
        next_B = jnp.where(ended_B, next_B, chosen_B)
        is_child_BW = tree.parent_W[None] == node_B[:, None]
        goes_on_BW = is_child_BW & (out.new.tokens_BW == chosen_B[:, None])
        goes_on_BW &= ~ended_B[:, None]
        ended_B = ~jnp.any(goes_on_BW, axis=1)
        # Siblings are different tokens, so there is one child at most.
        child_B = jnp.sum(jnp.where(goes_on_BW, np.arange(len(tree.paths))[None], 0), 1)
        node_B = jnp.where(ended_B, node_B, child_B)
    return node_B, next_B[:, None]


def commit_path(
    model: DecodeModel,
    state: DecodeState,
    tree: TokenTree,
    out: PassOutput,
    end_B: jax.Array,
    next_B1: jax.Array,
    whole: TokenTree,
    deviated_BW: jax.Array | None = None,
) -> DecodeState:
    """Commits the path to a node and the token after it; drafts at its end.

    Args:
      model: the model.
      state: before.
      tree: the tree.
      out: the output of the pass that read it.
      end_B: the node at the end of the path.
      next_B1: the token after it, the exact choice.
      whole: the tree of the next drafts, of which `tree` is the top.
      deviated_BW: which nodes are not the exact choice after their parents.
    """
    path_BP = _of_node(tree.path_WP, end_B)
    accepted_B = _of_node(tree.depth_W, end_B)

    def along(x_BWX):
        nodes = range(tree.depth + 1)
        return jnp.stack([at_slot(x_BWX, path_BP[:, p]) for p in nodes], axis=1)

    cache = keep_path(out.cache, layers_read(model), out.new.start_B, path_BP)
    tokens_BP = along(out.new.tokens_BW)
    in_path_BP = np.arange(tree.depth + 1)[None] < accepted_B[:, None]

    def shifted(x_BP):  # the root is committed already
        return jnp.concatenate([x_BP[:, 1:], jnp.zeros_like(x_BP[:, :1])], axis=1)

    if deviated_BW is not None:
        deviated_BW = shifted(along(deviated_BW)) & in_path_BP
    state = commit(
        state,
        jnp.where(in_path_BP, shifted(tokens_BP), next_B1),
        accepted_B + 1,
        accepted_B,
        deviated_BW,
    )
    new = chain(tokens_BP, out.new.start_B)
    anchor = Anchor(along(out.source_BWX), new, accepted_B, state.tokens_BE)
    drafting = Drafting(model, anchor, cache)
    carry_BW = node_tokens(drafting, whole, last_token(state))
    return dataclasses.replace(state, cache=drafting.cache, carry=carry_BW)


def layers_read(model: DecodeModel) -> int:
    """Layers of the cache that read a tree: those of the trunk and up to head 1."""
    return len(model.trunk) + model.cfg.heads.first_caches(model.cfg.n_future_tokens)


def node_tokens(drafting: Drafting, tree: TokenTree, last_B1: jax.Array) -> jax.Array:
    """The tokens of the nodes of a tree but the root, int32 [B, W - 1].

    The children of a node are the most likely tokens of their head. A head that waits
    for the token before its own is asked after each parent where that costs nothing,
    else after the first node of the level above.
    """
    tokens = [jax.sharding.reshard(last_B1, spec("batch", None))]  # by node
    logits_BMV = None if drafting.waits or tree.depth == 0 else drafting.all_logits()
    for depth in range(1, tree.depth + 1):
        nodes = np.flatnonzero(tree.depth_W == depth)
        parents = list(dict.fromkeys(tree.parent_W[nodes].tolist()))
        if logits_BMV is not None:
            parents, logits_BPV = [0], logits_BMV[:, depth - 1 : depth]
        else:
            if not drafting.by_parent:
                parents = [int(np.flatnonzero(tree.depth_W == depth - 1)[0])]
            previous_BP = jnp.concatenate([tokens[p] for p in parents], axis=1)
            logits_BPV = drafting.next_logits(depth, previous_BP)
        logits_BPV = jax.sharding.reshard(logits_BPV, spec("batch", None, None))
        ids_BPK = jax.lax.top_k(logits_BPV, tree.ranks)[1]
        for node in nodes:
            parent, rank = tree.parent_W[node], tree.rank_W[node]
            p = parents.index(parent) if drafting.by_parent else 0
            # Indexing a batch of one row may forget that it is split like any other.
            token_B1 = ids_BPK[:, p, rank : rank + 1]
            tokens.append(jax.sharding.reshard(token_B1, spec("batch", None)))
    if len(tokens) == 1:
        return tokens[0][:, :0]
    return jnp.concatenate(tokens[1:], axis=1)


def _of_node(table_WX: np.ndarray, node_B: jax.Array) -> jax.Array:
    """The row of a table for each sequence's node, [B, ...]."""
    rows_BWX = jnp.broadcast_to(table_WX[None], node_B.shape + table_WX.shape)
    return at_slot(rows_BWX, node_B)
