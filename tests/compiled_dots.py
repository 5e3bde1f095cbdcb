"""FLOPs of the matrix products in a compiled program, read from its text."""

import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\S+)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|_computation=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def dot_flops(text):
    """FLOPs of all `dot` operations, loops as often as they turn.

    Of the branches of a conditional the dearest counts.
    """
    lines, entry = {}, None
    name = None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)
    known = {}

    def of(computation):
        if computation not in known:
            known[computation] = _of(lines[computation], of)
        return known[computation]

    return of(entry)


def _of(lines, of):
    shapes, total = {}, 0
    for line in lines:
        found = _RESULT.match(line)
        if not found:
            continue
        name, shape = found.groups()
        shapes[name] = _sizes(shape)
        if " dot(" in line:
            total += _dot(line, shape, shapes)
        elif " conditional(" in line:
            either = [x for pair in _BRANCHES.findall(line) for x in pair if x]
            names = re.findall(r"[\w.-]+", ",".join(either))
            total += max(of(x) for x in names)
        else:
            times = int(_TRIPS.search(line)[1]) if " while(" in line else 1
            total += times * sum(of(x) for x in _CALLED.findall(line))
    return total


def _dot(line, shape, shapes):
    """2 x entries of the result x length of what is summed over."""
    left = re.search(r" dot\((?:(\w+\[[\d,]*\])\S* )?%?([\w.-]+)", line)
    sizes = _sizes(left[1]) if left[1] else shapes[left[2]]
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1]
    summed = math.prod(sizes[int(i)] for i in axes.split(",") if i)
    return 2 * math.prod(_sizes(shape)) * summed


def _sizes(shape):
    """The sizes of an array such as f32[2,3]{1,0}."""
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []
