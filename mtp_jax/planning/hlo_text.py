"""The text of a compiled program, as `compiled.as_text()` gives it, taken apart."""

import dataclasses
import math
import re

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9\-]*)"
    r"\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of HLO, its line taken apart."""

    name: str
    op: str
    type: str
    arguments: str  # between the parentheses
    attributes: str  # after the parentheses
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        found = _CALLED.findall(self.attributes)
        names = [name for some, one in found for name in (some or one).split(",")]
        return [name.strip(" %") for name in names]

    def attribute(self, name: str) -> str:
        """The x of `name=%x`; empty if there is no such attribute."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


# By name, in the order of the text, which is that of a schedule.
Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of HLO."""

    computations: dict[str, Computation]
    entry: str  # the name of the computation that a run begins with
    devices: int  # that run it together


def parse(text: str) -> Module:
    """Takes the text of an optimized module apart.

    Raises:
      ValueError: the text has no entry computation.
    """
    header = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    computations: dict[str, Computation] = {}
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match["name"]
            computations[name] = {}
            entry = name if match["entry"] else entry
        elif computations and (match := _INSTRUCTION.match(line)):
            arguments, _, attributes = match["rest"].partition(")")
            computations[name][match["name"]] = Instruction(
                match["name"],
                match["op"],
                match["type"],
                arguments,
                attributes,
                bool(match["root"]),
            )
    if not entry:
        raise ValueError("the text is not an HLO module: it has no ENTRY.")
    return Module(computations, entry, math.prod(map(int, counts)))
