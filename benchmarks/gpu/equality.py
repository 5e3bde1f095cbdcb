"""Whether the device computes what it should, before anything is timed.

The fused loss against the naive one, the attention kernel that the device chooses
against XLA's, in float32 and bfloat16; greedy drafting against plain decoding. Errors
are relative to the largest entry of what is compared with.

python -m benchmarks.gpu.equality
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.results import Results, parsed, results_of
from benchmarks.timing import one_device, random_batch, script
from mtp_jax.config import Attention, Config, HeadLoss, default, freeze
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.generator import Generator
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.train_step import make_gradients

# Largest error that rounding explains: of products in float32, which the hardware may
# carry out in TF32 unless told otherwise, and in bfloat16.
_TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2}
_COMPARED: tuple[tuple[str, HeadLoss, Attention], ...] = (
    ("fused = naive", "fused", "xla"),
    ("attention = xla", "naive", "auto"),
)
_TEXTS = 8
_NEW_TOKENS = 64


@script
def main(argv: list[str]) -> int:
    """Adds a result for each comparison; 1 if one of them is out of its tolerance."""
    args = parsed(argv, "Equality checks.")
    results = results_of(args)
    ok = True
    with jax.set_mesh(one_device()):
        for dtype in ("float32", "bfloat16"):
            base = _config(dtype, args.rehearse)
            naive = None
            for what, head_loss, attention in _COMPARED:
                case = {"what": what, "dtype": dtype}
                with results.failures_told("equality", **case):
                    naive = naive or _gradients(base, "naive", "xla")
                    other = _gradients(base, head_loss, attention)
                    ok &= _compare(naive, other, results, case)
        with results.failures_told("equality", what="drafting"):
            ok &= _drafting(_config("float32", args.rehearse), results)
    return 0 if ok else 1


def _config(dtype: str, rehearse: bool) -> Config:
    c = default()
    d, t = (64, 64) if rehearse else (512, 1024)
    c.model.update(vocab_size=256, d_model=d, num_layers=6, n_future_tokens=4)
    c.model.update(num_query_heads=d // 64, num_kv_heads=d // 64, d_head=64, d_ff=2 * d)
    c.model.compute_dtype = dtype
    c.data.update(seq_len=t, batch_size=2)
    return freeze(c)


def _gradients(
    cfg: Config, head_loss: HeadLoss, attention: Attention
) -> tuple[Any, list[Any]]:
    """Loss and gradients of the same parameters and batch, computed in one way."""
    compute = dataclasses.replace(cfg.compute, head_loss=head_loss, attention=attention)
    cfg = dataclasses.replace(cfg, compute=compute)
    params = jax.jit(model_builder(cfg.model)[0])(jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        loss, _, grads = jax.jit(make_gradients(cfg))(params, random_batch(cfg))
    return loss, jax.tree.leaves(grads)


def _compare(
    naive: tuple[Any, list[Any]],
    other: tuple[Any, list[Any]],
    results: Results,
    case: dict[str, Any],
) -> bool:
    """Adds the largest errors of another way's loss and gradients."""

    def error(x, y):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        return float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30))

    (loss_a, grads_a), (loss_b, grads_b) = naive, other
    worst = max(map(error, grads_a, grads_b))
    limit = _TOLERANCE[case["dtype"]]
    ok = max(worst, error(loss_a, loss_b)) <= limit
    results.add(
        "equality",
        **case,
        loss_error=error(loss_a, loss_b),
        grad_error=worst,
        limit=limit,
        ok=ok,
    )
    return ok


def _drafting(cfg: Config, results: Results) -> bool:
    """Greedy texts of drafting decoders against plain's, token for token."""
    params = jax.jit(model_builder(cfg.model)[0])(jax.random.key(0))
    # Heads that agree with each other now and then, so that drafts are accepted.
    params["heads"] = jax.tree.map(
        lambda x: jnp.concatenate([x[:1]] * len(x)), params["heads"]
    )
    tokenizer, mesh = ByteTokenizer(), jax.sharding.get_mesh()
    generator = Generator(cfg.model, params, tokenizer, mesh)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(256, size=32).astype(np.int32) for _ in range(_TEXTS)]

    def texts(name, size):
        with jax.default_matmul_precision("highest"):
            return generator.generate(
                prompts,
                max_new_tokens=_NEW_TOKENS,
                decoder=DECODERS[name](),
                batch_size=size,
            )

    plain, ok = texts("plain", 1), True
    for name in ("blockwise", "tree"):
        pairs = zip(plain, texts(name, 4), strict=True)
        equal = sum(a.tokens == b.tokens for a, b in pairs)
        # Texts may part where two tokens score the same but for rounding.
        ok &= equal >= _TEXTS - 1
        results.add(
            "equality", what=f"{name} = plain", texts=_TEXTS, equal=equal, ok=ok
        )
    return ok


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
