"""Decoding at random weights: plain and drafting passes, beside their bound.

Tokens a second at the paper's acceptance: a drafting pass commits as many tokens as
there (arXiv:2404.19737, table S2, code, n = 4: 3.5), whatever random weights accept.

python -m benchmarks.gpu.decoding --shape=1.3b
"""

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.draft_cost import entries_of_passes
from benchmarks.gpu.results import Results, parsed, results_of, shape
from benchmarks.timing import one_device, script
from mtp_jax.config import ModelConfig
from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.programs import Programs
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.chips import device_figures

_HEADS = 4
_TOKENS_PER_PASS = 3.5
_PASSES = 16  # that are timed together
_ROUNDS = 5
_PROMPT_TOKENS = 128
_NO_END = -1  # no token ends a text


@script
def main(argv: list[str]) -> int:
    """Adds a result for each batch size."""
    args = parsed(argv, "Plain and drafting passes.", shape="1.3b", batches="1,4,16,64")
    results = results_of(args)
    cfg = shape(args.shape, _HEADS, args.rehearse).model
    sizes = [1, 2] if args.rehearse else [int(x) for x in args.batches.split(",")]
    with jax.set_mesh(one_device()):
        init, _ = model_builder(cfg)
        cast = jax.jit(
            lambda key: jax.tree.map(lambda x: x.astype(cfg.compute_dtype), init(key))
        )
        params = unstack(cfg, cast(jax.random.key(0)))
        for size in sizes:
            case = {"shape": args.shape, "n": _HEADS, "batch": size}
            with results.failures_told("decoding", **case):
                _measure(cfg, params, size, results, case)
    return 0


def _measure(
    cfg: ModelConfig, params: Any, size: int, results: Results, case: dict[str, Any]
) -> None:
    plain_s = _pass_s(cfg, params, "plain", 1, size)
    drafting_s = _pass_s(cfg, params, "blockwise", _HEADS, size)
    plain, drafting = entries_of_passes(cfg, params)
    plain_bytes = plain * jnp.dtype(cfg.compute_dtype).itemsize
    chip = device_figures(jax.devices()[0])
    bound = plain / drafting
    results.add(
        "decoding",
        **case,
        plain_s=plain_s,
        drafting_s=drafting_s,
        quotient=plain_s / drafting_s,
        bound=bound,
        share=plain_s / drafting_s / bound,
        plain_bytes=plain_bytes,
        bandwidth_share=(
            plain_bytes / plain_s / chip.hbm_bytes_per_s if chip else None
        ),
        plain_tokens_per_s=size / plain_s,
        drafting_tokens_per_s=size * _TOKENS_PER_PASS / drafting_s,
    )


def _pass_s(
    cfg: ModelConfig, params: Any, decoder: str, heads: int, size: int
) -> float:
    """Seconds of a forward pass, after the prompts were read."""
    kept = {**params, "heads": params["heads"][:heads]}
    rows = [np.arange(1, _PROMPT_TOKENS + 1, dtype=np.int32) % 200] * size
    room = (_PASSES + 2) * heads
    batch = DecodeBatch(
        Programs(cfg, _NO_END), kept, DECODERS[decoder](), rows, room, Sampling()
    )
    times = []
    for _ in range(_ROUNDS + 1):  # the first compiles what growing caches take
        batch.begin()
        batch.advance(1)
        began = time.perf_counter()
        batch.advance(_PASSES)
        times.append((time.perf_counter() - began) / _PASSES)
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
