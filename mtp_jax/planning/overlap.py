"""Which collectives of a compiled program run while something else does.

A program is in the order of its schedule. A collective hides behind work that is done
between its start and its end. It has them in one of three forms:

- two instructions, `all-gather-start` and `all-gather-done` as example;
- `async-start` and `async-done` around a computation with a collective in it;
- on TPUs a chain: fusions that each take the collective a part of its way, beside
  their own arithmetic, named by one `chain_id`.

All others hold the device up, as do those that end right where they start.
"""

import re

from mtp_jax.planning.hlo_text import Computation, Instruction

# What takes time; of a fusion it shows whether it is more than a collective.
_WORK = {"call", "conditional", "convolution", "custom-call", "dot", "reduce", "while"}
_CHAIN = re.compile(r'chain_id="(\d+)"')


def chain_of(x: Instruction) -> str:
    """The chain that a collective belongs to; empty if it is of none."""
    match = _CHAIN.search(x.attributes)
    return match[1] if match else ""


def overlapped(
    computations: dict[str, Computation], kinds: tuple[str, ...]
) -> frozenset[str]:
    """Names of the collectives with work between their start and their end.

    Args:
      computations: of the program.
      kinds: operations that are collectives.
    """
    return frozenset(
        name
        for computation in computations.values()
        for name in _Schedule(computations, kinds, list(computation.values())).hidden()
    )


class _Schedule:
    """The instructions of one computation, in order."""

    def __init__(
        self,
        computations: dict[str, Computation],
        kinds: tuple[str, ...],
        instructions: list[Instruction],
    ):
        self.computations = computations
        self.kinds = kinds
        self.instructions = instructions

    def hidden(self) -> set[str]:
        """Names of the collectives that are hidden here."""
        spans: dict[str, tuple[int, int, list[str]]] = {}  # start, end, collectives
        for i, x in enumerate(self.instructions):
            if x.op.endswith("-done") and x.operands:
                begun = spans.get(x.operands[0])
                if begun:
                    spans[x.operands[0]] = (begun[0], i, begun[2])
            elif x.op.endswith("-start") or x.op == "send":
                named = [y.name for y in self._within(x)] or [x.name]
                spans[x.name] = (i, i, named)
            elif x.op == "fusion":
                for y in self._within(x):
                    if chain := chain_of(y):
                        first, _, names = spans.get(f"chain {chain}", (i, i, []))
                        spans[f"chain {chain}"] = (first, i, [*names, y.name])
        return {
            name
            for start, end, names in spans.values()
            if any(map(self._works, self.instructions[start : end + 1]))
            for name in names
        }

    def _within(self, x: Instruction) -> list[Instruction]:
        """The collectives of the computations that an instruction calls."""
        return [
            y
            for name in x.called
            for y in self.computations[name].values()
            if y.op.removesuffix("-start") in self.kinds
        ]

    def _works(self, x: Instruction) -> bool:
        """Returns True if the device computes something in an instruction."""
        if x.op != "fusion":
            return x.op in _WORK
        inner = [y.op for name in x.called for y in self.computations[name].values()]
        return not self._within(x) or any(op in _WORK for op in inner)
