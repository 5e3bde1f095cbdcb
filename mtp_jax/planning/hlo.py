"""Collectives and arrays of a compiled program, read from its optimized HLO.

`read_hlo(compiled.as_text())` works for programs of CPUs and TPUs. It tells what the
devices send to each other, which arrays there are, and how long the program is.
"""

import dataclasses
import math
import re

from mtp_jax.planning.hlo_text import Computation, Instruction, parse
from mtp_jax.planning.overlap import chain_of, overlapped

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "dcn",  # whatever goes from slice to slice, over the data-center network
)

_BITS = {"pred": 8, "c64": 64, "c128": 128}  # others end in theirs, as bf16, u4, f8e4m3
# Instructions without buffers of their own: they name, or pass on, those of others.
_VIEWS = {
    "bitcast",
    "conditional",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "tuple",
    "while",
}
# Instructions that call computations which write buffers, as fusions do not.
_RUNS = {"async-start", "call", "conditional", "while"}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, and the bytes a device sends in them, in one run."""

    count: int = 0  # collectives
    bytes: float = 0.0  # sent by a device; see `_Counting._sent`
    hidden: int = 0  # collectives beside which the device computes
    hidden_bytes: float = 0.0  # sent in those

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.count + other.count,
            self.bytes + other.bytes,
            self.hidden + other.hidden,
            self.hidden_bytes + other.hidden_bytes,
        )

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(
            self.count * times,
            self.bytes * times,
            self.hidden * times,
            self.hidden_bytes * times,
        )


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that an instruction outside of a fusion writes, or an argument."""

    shape: tuple[int, ...]  # of the part that a device holds
    dtype: str  # as HLO calls it: f32, bf16, s32 ...
    bytes: int  # without the padding of the device's layout
    name: str  # where in the source it comes from, else the instruction's name

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """The program of one device."""

    collectives: dict[str, Traffic]  # by kind; those of `KINDS` that occur
    buffers: tuple[Buffer, ...]  # the largest first
    instructions: int  # in the text, fusions included
    unknown_loops: tuple[str, ...]  # with collectives, counted as if they ran once

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends to others of its slice."""
        total = sum(traffic.bytes for traffic in self.collectives.values())
        return total - self.dcn_bytes

    @property
    def dcn_bytes(self) -> float:
        """Bytes that a device sends to other slices."""
        return self.collectives.get("dcn", Traffic()).bytes


def read_hlo(text: str) -> HloProgram:
    """Reads the text of an optimized module, as `compiled.as_text()` gives it.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = parse(text)
    computations, entry = module.computations, module.entry
    counting = _Counting(computations, module.devices)
    return HloProgram(
        counting.traffic(entry),
        _buffers(computations, entry),
        sum(map(len, computations.values())),
        tuple(counting.unknown_loops),
    )


def _buffers(computations: dict[str, Computation], entry: str) -> tuple[Buffer, ...]:
    """The buffers that a run from the entry computation writes, the largest first."""
    found, reached = [], [entry]
    for computation in reached:  # grows on the way
        for x in computations[computation].values():
            if x.op in _RUNS:
                reached += [name for name in x.called if name not in reached]
            if x.op in _VIEWS and not (x.op == "parameter" and computation == entry):
                continue
            match = re.search(r'op_name="([^"]*)"', x.attributes)
            for dtype, shape in _arrays(x.type):
                size = int(_bytes(dtype, shape))
                found.append(Buffer(shape, dtype, size, match[1] if match else x.name))
    return tuple(sorted(found, key=lambda buffer: buffer.bytes, reverse=True))


