"""The forms of the head loss: whole training steps, and the head part alone.

python -m benchmarks.head_loss --rounds=10
"""

import sys
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    Training,
    config_of,
    interleaved,
    one_device,
    options,
    print_environment,
    print_table,
    random_batch,
    ratio,
    script,
    show_ms,
    show_ratio,
    temporaries,
)
from mtp_jax.config import Config, HeadLoss
from mtp_jax.loss.batch_loss import targets_of
from mtp_jax.loss.head_loss import head_loss
from mtp_jax.loss.targets import future_targets
from mtp_jax.loss.weights import StepWeights
from mtp_jax.model.attention import RowContext
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sequence import split_time
from mtp_jax.parallel.sharding import spec

FORMS = get_args(HeadLoss)


@script
def main(argv: list[str]) -> int:
    """Prints two tables."""
    args = options(
        argv,
        "Time and temporaries of the fused, the rematerialized and the naive loss.",
        rounds=10,
        d_model=256,
        trunk_layers=4,
        d_ff=704,
        num_heads=8,
        vocab_size=32_000,
        seq_len=256,
        batch_size=8,
        chunk_tokens=128,
        remat="full",
        n_of_step=3,
        n_of_part=4,
    )

    def config(form: HeadLoss, n: int) -> Config:
        return config_of(args, n=n, num_layers=args.trunk_layers + n, head_loss=form)

    print_environment(args.rounds)
    with jax.set_mesh(one_device()):
        print(f"\nwhole step, n={args.n_of_step}")
        steps = {form: Training(config(form, args.n_of_step)) for form in FORMS}
        seconds = interleaved({k: v.step for k, v in steps.items()}, args.rounds)
        _report(seconds, {form: temporaries(steps[form].compiled) for form in FORMS})
        del steps

        print(f"\nloss and gradients of the heads alone, n={args.n_of_part}")
        parts = {form: head_part(config(form, args.n_of_part)) for form in FORMS}
        seconds = interleaved({k: v[0] for k, v in parts.items()}, args.rounds)
        _report(seconds, {form: parts[form][1] for form in FORMS})
    return 0


def head_part(cfg: Config) -> tuple[Callable[[], object], int]:
    """A function for the heads' loss and gradients, and its temporaries in bytes."""
    n = cfg.model.n_future_tokens
    init, build = model_builder(cfg.model)
    params = jax.jit(init)(jax.random.key(0))
    rest = {name: params.pop(name) for name in ("trunk", "w_embedding")}
    batch = {name: x[0] for name, x in random_batch(cfg).items()}
    shape = (cfg.data.batch_size, cfg.data.seq_len, cfg.model.d_model)
    trunk_BTD = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    trunk_BTD = jax.sharding.reshard(trunk_BTD, spec("batch", "time", None))

    @jax.jit
    def gradients(params, trunk_BTD, rest, batch):
        def loss_of(params, trunk_BTD):
            model = build(params | rest)
            token_NBT, valid_NBT = map(
                split_time, future_targets(batch["tokens"], batch["segments"], n)
            )
            weights = StepWeights(jnp.ones(n) / jnp.sum(valid_NBT))
            targets = targets_of(token_NBT, valid_NBT, batch, weights, cfg.loss)
            angles_BTk = model.angles(split_time(batch["positions"][:, :-n]))
            rows = RowContext(angles_BTk, batch["segments"][:, :-n])
            return head_loss(model, trunk_BTD, rows, targets, cfg.loss, cfg.compute)[0]

        return jax.value_and_grad(loss_of, argnums=(0, 1))(params, trunk_BTD)

    arguments = (params, trunk_BTD, rest, batch)
    compiled = gradients.lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), temporaries(compiled)


def _report(seconds: dict[str, list[float]], temp_bytes: dict[str, int]) -> None:
    rows = [
        (
            form,
            show_ms(seconds[form]),
            show_ratio(ratio(seconds[form], seconds["fused"])),
            f"{temp_bytes[form] / 1e6:.1f}",
        )
        for form in seconds
    ]
    print_table(("form", "ms", "time to fused", "temporaries, MB"), *rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
