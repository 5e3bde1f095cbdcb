"""A training step on one device: tokens a second, share of the peak, peak memory.

python -m benchmarks.gpu.training --case=1.3b,4,fused
"""

import sys

import jax

from benchmarks.gpu.results import Results, median_s, parsed, results_of, shape
from benchmarks.timing import Training, one_device, script
from mtp_jax.config import Config
from mtp_jax.model.flops import executed_flops, train_flops
from mtp_jax.parallel.chips import peak_flops

_ROUNDS = 10


@script
def main(argv: list[str]) -> int:
    """Adds one result."""
    args = parsed(
        argv,
        "One training step.",
        case="1.3b,4,fused",
        remat="none",
        scan_layers="auto",
    )
    name, n, head_loss = args.case.split(",")
    results = results_of(args)
    compute = {
        "head_loss": head_loss,
        "remat": args.remat,
        "scan_layers": args.scan_layers,
    }
    case = {"shape": name, "n": int(n), **compute}
    with results.failures_told("training", **case), jax.set_mesh(one_device()):
        cfg = shape(name, int(n), args.rehearse, **compute)
        _measure(cfg, results, case)
    return 0


def _measure(cfg: Config, results: Results, case: dict[str, object]) -> None:
    training = Training(cfg, documents=1)
    seconds = median_s(training.step, _ROUNDS)
    positions = cfg.data.batch_size * cfg.data.seq_len
    device = jax.devices()[0]
    peak = peak_flops(device)
    # What the compiler knows before: state and batch, and temporaries.
    planned = training.compiled.memory_analysis()
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    flops = train_flops(cfg).total * positions
    results.add(
        "training",
        **case,
        params=sum(x.size for x in jax.tree.leaves(training.state.params)),
        positions=positions,
        step_s=seconds,
        tokens_per_s=positions / seconds,
        peak_share=flops / seconds / peak if peak else None,
        flops_per_step=flops,
        executed_flops_per_step=executed_flops(cfg).total * positions,
        planned_bytes=planned.argument_size_in_bytes + planned.temp_size_in_bytes,
        peak_bytes=used,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
