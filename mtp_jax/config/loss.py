"""The losses of the heads: weights over time, gradients, kinds of losses."""

import dataclasses
from typing import Any, Literal

from mtp_jax.config.checks import require, require_at_least
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.schedules import Entries, Table, table_of

LossKind = Literal["hard", "kl", "rkl", "tv", "nla", "lk", "e2e"]
Balance = Literal["none", "encodec", "occ", "pcgrad"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The losses of the heads, and what they do to the trunk (docs/objectives.md)."""

    head_weights: tuple[float, ...] = ()  # one a head; empty: head_decay decides
    head_decay: float = 1.0  # head i weighs head_decay^(i-1); 1 is the paper's sum
    z_loss: float = 0.0  # weight of logsumexp^2 (PaLM, arXiv:2204.02311, section 5)
    head_z_loss: tuple[float, ...] = ()  # one a head, instead of z_loss
    schedule: Entries = ()  # over steps, times the weights: a name, or (step, n) rows
    extra_targets: Entries = ()  # of one head: weights of the tokens after the next
    label_smoothing: float = 0.0  # share of a hard target that all tokens have
    kind: LossKind = "hard"  # of heads 2 to n; all but hard follow head 1's law
    soft_mix: float = 1.0  # share of that loss; the rest is of hard targets
    teacher: str = "self"  # whose head 1: self; ema, a mean over steps; or a workdir
    teacher_decay: float = 0.999  # of that mean, a step
    trunk_gradient: Entries = ()  # over steps, of each head, into what it reads
    unembedding_gradient: Literal["all", "first"] = "all"  # heads that train it
    balance: Balance = "none"  # of the heads' gradients into the trunk
    balance_decay: float = 0.99  # of its means over steps
    balance_budget: float = 1.0  # mean share of heads 2 to n; of occ
    balance_most: float = 4.0  # the largest share of a head; of occ
    gradient_meter: bool = False  # log the heads' gradients beside head 1's
    mask: Literal["none", "entropy"] = "none"  # which tokens heads 2 to n predict
    mask_threshold: float = 0.5  # rise of head 1's entropy that ends a group, nats
    acceptance: bool = False  # log sampled acceptance; evaluations always do

    def __post_init__(self):
        require(
            not self.head_weights or self.head_decay == 1.0,
            "config.loss.head_weights and config.loss.head_decay are both given; "
            "keep one.",
        )
        for name in ("head_weights", "head_z_loss"):
            least = min(getattr(self, name), default=0.0)
            require(
                least >= 0,
                f"config.loss.{name} has {least}; they must be 0 or more.",
            )
        require(
            self.head_decay > 0,
            f"config.loss.head_decay is {self.head_decay}; it must be above 0.",
        )
        require_at_least(
            "loss",
            0,
            z_loss=self.z_loss,
            balance_budget=self.balance_budget,
            balance_most=self.balance_most,
        )
        require(
            bool(self.teacher),
            "config.loss.teacher is empty; give self, ema or the workdir of a run.",
        )
        for name in ("soft_mix", "label_smoothing", "teacher_decay", "balance_decay"):
            value, ends = getattr(self, name), name != "soft_mix"
            require(
                0 <= value < 1 if ends else 0 <= value <= 1,
                f"config.loss.{name} is {value}; it must be at least 0 and "
                f"{'below' if ends else 'at most'} 1.",
            )

    @property
    def needs_teacher(self) -> bool:
        """True if training needs the law of head 1 beside that of another head."""
        return self.kind != "hard" or self.acceptance

    @property
    def other_teacher(self) -> str:
        """The workdir of the run that teaches; empty if none does."""
        named = self.needs_teacher and self.teacher not in ("self", "ema")
        return self.teacher if named else ""

    @property
    def averages_teacher(self) -> bool:
        """True if the state has a mean of the parameters over steps, which teaches."""
        return self.needs_teacher and self.teacher == "ema"

    @property
    def plain(self) -> bool:
        """True if a head's loss is cross entropy of one target and one z-loss."""
        return not (
            self.needs_teacher
            or self.label_smoothing
            or self.head_z_loss
            or self.extra_targets
            or self.mask != "none"
        )

    @property
    def measures_gradients(self) -> bool:
        """True if the heads' gradients into the trunk are compared."""
        return self.gradient_meter or self.balance != "none"

    @property
    def needs_fused(self) -> bool:
        """True if only the fused order of work can compute it."""
        return (
            not self.plain
            or self.measures_gradients
            or bool(self.trunk_gradient)
            or self.unembedding_gradient != "all"
        )

    def weights(self, n: int, steps: int) -> Table:
        """The factor of each head's weight over the steps."""
        return table_of("config.loss.schedule", self.schedule, n, steps)

    def waits(self, n: int, steps: int) -> tuple[bool, ...]:
        """For each head whether it has no weight at some step, and stands still."""
        return self._without_weight(n, self.weights(n, steps).ever_zero())

    def weightless(self, n: int, steps: int) -> tuple[bool, ...]:
        """For each head whether it has no weight at any step."""
        return self._without_weight(n, self.weights(n, steps).always_zero())

    def _without_weight(self, n: int, by_table: tuple[bool, ...]) -> tuple[bool, ...]:
        own = [weight == 0 for weight in self.head_weights] or [False] * n
        return tuple(a or b for a, b in zip(by_table, own, strict=True))

    def pulls(self, n: int, steps: int) -> Table:
        """The factor of each head's gradient into what it reads, over the steps."""
        return table_of("config.loss.trunk_gradient", self.trunk_gradient, n, steps)

    def extras(self, steps: int) -> Table:
        """The weights of extra targets over the steps, where there are any."""
        first = self.extra_targets[0]
        count = len(first) - 1 if isinstance(first, tuple) else len(self.extra_targets)
        name = "config.loss.extra_targets"
        return table_of(name, self.extra_targets, count, steps, "targets, as its first")

    def keep_heads(self, n: int) -> "LossConfig":
        """The loss of a model with the first n heads alone: what is one a head is cut.

        What n heads cannot have is dropped; it decides nothing that a model computes.
        """
        return dataclasses.replace(
            self,
            head_weights=self.head_weights[:n],
            head_z_loss=self.head_z_loss[:n],
            schedule=_cut(self.schedule, n),
            trunk_gradient=_cut(self.trunk_gradient, n),
            extra_targets=self.extra_targets if n == 1 else (),
            kind=self.kind if n > 1 else "hard",
            soft_mix=self.soft_mix if n > 1 else 1.0,
            teacher=self.teacher if n > 1 else "self",
            balance=self.balance if n > 1 else "none",
            mask=self.mask if n > 1 else "none",
            unembedding_gradient=self.unembedding_gradient if n > 1 else "all",
        )

    def without_lists(self, n: int) -> "LossConfig":
        """The loss of n heads, without what is listed one a head for other heads."""
        names = {"head_weights", "head_z_loss", "schedule", "trunk_gradient"}
        dropped: dict[str, Any] = {
            name: ()
            for name in names
            if getattr(self, name) and not isinstance(getattr(self, name)[0], str)
        }
        return dataclasses.replace(self, **dropped).keep_heads(n)

    def check(self, n: int, steps: int, heads: HeadsConfig, order: str) -> None:
        """Refuses what n heads of a kind, or an order of work, cannot be taught.

        Raises:
          UserError: naming the field.
        """
        for name in ("head_weights", "head_z_loss"):
            count = len(getattr(self, name))
            require(
                count in (0, n),
                f"config.loss.{name} has {count} values for {n} heads "
                "(config.model.n_future_tokens).",
            )
        self.weights(n, steps)
        pulls = self.pulls(n, steps)
        self._check_extras(n, steps)
        for name, usual in _OF_SEVERAL.items():
            require(
                n > 1 or getattr(self, name) == usual,
                f"config.loss.{name} is {getattr(self, name)}, which is of heads 2 to "
                "n, and config.model.n_future_tokens is 1.",
            )
        self._check_kind(heads)
        detached = ", ".join(
            str(i) for i, x in enumerate(pulls.always_zero(), 1) if x and i > 1
        )
        require(
            not detached or heads.wiring.reads != "after",
            f"config.loss.trunk_gradient detaches head {detached},"
            f" and head 1 of {heads.kind} heads reads the trunk through it; nothing "
            "would train the trunk.",
        )
        require(
            self.mask == "none" or self.kind != "e2e",
            "config.loss.kind is e2e, which is of all heads of a token together, and "
            "config.loss.mask takes some of them; keep one of them.",
        )
        if self.balance != "none":
            require(
                not detached,
                f"config.loss.balance is {self.balance}, and config.loss.trunk_gradient"
                f" detaches head {detached}; there is nothing to balance.",
            )
        require(
            order == "fused" or not self.needs_fused,
            f"config.compute.head_loss is {order}, and only fused computes what "
            "config.loss asks for beside hard targets; set it to fused.",
        )

    def _check_extras(self, n: int, steps: int) -> None:
        require(
            not self.extra_targets or not isinstance(self.extra_targets[0], str),
            "config.loss.extra_targets has no names; give weights or (step, ...) rows.",
        )
        if self.extra_targets:
            self.extras(steps)
        require(
            n == 1 or not self.extra_targets,
            f"config.loss.extra_targets are of one head, and there are {n} "
            "(config.model.n_future_tokens).",
        )

    def _check_kind(self, heads: HeadsConfig) -> None:
        reads = heads.wiring.reads
        for name, usual in {
            "kind": "hard",
            "mask": "none",
            "acceptance": False,
        }.items():
            require(
                reads != "after" or getattr(self, name) == usual,
                f"config.loss.{name} is {getattr(self, name)}, and {heads.kind} heads "
                "make head 1 last, so it cannot be compared with the others.",
            )
        require(
            reads == "trunk" or not self.measures_gradients,
            f"config.loss.balance and gradient_meter compare what heads give the trunk,"
            f" and {heads.kind} heads read each other.",
        )
        require(
            heads.unembedding == "shared" or self.unembedding_gradient == "all",
            "config.loss.unembedding_gradient is first, and every head has an "
            "unembedding of its own (config.heads.unembedding).",
        )


# What only heads 2 to n can have, and its value where there are none.
_OF_SEVERAL = {
    "kind": "hard",
    "balance": "none",
    "mask": "none",
    "unembedding_gradient": "all",
}


def _cut(entries: Entries, n: int) -> Entries:
    """The entries of the first n heads."""
    if not entries or isinstance(entries[0], str):
        return entries
    if isinstance(entries[0], tuple):
        return tuple(row[: n + 1] for row in entries if isinstance(row, tuple))
    return entries[:n]
