"""The prediction heads of a model: their kind, its options, and what excludes what."""

import dataclasses
from typing import Literal

from mtp_jax.errors import UserError

Kind = Literal["parallel", "linear", "residual", "causal", "anticausal", "serial"]
Owner = Literal["shared", "own"]
DraftCache = Literal["per_depth", "shared"]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Who reads whom among the heads of a kind, and which of them have bodies."""

    # The trunk; the head before, the trunk for the first; the head after, likewise.
    reads: Literal["trunk", "before", "after"]
    first: bool  # head 1 has a body; else it is the norm of the trunk's output
    layered: bool  # bodies are transformer layers, which `num_layers` counts
    reads_tokens: bool = False  # the embedding of the token before the predicted one


_WIRING: dict[Kind, Wiring] = {
    "parallel": Wiring("trunk", first=True, layered=True),
    "linear": Wiring("trunk", first=False, layered=False),
    "residual": Wiring("trunk", first=False, layered=False),
    "causal": Wiring("before", first=True, layered=True),
    "anticausal": Wiring("after", first=True, layered=True),
    "serial": Wiring("before", first=False, layered=True, reads_tokens=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The kind of the prediction heads, and options that combine (docs/heads.md)."""

    kind: Kind = "parallel"  # who reads whom
    layers: int = 1  # of each head, one after another; of residual heads, blocks
    shared: bool = False  # one set of weights for all heads; of heads in a chain
    unembedding: Owner = "shared"  # or one a head
    norm: Owner = "shared"  # scale of the last norm; or one a head
    markov_rank: int = 0  # of a bias by the token before the predicted one; 0: none
    hidden: Literal["before", "after"] = "before"  # the last norm; of serial heads
    # A serial head joins its stream and an embedding, one after the other.
    concat: Literal["hidden_first", "embedding_first"] = (
        "hidden_first"  # of serial ones
    )
    # In decoding serial heads of shared weights can have one cache, not one each.
    draft_cache: DraftCache = "per_depth"  # of serial heads

    def __post_init__(self):
        wiring, kind = self.wiring, self.kind
        _require(
            self.layers >= 1,
            f"config.heads.layers is {self.layers}; it must be at least 1.",
        )
        _require(
            self.markov_rank >= 0,
            f"config.heads.markov_rank is {self.markov_rank}; it must be at least 0.",
        )
        _require(
            self.layers == 1 or kind != "linear",
            f"config.heads.layers is {self.layers}, and a linear head is one matrix; "
            f"heads of the other kinds ({_others('linear')}) can have more.",
        )
        _require(
            not self.shared or wiring.reads != "trunk",
            f"config.heads.shared would make all {kind} heads say the same, since each "
            "reads the trunk alone; causal, anticausal and serial heads can share.",
        )
        for name, usual in (
            ("hidden", "before"),
            ("concat", "hidden_first"),
            ("draft_cache", "per_depth"),
        ):
            _require(
                wiring.reads_tokens or getattr(self, name) == usual,
                f"config.heads.{name} is {getattr(self, name)}, and only serial heads "
                f"have it; leave it at {usual}, or set config.heads.kind=serial.",
            )
        _require(
            self.draft_cache == "per_depth" or self.shared,
            "config.heads.draft_cache is shared, which is the cache of one module; set "
            "config.heads.shared=True too, or leave it at per_depth.",
        )

    @property
    def wiring(self) -> Wiring:
        """Who reads whom among heads of this kind."""
        return _WIRING[self.kind]

    def bodies(self, n: int) -> int:
        """The number of sets of weights of n heads, besides norms and tables."""
        bodies = n if self.wiring.first else n - 1
        return min(bodies, 1) if self.shared else bodies

    def counted_layers(self, n: int) -> int:
        """The transformer layers of n heads that `config.model.num_layers` counts."""
        return self.bodies(n) * self.layers if self.wiring.layered else 0

    def runs(self, n: int) -> int:
        """The number of bodies that a forward pass of all n heads runs."""
        return n if self.wiring.first else n - 1

    def wait_for_tokens(self, n: int) -> bool:
        """True if some of n heads read the token before the one that they predict.

        In decoding they wait for it, so that heads draft one after another.
        """
        return n > 1 and (self.wiring.reads_tokens or self.markov_rank > 0)

    def caches(self, n: int, used: int) -> int:
        """The attention caches of `used` of n heads."""
        if not self.wiring.layered:
            return 0
        if self.wiring.reads == "after":
            return n * self.layers  # all of them are on the way to head 1
        runs = self.runs(used)
        return self.layers * (min(runs, 1) if self.draft_cache == "shared" else runs)

    def first_caches(self, n: int) -> int:
        """The attention caches that are on the way to head 1, the first of `caches`."""
        return self.caches(n, 1)

    def lookback(self, used: int) -> int:
        """Slots before its new tokens that a drafting pass of `used` heads reads again.

        Head i + 1 of a serial chain is done with a slot when i tokens after it are.
        """
        again = self.wiring.reads_tokens and self.draft_cache == "per_depth"
        return max(used - 2, 0) if again else 0

    def least_kept(self, n: int) -> int:
        """The fewest heads that a model with n of them can be cut down to."""
        return n if self.wiring.reads == "after" else 1


def _others(kind: Kind) -> str:
    return ", ".join(name for name in _WIRING if name != kind)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