class _Counting:
    """Adds up the collectives of a module's computations."""

    def __init__(self, computations: dict[str, Computation], devices: int):
        self.computations = computations
        self.devices = devices
        self.unknown_loops: list[str] = []
        self._hidden = overlapped(computations, KINDS)
        self._chains: dict[str, str] = {}  # of each chain, the member that counts
        self._known: dict[str, dict[str, Traffic]] = {}

    def traffic(self, computation: str) -> dict[str, Traffic]:
        """Traffic of one run of a computation and all that it calls, by kind."""
        if computation in self._known:
            return self._known[computation]
        total: dict[str, Traffic] = {}
        for x in self.computations[computation].values():
            if x.op in ("async-update", "async-done"):
                continue  # they name the computation that async-start has begun
            parts = [self.traffic(name) for name in x.called]
            if x.op == "conditional":  # one branch runs; the one that sends the most
                parts = [max(parts, key=lambda p: sum(t.bytes for t in p.values()))]
            times = self._trips(x, computation) if x.op == "while" and any(parts) else 1
            if kind := self._kind(x, computation):
                sent = self._sent(kind, x, computation)
                hidden = x.name in self._hidden
                traffic = Traffic(1, sent, int(hidden), sent if hidden else 0.0)
                parts.append({kind: traffic})
            for part in parts:
                for key, traffic in part.items():
                    total[key] = total.get(key, Traffic()) + traffic * times
        self._known[computation] = total
        return total

    def _kind(self, x: Instruction, computation: str) -> str:
        """The kind of collective that begins here; empty if none does.

        TPU programs have three forms of their own. A reduce-scatter is a fusion named
        all-reduce-scatter, of an all-reduce and the slice that is kept. A collective
        that runs beside several fusions stands in each of them, with one chain_id. What
        goes to other slices is sent to the host, with attributes that say where to.
        """
        if x.op == "send" and "_xla_megascale_target" in x.attributes:
            return "dcn"
        kind = x.op.removesuffix("-start")
        if kind not in KINDS:
            return ""
        chain = chain_of(x)
        if chain and self._chains.setdefault(chain, x.name) != x.name:
            return ""
        scattered = kind == "all-reduce" and computation.startswith(
            "all-reduce-scatter"
        )
        return "reduce-scatter" if scattered else kind

    def _sent(self, kind: str, x: Instruction, computation: str) -> float:
        """The bytes that a device sends, on a ring of the g devices of its group.

        From the bytes b of its operands, as they are without padding: (g - 1) b for an
        all-gather, (g - 1) b / g for a reduce-scatter and an all-to-all, twice that for
        an all-reduce, b for a permutation. Between slices, g is the number of them.
        """
        types = [self.computations[computation][name].type for name in x.operands]
        size = sum(_bytes(*array) for type_ in types for array in _arrays(type_))
        if kind == "collective-permute":
            return size
        group = _group_size(x.attributes) or self.devices
        if kind == "dcn":
            transfer = re.search(r'megascale_transfer_type="(\w+)"', x.attributes)
            kind = transfer[1].lower().replace("_", "-") if transfer else ""
            group = _slices(x.attributes)
        share = size * (group - 1) / group
        return share * {"all-gather": group, "all-reduce": 2}.get(kind, 1)

    def _trips(self, loop: Instruction, computation: str) -> int:
        """The number of times that a loop's body runs.

        TPU programs do not say: there it follows from the constant that a counter is
        compared with, where the counter begins, and what the body adds to it.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        around = self.computations[computation]
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        test = next(x for x in condition.values() if x.root)
        sides = [condition[name] for name in test.operands]
        if test.op == "compare" and test.attribute("direction") == "LT":
            index = int(sides[0].attribute("index") or 0)
            first = _element(around[loop.operands[0]], index, around)
            last = _element(next(x for x in body.values() if x.root), index, body)
            added = [body[name] for name in last.operands] if last.op == "add" else []
            begin, end = _constant(first, around), _constant(sides[1], condition)
            steps = [step for x in added if (step := _constant(x, body))]
            if begin is not None and end is not None and steps:
                return -((begin - end) // steps[0])
        self.unknown_loops.append(loop.name)
        return 1


def _through_copies(x: Instruction, computation: Computation) -> Instruction:
    """The instruction that x is a copy of, directly or not; else x."""
    while x.op in ("copy", "bitcast", "convert") and x.operands:
        x = computation[x.operands[0]]
    return x


def _element(x: Instruction, index: int, computation: Computation) -> Instruction:
    """The instruction at `index` of a tuple made here; else the tuple itself."""
    if x.op != "tuple":
        return x
    return _through_copies(computation[x.operands[index]], computation)


def _constant(x: Instruction, computation: Computation) -> int | None:
    """The value of a whole-number constant, None if x is none."""
    x = _through_copies(x, computation)
    number = x.op == "constant" and re.fullmatch(r"-?\d+", x.arguments)
    return int(x.arguments) if number else None


def _group_size(attributes: str) -> int:
    """The devices of a group; 0 if the text does not say, which means all of them.

    The forms are {{0,1},{2,3}}, [groups,size]<=[...] and mesh['x'=4,'y'=2] {'x'}.
    """
    match = re.search(r"replica_groups=(\S+(?: \{'[^}]*\})?)", attributes)
    text = match[1] if match else ""
    if text.startswith("{{"):
        return text[2:].partition("}")[0].count(",") + 1
    if iota := re.match(r"\[\d+,(\d+)\]", text):
        return int(iota[1])
    if text.startswith("mesh["):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", text))
        names = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", text.partition("{")[2])
        return math.prod(int(part or sizes[name]) for name, part in names)
    return 0


def _slices(attributes: str) -> int:
    """The number of slices that _xla_megascale_target="{1,2}x{0:3}" names."""
    match = re.search(r'_xla_megascale_target="\{([^}]*)\}', attributes)
    ranges = [part.split(":") for part in match[1].split(",")] if match else []
    return sum(int(of[-1]) - int(of[0]) + 1 for of in ranges)


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """The element type and shape of each array of a type, tuples taken apart."""
    return [
        (dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(type_)
    ]


def _bytes(dtype: str, shape: tuple[int, ...]) -> float:
    """Bytes of an array without padding."""
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or int(digits[0] if digits else 0)
    return math.prod(shape) * bits / 8
