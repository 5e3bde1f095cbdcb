"""DynaMo's corrected joint distribution as a proposal of speculative sampling. Exact.

Heads 2..n do not know what the tokens before theirs turn out to be. Counts of a corpus
do: draft i is drawn from q(d | the tokens before), in proportion to its head's
probability times (phat(d | the two tokens before) / phat(d))^alpha. Head 1 accepts or
rejects it as in `speculative`, whose proof holds for any proposals.

Axes: M drafts, B batch, D model width, V vocabulary, K candidates.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.decode.cache import at_slot
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes, speculative
from mtp_jax.decode.decoders.ngram_ratios import (
    Tables,
    check_correction,
    log_next_ratio,
    read_tables,
)
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.speculative import Drafts, choose_from
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    head_probs,
    last_token,
    option,
)
from mtp_jax.decode.drafting import Drafting, make_drafts
from mtp_jax.parallel.sharding import spec


@dataclasses.dataclass(frozen=True)
class DynamoExact:
    """Drafts are drawn from the heads' corrected joint; exact, greedy or sampled."""

    counts: str = option("", "file of the verb count")
    alpha: float = option(1.0, "power of the co-occurrence correction; 0: none")
    candidates: int = option(50, "most tokens of a head that are considered")

    lossy: ClassVar[bool] = False

    def __post_init__(self):
        check_correction(self.counts, self.alpha, self.candidates)

    def heads(self, n: int) -> int:
        """All n heads: head 1 verifies, and the others draft."""
        return n

    def width(self, n: int) -> int:
        """n tokens: the last committed one and n - 1 drafts."""
        return n

    def tables(self, fingerprint: str, vocab_size: int) -> Tables | None:
        """Reads the file of counts; None without correction."""
        return read_tables(self.counts, self.alpha, fingerprint, vocab_size)

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits head 1's token at the prompt's end, and drafts with the others."""
        return passes.begin(self, model, state, end)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Verifies drafts, commits the accepted ones and one more, and drafts again."""
        return speculative.step(self, model, state, depth)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        drafting: Drafting,
        sampler: Sampler,
    ) -> Drafts:
        """Draws a token of each drafting head, given those before it."""
        before = [at_slot(state.tokens_BE, state.length_B - i) for i in (2, 1)]

        def draw(logits_BMV, head):
            del head
            probs_BMV = head_probs(state, logits_BMV)
            distributions = []
            for i in range(probs_BMV.shape[1]):
                q_BV = self._corrected(model, before[-2], before[-1], probs_BMV[:, i])
                if state.sampling.greedy:
                    q_BV = jax.nn.one_hot(jnp.argmax(q_BV, axis=-1), q_BV.shape[-1])
                before.append(choose_from(q_BV[:, None], state, sampler)[:, 0])
                distributions.append(q_BV)
            if not distributions:
                return state.tokens_BE[:, :0], probs_BMV
            made = before[-len(distributions) :]
            return jnp.stack(made, 1), jnp.stack(distributions, axis=1)

        return Drafts(*make_drafts(drafting, last_token(state), draw))

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """Accepts or rejects drafts by the rule of `speculative.accept`."""
        return speculative.accept(p_BNV, q_BMV, drafts_BM, sampler)

    def _corrected(self, model, before_B, last_B, probs_BV):
        """The distribution of a draft after two tokens, float32 [B, V]."""
        k = min(self.candidates, model.choices)

        def one(tables, before, last, probs_V):
            probs_K, ids_K = lax.top_k(probs_V, k)
            log_q_K = jnp.log(probs_K)
            if tables is not None:
                log_q_K += self.alpha * log_next_ratio(tables, before, last, ids_K)
            return jnp.zeros_like(probs_V).at[ids_K].set(jax.nn.softmax(log_q_K))

        each, row = spec("batch"), spec("batch", None)
        rows = jax.shard_map(
            jax.vmap(one, in_axes=(None, 0, 0, 0)),
            in_specs=(jax.P(), each, each, row),
            out_specs=row,
        )
        before_B, last_B = (jax.sharding.reshard(x, each) for x in (before_B, last_B))
        probs_BV = jax.sharding.reshard(probs_BV, row)
        return rows(model.tables, before_B, last_B, probs_BV)
