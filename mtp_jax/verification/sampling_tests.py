"""Tests that texts sampled with drafts have head 1's distribution, and wrong decoders.

Axes: M drafts, N = M + 1 tokens to commit, B batch, V vocabulary.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaincc

from mtp_jax.decode.cache import at_slot
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.speculative import Speculative, accept
from mtp_jax.verification.exact_distribution import Distribution

_LEAST_EXPECTED = 5.0  # of a cell; rarer texts share one (Cochran's rule)


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """The result of Pearson's chi-square test."""

    statistic: float
    freedom: int
    p_value: float


def chi_square(texts: Iterable[Sequence[int]], distribution: Distribution) -> ChiSquare:
    """Tests that texts were drawn independently from a distribution.

    A text that the distribution does not have gives a p-value of 0.
    """
    counts = Counter(map(tuple, texts))
    total = counts.total()
    if not counts.keys() <= distribution.keys():
        return ChiSquare(float("inf"), 0, 0.0)
    cells = [(counts[text], p * total) for text, p in distribution.items()]
    rare = [cell for cell in cells if cell[1] < _LEAST_EXPECTED]
    cells = [cell for cell in cells if cell[1] >= _LEAST_EXPECTED]
    if rare:
        seen, expected = map(sum, zip(*rare, strict=True))
        if expected >= _LEAST_EXPECTED or not cells:
            cells.append((seen, expected))
        else:  # too few even together: to the rarest of the others
            least = min(range(len(cells)), key=lambda i: cells[i][1])
            cells[least] = (cells[least][0] + seen, cells[least][1] + expected)
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return ChiSquare(statistic, 0, 1.0)
    return ChiSquare(statistic, freedom, float(gammaincc(freedom / 2, statistic / 2)))


@dataclasses.dataclass(frozen=True)
class Trusting(Blockwise):
    """Wrong on purpose: every draft is accepted, so head 1 goes on from wrong ones."""

    def count_accepted(self, drafts_BM: jax.Array, chosen_BN: jax.Array) -> jax.Array:
        """All M drafts, int32 [B]."""
        del chosen_BN
        return jnp.full_like(drafts_BM[:, 0], drafts_BM.shape[1])


@dataclasses.dataclass(frozen=True)
class WithoutRest(Speculative):
    """Wrong on purpose: after a rejection it draws from p, not from the residual.

    This is the usual mistake; texts look as good as the right ones.
    """

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """Accepts by the rule of the paper, but draws from p after a rejection."""
        chosen_BN, accepted_B = accept(p_BNV, q_BMV, drafts_BM, sampler)
        last_B1 = sampler.sample(at_slot(p_BNV, accepted_B)[:, None])
        order_1N = jnp.arange(chosen_BN.shape[1])[None]
        return jnp.where(
            order_1N == accepted_B[:, None], last_B1, chosen_BN
        ), accepted_B
