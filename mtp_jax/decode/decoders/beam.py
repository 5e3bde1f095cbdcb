"""Beam search whose continuations the heads propose and head 1 verifies.

K beams a prompt are rows of the batch. A forward pass reads a tree of drafts after each
of them; then the beams advance, by head 1's scores alone, as long as the token that
extends each of the K best was among the drafts after its parent. The result is that of
ordinary beam search, in fewer forward passes.

Scores and ends are those of Hugging Face's generate: a hypothesis has the sum of its
log probabilities over its length to the power `length_penalty`; of the 2 K best
continuations the first K may end, and the K best others go on; a prompt is done with K
hypotheses when the best beam, at its length, is no better than the worst of them.

With look-ahead the choice among continuations counts, times `lookahead`, what the other
heads predict after their common part: the log probability of the most likely token of
each. It is no part of the score. All heads then read the tree.

Axes: R rows, K beams of a prompt, B prompts, W nodes of the tree, M drafting heads, C
continuations of a node, I candidates of a head, E tokens of a text, F what is kept of
each token, P nodes of a path, V vocabulary.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.decode.cache import Cache, chain, keep_path
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.beam_search import KEPT, Search, advance_beams
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    last_token,
    next_logits,
    option,
)
from mtp_jax.decode.decoders.token_tree import TokenTree, default_tree
from mtp_jax.decode.decoders.tree import layers_read, node_tokens, read_nodes
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.decode.head_passes import at_all
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """The search so far; values of a prompt are the same in all its rows."""

    drafts_RW: jax.Array  # tokens of the nodes of the tree but the root
    start_R: jax.Array  # length of the prompt
    score_R: jax.Array  # sums of log probabilities; -inf: no beam
    ended_score_R: jax.Array  # of hypotheses, best first; -inf: none
    ended_length_R: jax.Array
    ended_RFE: jax.Array


_MOST_BEAMS = 1024  # each is a row of the batch, with caches of its own


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search; not the text of plain, but of ordinary beam search."""

    beams: int = option(4, "beams of a prompt")
    length_penalty: float = option(1.0, "power of the length that scores are over")
    lookahead: float = option(0.0, "weight of the other heads in the choice")

    lossy: ClassVar[bool] = True
    draws_nothing: ClassVar[bool] = True  # so it is for temperature 0 alone

    def __post_init__(self):
        if not 1 <= self.beams <= _MOST_BEAMS:
            raise UserError(f"beams is {self.beams}; it must be 1 to {_MOST_BEAMS}.")
        for name in ("length_penalty", "lookahead"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; give a number.")

    @property
    def at_once(self) -> bool:
        """True if the choice asks all heads at once."""
        return self.lookahead != 0

    @property
    def rows(self) -> int:
        """Rows of the batch that a prompt takes."""
        return self.beams

    def heads(self, n: int) -> int:
        """All n heads: head 1 verifies, and the others draft."""
        return n

    def width(self, n: int) -> int:
        """The number of nodes of the tree."""
        return len(default_tree(n - 1).paths)

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits the first token of each beam, by the heads at the prompt's end."""
        if not state.sampling.greedy:
            raise UserError("beam search draws nothing; leave temperature at 0.")
        start_R = state.length_B
        none_R = jnp.where(start_R < 0, 0.0, -jnp.inf)
        is_first_R = jnp.arange(start_R.shape[0]) % self.beams == 0
        tree = _tree(len(model.heads), model.choices)
        carry = _Carry(
            drafts_RW=jnp.zeros_like(
                start_R[:, None] + np.arange(1, len(tree.paths))[None]
            ),
            start_R=start_R,
            score_R=jnp.where(is_first_R, 0.0, none_R),
            ended_score_R=none_R,
            ended_length_R=start_R,
            ended_RFE=jnp.zeros_like(_texts(state)),
        )
        state = dataclasses.replace(state, carry=carry)
        logits_R1V = next_logits(model, state, end.hidden_B1D)
        others: list[jax.Array] = []
        if self.lookahead:
            hidden_RMD = end.drafting(model, state).all_hidden()
            others = [hidden_RMD[:, i : i + 1] for i in range(hidden_RMD.shape[1])]
        bonus_R1 = self._lookahead(model, others, start_R[:, None])
        root_R1 = start_R[:, None]  # any token will do: the root has no children
        top = self._continuations(model, logits_R1V)
        after = self._advance(state, top, bonus_R1, default_tree(0), root_R1)[0]
        return self._drafted(after, end.drafting(model, after), tree)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the trees, and advances the beams as far as they reach."""
        tree = _tree(depth, model.choices)
        held = dataclasses.replace(state, carry=state.carry.drafts_RW)
        out = read_nodes(model, held, tree)
        others: list[jax.Array] = []
        cache = out.cache
        if self.lookahead:
            others, cache = at_all(model, out.source_BWX, out.new, cache)
        tokens_RW = out.new.tokens_BW
        bonus_RW = self._lookahead(model, others, tokens_RW)
        state = dataclasses.replace(state, cache=cache)
        top = self._continuations(model, out.logits_BWV)
        after, row_R, last_R = self._advance(state, top, bonus_RW, tree, tokens_RW)

        def follow(row_K, last_K, source_KWX, tokens_KW):
            path_KP = jnp.asarray(tree.path_WP)[last_K]
            source_KPX = source_KWX[row_K[:, None], path_KP]
            tokens_KP = tokens_KW[row_K[:, None], path_KP]
            return path_KP, jnp.asarray(tree.depth_W)[last_K], source_KPX, tokens_KP

        path_RP, accepted_R, source_RPX, tokens_RP = self._by_prompt(
            follow, row_R, last_R, out.source_BWX, tokens_RW
        )
        start_R = out.new.start_B
        cache = keep_path(after.cache, layers_read(model), start_R, path_RP)
        path = chain(tokens_RP, start_R)
        anchor = Anchor(source_RPX, path, accepted_R, after.tokens_BE)
        whole = _tree(len(model.heads), model.choices)
        return self._drafted(after, Drafting(model, anchor, cache), whole)

    def finish(self, model: DecodeModel, state: DecodeState) -> DecodeState:
        """Reports the best hypothesis of each prompt; the best beam, if none ended."""
        del model
        carry = state.carry

        def best(score_K, ended_KFE, length_K, text_KFE, running_K, done_K):
            ended = score_K[0] > -jnp.inf
            text_FE = jnp.where(ended, ended_KFE[0], text_KFE[0])
            length = jnp.where(ended, length_K[0], running_K[0])
            return text_FE[None], length[None], done_K[:1]

        text_BFE, length_B, done_B = self._by_prompt(
            best,
            carry.ended_score_R,
            carry.ended_RFE,
            carry.ended_length_R,
            _texts(state),
            state.length_B,
            state.done_B,
        )
        kept = {name: text_BFE[:, f] for f, name in enumerate(KEPT)}
        return dataclasses.replace(state, **kept, length_B=length_B, done_B=done_B)

    def _drafted(
        self, state: DecodeState, drafting: Drafting, tree: TokenTree
    ) -> DecodeState:
        """The state with the tokens of the next pass's trees."""
        drafts_RW = node_tokens(drafting, tree, last_token(state))
        carry = dataclasses.replace(state.carry, drafts_RW=drafts_RW)
        return dataclasses.replace(state, cache=drafting.cache, carry=carry)

    def _lookahead(
        self, model: DecodeModel, others: list[jax.Array], like_RW: jax.Array
    ) -> jax.Array:
        """The look-ahead bonus of each token's continuations, float32 [R, W]."""
        bonus_RW = jnp.zeros_like(like_RW, jnp.float32)
        if not self.lookahead:
            return bonus_RW
        for i, head_RWD in enumerate(others, start=1):
            logits_RWV = model.logits(head_RWD, i)
            log_p_RWV = jax.nn.log_softmax(logits_RWV, axis=-1)
            bonus_RW += self.lookahead * jnp.max(log_p_RWV, axis=-1)
        return bonus_RW

    def _continuations(
        self, model: DecodeModel, logits_RWV: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log probabilities of the best continuations and their tokens, [R, W, C]."""
        whole = spec("batch", None, None)
        log_p_RWV = jax.nn.log_softmax(jax.sharding.reshard(logits_RWV, whole), axis=-1)
        # More of one beam than of all of them are never among the best of all.
        top_RWC, ids_RWC = lax.top_k(log_p_RWV, min(2 * self.beams, model.choices))
        return top_RWC, ids_RWC

    def _advance(
        self,
        state: DecodeState,
        top: tuple[jax.Array, jax.Array],
        bonus_RW: jax.Array,
        tree: TokenTree,
        tokens_RW: jax.Array,
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        """Advances the beams as far as their tokens are in the trees.

        Returns the state, its cache in the order of the new beams, and for each of them
        the row and the node that its last token comes after.
        """
        carry = state.carry
        forward_R = jnp.zeros_like(state.length_B) + (state.forward + 1)

        def one(carry, text_KFE, length_K, limit_K, done_K, forward_K, nodes):
            zero_K = jnp.zeros_like(length_K)
            search = Search(
                score_K=carry.score_R,
                text_KFE=text_KFE,
                row_K=zero_K + jnp.arange(self.beams),
                node_K=zero_K,
                last_K=zero_K,
                ended_score_K=carry.ended_score_R,
                ended_length_K=carry.ended_length_R,
                ended_KFE=carry.ended_RFE,
                length=length_K[0],
                done=done_K[0],
                active=~done_K[0],
            )
            bounds = (carry.start_R[0], limit_K[0], state.end_ids)
            penalty = self.length_penalty
            search = advance_beams(search, tree, penalty, nodes, bounds, forward_K[0])
            ended = search.ended_score_K, search.ended_length_K, search.ended_KFE
            of_prompt = zero_K + search.length, (zero_K + search.done) > 0
            beams = search.score_K, search.text_KFE, search.row_K, search.last_K
            return *beams, *ended, *of_prompt

        score, text, row, last, ended_score, ended_length, ended, length, done = (
            self._by_prompt(
                one,
                dataclasses.replace(carry, drafts_RW=jnp.zeros_like(forward_R)),
                _texts(state),
                state.length_B,
                state.limit_B,
                state.done_B,
                forward_R,
                (*top, bonus_RW, tokens_RW),
            )
        )
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = self._by_prompt(_with_tokens, seen_BV, row, text, length)
        carry = dataclasses.replace(
            carry,
            score_R=score,
            ended_score_R=ended_score,
            ended_length_R=ended_length,
            ended_RFE=ended,
        )
        state = dataclasses.replace(
            state,
            **{name: text[:, f] for f, name in enumerate(KEPT)},
            length_B=length,
            done_B=done,
            forward=state.forward + 1,
            seen_BV=seen_BV,
            cache=self._reordered(state.cache, row),
            carry=carry,
        )
        return state, row, last

    def _by_prompt(self, f, *args):
        """Applies f to each prompt, whose rows of each array it gets as [K, ...]."""
        return self._local(f, spec("batch"), args)

    def _reordered(self, cache: Cache, row_R: jax.Array) -> Cache:
        """The cache with the rows of each prompt in another order."""

        def take(x_KXSX, row_K):
            return x_KXSX[row_K]

        def move(x_RXSX):
            store = jax.typeof(x_RXSX).sharding.spec
            return self._local(take, (store, spec("batch")), (x_RXSX, row_R), store)

        return jax.tree.map(move, cache)

    def _local(self, f, in_specs, args, out_specs=None):
        """Applies f on each device, to arrays grouped by prompt."""

        def local(*args):
            def grouped(x):
                return x.reshape(-1, self.beams, *x.shape[1:])

            results = jax.vmap(f)(*jax.tree.map(grouped, args))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

        out_specs = spec("batch") if out_specs is None else out_specs
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(*args)


def _tree(heads: int, vocab: int) -> TokenTree:
    """The built-in tree of so many heads, with ranks below the vocabulary's size."""
    tree = default_tree(heads - 1)
    return tree.cut(heads - 1, min(tree.ranks, vocab))


def _texts(state: DecodeState) -> jax.Array:
    """The arrays of KEPT, [R, F, E]."""
    texts = jnp.stack([getattr(state, name) for name in KEPT], axis=1)
    return jax.sharding.reshard(texts, spec("batch", None, None))


def _with_tokens(seen_KV, row_K, text_KFE, length_K):
    """Marks the tokens that each beam has, given those of the beam before it."""
    tokens_KE = text_KFE[:, KEPT.index("tokens_BE")]
    inside_KE = jnp.arange(tokens_KE.shape[1])[None] < length_K[:, None]
    rows_K1 = jnp.arange(row_K.size)[:, None]
    return seen_KV[row_K].at[rows_K1, tokens_KE].max(inside_KE)
