"""The cost of a drafting forward pass, on weights that no cache holds.

With few texts a forward pass takes as long as reading the weights, so the speed that
drafting can reach, to the tokens of a forward pass, is bounded by the weights that a
plain pass reads over those that a drafting one reads: (L - n + 1) of L layers, and the
unembedding once or twice. Weights are random: what is drafted does not matter here.

python -m benchmarks.draft_cost --n 4 8
"""

import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.timing import (
    config_of,
    one_device,
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ms,
    show_ratio,
)
from mtp_jax.config import ModelConfig
from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.programs import Programs
from mtp_jax.model.language_model import model_builder

_PASSES = 4  # that are timed together
_NO_END = -1  # no token ends a text


@script
def main(argv: list[str]) -> int:
    """Prints a row for each number of heads and batch size."""
    args = options(
        argv,
        "Time of a plain forward pass to that of a drafting one, beside its bound.",
        rounds=15,
        n=[4, 8],
        batch_sizes=[1, 4, 16],
        vocab_size=256,
        d_model=2048,
        num_layers=16,
        d_ff=5632,
        num_heads=16,
        decoder="blockwise",
    )
    print_environment(args.rounds)
    rows = []
    with jax.set_mesh(one_device()):
        for n in args.n:
            cfg = config_of(args, n=n).model
            params = unstack(cfg, jax.jit(model_builder(cfg)[0])(jax.random.key(0)))
            for size in args.batch_sizes:
                rows.append(_row(cfg, params, size, args))
    print_table(
        ("n, batch", "plain, ms", "drafting, ms", "quotient", "bound", "share"), *rows
    )
    return 0


def _row(cfg: ModelConfig, params: Any, size: int, args: Any) -> tuple[str, ...]:
    n = cfg.n_future_tokens
    batches = {
        "plain": _batch(cfg, params, "plain", 1, size),
        "drafting": _batch(cfg, params, args.decoder, n, size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(args.rounds):
        for name, batch in batches.items():
            batch.begin()
            batch.advance(1)
            began = time.perf_counter()
            batch.advance(_PASSES)
            seconds[name].append(time.perf_counter() - began)
    found = ratio(seconds["plain"], seconds["drafting"])
    plain, drafting = entries_of_passes(cfg, params)
    bound = plain / drafting
    return (
        f"{n}, {size}",
        *(show_ms([t / _PASSES for t in taken]) for taken in seconds.values()),
        show_ratio(found),
        f"{bound:.3f}",
        f"{found[0] / bound:.3f}",
    )


def _batch(
    cfg: ModelConfig, params: Any, decoder: str, heads: int, size: int
) -> DecodeBatch:
    """A batch with room for the passes that are timed, its programs compiled."""
    params = {**params, "heads": params["heads"][:heads]}
    rows = [np.arange(1, 33, dtype=np.int32)] * size
    room = (_PASSES + 2) * cfg.n_future_tokens
    programs = Programs(cfg, _NO_END)
    return DecodeBatch(programs, params, DECODERS[decoder](), rows, room, Sampling())


def entries_of_passes(cfg: ModelConfig, params: Any) -> tuple[int, int]:
    """Entries of the weights that a plain pass reads, and those of a drafting one.

    Args:
      cfg: of the model.
      params: from `unstack`, with all its heads.
    """
    layer = sum(x.size for x in jax.tree.leaves(params["heads"][0]))
    output = cfg.vocab_size * cfg.d_model
    plain = (cfg.num_trunk_layers + 1) * layer + output
    # Head 1 verifies, and then the others are asked: the output matrix is read twice.
    return plain, cfg.num_layers * layer + 2 * output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
