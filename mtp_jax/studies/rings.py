"""Arithmetic of polynomials over a prime field, cut off at a degree, as sequences.

An expression is written in prefix notation, `op A B = C ;`, an element as its
coefficients, the lowest first. Operations: negation, sum, product, and composition, by
Horner's rule on the representatives of lowest degree, cut off after each step (on the
ring itself composition is not well defined). Axes: R rows, S tokens of a row.
"""

import dataclasses

import numpy as np

Element = tuple[int, ...]
OPERATIONS = ("negate", "add", "multiply", "compose")


@dataclasses.dataclass(frozen=True)
class Ring:
    """Polynomials over the integers modulo `prime`, modulo X^`degree`."""

    prime: int
    degree: int

    @property
    def vocabulary(self) -> int:
        """Coefficients, operations, =, ;, a pause and padding."""
        return self.prime + len(OPERATIONS) + 4

    @property
    def equals(self) -> int:
        return self.prime + len(OPERATIONS)

    @property
    def end(self) -> int:
        return self.equals + 1

    @property
    def pause(self) -> int:
        return self.equals + 2

    @property
    def padding(self) -> int:
        return self.equals + 3

    def negate(self, a: Element) -> Element:
        return tuple(-x % self.prime for x in a)

    def add(self, a: Element, b: Element) -> Element:
        return tuple((x + y) % self.prime for x, y in zip(a, b, strict=True))

    def multiply(self, a: Element, b: Element) -> Element:
        made = [0] * self.degree
        for i, x in enumerate(a):
            for j, y in enumerate(b[: self.degree - i]):
                made[i + j] = (made[i + j] + x * y) % self.prime
        return tuple(made)

    def compose(self, a: Element, b: Element) -> Element:
        """a(b(X))."""
        made = (0,) * self.degree
        for x in reversed(a):
            made = self.multiply(made, b)
            made = ((made[0] + x) % self.prime, *made[1:])
        return made

    def expression(
        self, rng: np.random.Generator, operations: int
    ) -> tuple[list[int], Element]:
        """A random expression of so many operations, as tokens, and its value.

        The operation at the root is uniform; those that are left fall uniformly to its
        operands.
        """
        if operations == 0:
            value = tuple(int(x) for x in rng.integers(0, self.prime, self.degree))
            return list(value), value
        which = int(rng.integers(len(OPERATIONS)))
        left = operations - 1
        if which == 0:
            tokens, a = self.expression(rng, left)
            return [self.prime, *tokens], self.negate(a)
        share = int(rng.integers(left + 1))
        first, a = self.expression(rng, share)
        second, b = self.expression(rng, left - share)
        value = getattr(self, OPERATIONS[which])(a, b)
        return [self.prime + which, *first, *second], value

    def problem(
        self, rng: np.random.Generator, operations: int, pauses: int = 0
    ) -> list[int]:
        """Tokens of an expression, pauses, =, its value and ;."""
        tokens, value = self.expression(rng, operations)
        return [*tokens, *[self.pause] * pauses, self.equals, *value, self.end]


def packed(
    ring: Ring, rng: np.random.Generator, rows: int, length: int, most: int, pauses: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of problems of 1 to `most` operations, tokens and document numbers [R, S].

    A problem that no longer fits into a row begins the next one.
    """
    tokens_RS = np.full((rows, length), ring.padding)
    segments_RS = np.zeros((rows, length), np.int64)
    row, at, number = 0, 0, 0
    while row < rows:
        problem = ring.problem(rng, int(rng.integers(1, most + 1)), pauses)
        assert len(problem) <= length, "rows are too short for a problem"
        if at + len(problem) > length:
            row, at, number = row + 1, 0, 0
            if row == rows:
                break
        number += 1
        tokens_RS[row, at : at + len(problem)] = problem
        segments_RS[row, at : at + len(problem)] = number
        at += len(problem)
    return tokens_RS, segments_RS


def longest(ring: Ring, operations: int, pauses: int) -> int:
    """Tokens of the longest problem: all operations binary."""
    return operations + (operations + 1) * ring.degree + pauses + 2 + ring.degree
