"""A profile of one training step: the largest kernels, copies and exposed collectives.

python -m benchmarks.gpu.profile --case=1.3b,4,fused
"""

import collections
import pathlib
import sys
import tempfile
from collections.abc import Iterable

import jax

from benchmarks.gpu.results import parsed, results_of, shape
from benchmarks.timing import Training, one_device, script

_STEPS = 3
# Parts of kernels' names, in lower case; the first kind that fits counts.
_KINDS = {
    "collectives": ("nccl", "all-reduce", "all-gather", "-scatter", "all-to-all"),
    "attention": ("sdpa", "flash", "fmha"),
    "products": ("nvjet", "gemm", "cutlass", "cublas", "dot"),
    "copies": ("memcpy", "copy"),
}

Span = tuple[int, int]  # begin and end, nanoseconds


@script
def main(argv: list[str]) -> int:
    """Adds one result."""
    args = parsed(
        argv,
        "A profile of one step.",
        case="1.3b,4,fused",
        remat="none",
        scan_layers="auto",
        largest="5",
    )
    name, n, head_loss = args.case.split(",")
    results = results_of(args)
    case = {"shape": name, "n": int(n), "head_loss": head_loss}
    with results.failures_told("profile", **case), jax.set_mesh(one_device()):
        cfg = shape(
            name,
            int(n),
            args.rehearse,
            head_loss=head_loss,
            remat=args.remat,
            scan_layers=args.scan_layers,
        )
        training = Training(cfg, documents=1)
        training.step()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(_STEPS):
                    training.step()
            [file] = pathlib.Path(folder).rglob("*.xplane.pb")
            results.add("profile", **case, **_told(file, int(args.largest)))
    return 0


def _told(file: pathlib.Path, largest: int) -> dict[str, object]:
    """Shares of the time in which the device was busy, over all steps."""
    data = jax.profiler.ProfileData.from_file(str(file))
    kernels: collections.Counter[str] = collections.Counter()
    spans: dict[str, list[Span]] = {kind: [] for kind in (*_KINDS, "rest")}
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                begin, length = int(event.start_ns), int(event.duration_ns)
                kernels[event.name] += length
                spans[_kind(event.name)].append((begin, begin + length))
    busy = _length(x for kind in spans.values() for x in kind)
    if not busy:  # a CPU has no streams in its profile
        return {"busy_s": 0.0, "largest": [], "shares": None, "exposed": None}
    work = _length(x for kind, of in spans.items() if kind != "collectives" for x in of)
    return {
        "busy_s": busy / 1e9 / _STEPS,
        "largest": [
            {"kernel": name[:120], "share": length / busy}
            for name, length in kernels.most_common(largest)
        ],
        "shares": {kind: _length(x) / busy for kind, x in spans.items()},
        # Collectives while nothing else runs.
        "exposed": (busy - work) / busy,
    }


def _kind(name: str) -> str:
    lower = name.lower()
    for kind, signs in _KINDS.items():
        if any(sign in lower for sign in signs):
            return kind
    return "rest"


def _length(spans: Iterable[Span]) -> int:
    """Nanoseconds that spans cover together, overlaps counted once."""
    total, end = 0, 0
    for begin, stop in sorted(spans):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
