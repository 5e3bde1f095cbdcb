"""The heads' losses and gradients at once, so that nothing of a head stays but these.

Two orders, by what heads read. In a star every head reads the trunk: one scan runs a
head forward and backward (arXiv:2404.19737, section 2, figure 2). In a chain a head's
gradient takes that of the heads that read it, so there are two scans: forward, each
head scores its tokens, and the gradient of its own loss stays, [B, T, D] beside what
the head read; then backward, from the end of the chain, each body runs again. In both,
the logits of one chunk of one head are the only tokens x vocabulary.

Gradients of what all heads have in common add up in float32 in the scans; those of a
head's own are stacked.

Axes: N heads, B rows, T positions, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import ComputeConfig, LossConfig, ModelConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.memory import Memory, Teacher, start_of_memory
from mtp_jax.loss.output import Output, make_output
from mtp_jax.loss.targets import Targets
from mtp_jax.model.heads.walk import (
    HeadInput,
    HeadRunner,
    Parts,
    Weights,
    in_turn,
    needs_tokens,
    previous_tokens,
)
from mtp_jax.model.kernels import KEPT

_TABLES = ("unembedding", "markov_in", "markov_out")


@dataclasses.dataclass(frozen=True)
class _Step:
    """One head, forward and backward."""

    runner: HeadRunner
    output: Output
    common: Weights

    @property
    def loss(self) -> LossConfig:
        return self.output.loss

    def bare(self) -> "_Step":
        """This step for a head 1 without a body."""
        common = dataclasses.replace(self.common, body=None)
        return dataclasses.replace(self, common=common)

    def zeros(self) -> Weights:
        """The gradients of what is common to all heads, to begin with."""
        return jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), self.common)

    def run(self, own: Weights, common: Weights, head: HeadInput, x_BTD: jax.Array):
        """The stream of a head, as `jax.vjp` wants it."""
        return self.runner.stream(own | common, x_BTD, head.previous_BT)

    def score(self, head: HeadInput, hidden_BTD: jax.Array, memory: Memory):
        """Scores, the gradient of the hidden states, those of own and common, memory.

        The memory is of the heads before, and then of this one too.
        """
        weights = head.own | self.common
        memory = memory.heard(self.loss, head, hidden_BTD)
        scores, d_hidden_BTD, d_tables = self.output.scores_and_grad(
            weights, head, hidden_BTD, memory.teacher_BTD, memory.keep(head)
        )
        memory = memory.measured(self.loss, head, scores, self.runner.rows)
        return scores, d_hidden_BTD, *self._sorted(head, d_tables), memory

    def _sorted(self, head: HeadInput, grads: Weights) -> tuple[Weights, Weights]:
        """Gradients of a head's weights: what is its own, and what is common."""
        own: dict[str, jax.Array] = {}
        common: dict[str, jax.Array] = {}
        for field in _TABLES:
            grad = getattr(grads, field)
            if grad is not None:
                is_own = getattr(head.own, field) is not None
                (own if is_own else common)[field] = grad
        return Weights(**own), Weights(**common)


def forward_and_backward(
    cfg: ModelConfig,
    parts: Parts,
    rows: Any,
    targets: Targets,
    teacher: Teacher,
    loss: LossConfig,
    compute: ComputeConfig,
) -> tuple[TokenScores, Parts]:
    """Scores of all heads, [N, B, T], and the gradients of their weighted loss.

    The gradients are in the dtypes of `parts`.
    """
    dtype = parts.trunk_BTD.dtype.name
    previous_NBT = previous_tokens(targets.token_NBT) if needs_tokens(cfg) else None
    first, rest = in_turn(cfg, parts, previous_NBT, targets)
    output = make_output(
        parts.own, parts.common, dtype, loss, compute, teacher.unembedding_VD
    )
    step = _Step(HeadRunner(cfg, rows, compute.attention), output, parts.common)
    loop = _star if cfg.heads.wiring.reads == "trunk" else _chain
    memory = start_of_memory(loss, parts.trunk_BTD, teacher)
    scores, grads = loop(step, parts, first, rest, memory)
    return scores, jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, parts)


def _kept(run):
    """A head whose products are kept until its backward pass, a moment later.

    What is cheap, norms and activation functions, is computed again: it would take as
    much room.
    """
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names(KEPT)
    )
    return jax.checkpoint(run, policy=keep)


def _star(
    step: _Step, parts: Parts, first, rest, memory: Memory
) -> tuple[TokenScores, Parts]:
    def one_head(step, total, head):
        d_common, d_trunk_BTD, memory = total

        def run(own, common, x_BTD):
            stream_BTD = step.run(own, common, head, x_BTD)
            return step.runner.hidden(own | common, stream_BTD)

        hidden_BTD, backward = jax.vjp(
            _kept(run), _bodies(head.own), _bodies(step.common), parts.trunk_BTD
        )
        scores, d_hidden_BTD, own_tables, tables, memory = step.score(
            head, hidden_BTD, memory
        )
        # The head's backward pass waits until the unembedding's whole gradient is gone
        # from the device: they need not be there together.
        d_hidden_BTD, own_tables, tables = lax.optimization_barrier(
            (d_hidden_BTD, own_tables, tables)
        )
        d_own, d_both, d_x_BTD = backward(d_hidden_BTD)
        scores, d_x_BTD, memory = memory.pulled(step.loss, head, scores, d_x_BTD)
        d_common = _sum(_sum(d_common, d_both), tables)
        d_own = _narrow(_sum(d_own, own_tables), head.own)
        return (d_common, d_trunk_BTD + d_x_BTD, memory), (scores, d_own)

    total = step.zeros(), jnp.zeros_like(parts.trunk_BTD, jnp.float32), memory
    of_first = None
    if first is not None:
        total, of_first = one_head(step.bare(), total, first)
    found = None
    if rest is not None:
        visit = _unless_idle(functools.partial(one_head, step))
        total, found = lax.scan(visit, total, rest)
    scores, d_own = _stacked(of_first, found)
    return scores, Parts(total[1], d_own, total[0])


def _unless_idle(one_head: Callable) -> Callable:
    """Wraps the step for heads of which some may have no work.

    Such a head has zeros for scores and gradients.
    """

    def visit(total, head):
        if head.extra.active_N is None:
            return one_head(total, head)
        made = jax.eval_shape(one_head, total, head)[1]

        def idle(total, head):
            d_common, d_trunk_BTD, memory = total
            found = jax.tree.map(_zeros, made)
            return (d_common, d_trunk_BTD, memory.passed()), found

        return lax.cond(head.extra.active_N, one_head, idle, total, head)

    return visit


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    spec = None if x.sharding is None else x.sharding.spec
    return jnp.zeros(x.shape, x.dtype, out_sharding=spec)


def _chain(
    step: _Step, parts: Parts, first, rest, memory: Memory
) -> tuple[TokenScores, Parts]:
    backwards = step.runner.cfg.heads.wiring.reads == "after"

    def forth(step, carry, head):
        d_common, x_BTD, memory = carry
        stream_BTD = step.run(head.own, step.common, head, x_BTD)

        def finish(own, common, stream_BTD):
            return step.runner.hidden(own | common, stream_BTD)

        hidden_BTD, backward = jax.vjp(
            finish, _norms(head.own), _norms(step.common), stream_BTD
        )
        scores, d_hidden_BTD, own_tables, tables, memory = step.score(
            head, hidden_BTD, memory
        )
        # As in a star; and without it the compiler for TPUs fails on the sums.
        d_hidden_BTD, own_tables, tables = lax.optimization_barrier(
            (d_hidden_BTD, own_tables, tables)
        )
        d_own, d_both, d_stream_BTD = backward(d_hidden_BTD)
        d_common = _sum(_sum(d_common, d_both), tables)
        kept = (x_BTD, d_stream_BTD, _narrow(_sum(d_own, own_tables), head.own))
        return (d_common, stream_BTD, memory), (scores, kept)

    def back(step, carry, head_and_kept):
        d_common, d_next_BTD = carry
        head, (x_BTD, d_stream_BTD, d_own) = head_and_kept

        def run(own, common, x_BTD):
            return step.run(own, common, head, x_BTD)

        _, backward = jax.vjp(
            _kept(run), _bodies(head.own), _bodies(step.common), x_BTD
        )
        d_body, d_both, d_x_BTD = backward(d_stream_BTD + d_next_BTD)
        if head.extra.pull_N is not None:
            d_x_BTD = d_x_BTD * head.extra.pull_N.astype(d_x_BTD.dtype)
        return (_sum(d_common, d_both), d_x_BTD), _sum(d_own, d_body)

    carry = step.zeros(), parts.trunk_BTD, memory
    of_first = found = None
    if first is not None:
        carry, of_first = forth(step.bare(), carry, first)
    if rest is not None:
        carry, found = lax.scan(
            functools.partial(forth, step), carry, rest, reverse=backwards
        )
    back_carry = carry[0], jnp.zeros_like(parts.trunk_BTD)
    d_first = d_rest = None
    if found is not None:
        back_carry, d_rest = lax.scan(
            functools.partial(back, step),
            back_carry,
            (rest, found[1]),
            reverse=not backwards,
        )
    if of_first is not None:
        back_carry, d_first = back(step.bare(), back_carry, (first, of_first[1]))
    d_common, d_trunk_BTD = back_carry
    scores_of = [None if x is None else x[0] for x in (of_first, found)]
    scores, d_own = _stacked(
        None if of_first is None else (scores_of[0], d_first),
        None if found is None else (scores_of[1], d_rest),
    )
    return scores, Parts(d_trunk_BTD, d_own, d_common)


def _bodies(weights: Weights) -> Weights:
    """Weights of a head's stream and output, without the tables of its logits."""
    return dataclasses.replace(weights, **dict.fromkeys(_TABLES))


def _norms(weights: Weights) -> Weights:
    return Weights(norm=weights.norm)


def _by_field(join: Callable[[Any, Any], Any], a: Weights, b: Weights) -> Weights:
    """Joins the fields that both have; of others, takes the one there is."""
    found = {}
    for field in dataclasses.fields(Weights):
        x, y = getattr(a, field.name), getattr(b, field.name)
        both = x is not None and y is not None
        found[field.name] = (
            jax.tree.map(join, x, y) if both else (y if x is None else x)
        )
    return Weights(**found)


def _sum(a: Weights, b: Weights) -> Weights:
    return _by_field(jnp.add, a, b)


def _narrow(grads: Weights, like: Weights) -> Weights:
    narrow = _by_field(lambda grad, x: grad.astype(x.dtype), grads, like)
    there = {
        f.name: getattr(narrow, f.name)
        for f in dataclasses.fields(Weights)
        if getattr(grads, f.name) is not None
    }
    return Weights(**there)


def _stacked(of_first: Any, of_rest: Any) -> tuple[TokenScores, Weights]:
    """Scores and gradients of head 1, and of the others, as one stack."""
    if of_first is None:
        return of_rest
    scores, d_own = jax.tree.map(lambda x: x[None], of_first)
    if of_rest is None:
        return scores, d_own

    def join(x, y):
        return jnp.concatenate([x, y])

    return jax.tree.map(join, scores, of_rest[0]), _by_field(join, d_own, of_rest[1])
