"""The step of one head against transformers and torch, training the same shape on CPU.

pip install '.[bench]'
python -m benchmarks.torch_baseline --rounds=10
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.timing import (
    Training,
    config_of,
    interleaved,
    one_device,
    options,
    print_environment,
    print_table,
    ratio,
    script,
    show_ratio,
)
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.interop.hf_llama import new_llama


@script
def main(argv: list[str]) -> int:
    """Prints a row for each vocabulary."""
    args = options(
        argv,
        "Tokens per second of mtp_jax with n=1, and of LlamaForCausalLM with AdamW.",
        rounds=10,
        vocab_sizes=[256, 32_000],
        d_model=256,
        num_layers=6,
        d_ff=704,
        num_heads=8,
        seq_len=256,
        batch_size=8,
        remat="none",
    )
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise UserError("torch and transformers are needed: pip install '.[bench]'.")
    if jax.default_backend() != "cpu":
        raise UserError("torch is measured on the CPU; set JAX_PLATFORMS=cpu.")
    print_environment(args.rounds)
    print(_torch_environment())
    rows = []
    with jax.set_mesh(one_device()):
        for vocab_size in args.vocab_sizes:
            cfg = config_of(args, vocab_size=vocab_size, n=1)
            ours = Training(cfg, documents=1)
            theirs = _torch_step(cfg, np.asarray(ours.batch["tokens"][0]))
            seconds = interleaved({"jax": ours.step, "torch": theirs}, args.rounds)
            tokens = args.batch_size * args.seq_len
            per_s = (tokens / np.median(s) for s in seconds.values())
            rows.append(
                (
                    vocab_size,
                    *(f"{x:.0f}" for x in per_s),
                    show_ratio(ratio(seconds["torch"], seconds["jax"])),
                )
            )
    print_table(("V", "mtp_jax, tokens/s", "torch, tokens/s", "mtp_jax / torch"), *rows)
    return 0


def _torch_environment() -> str:
    """The versions of torch and transformers; sets as many threads as cores."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def _torch_step(cfg: Config, tokens_BS: np.ndarray) -> Callable[[], None]:
    """A step of the same model, batch and optimizer in torch."""
    model = new_llama(cfg.model, cfg.data.seq_len, use_cache=False)
    model.train()
    return torch_step(cfg, model, lambda ids: model(input_ids=ids).logits, tokens_BS)


def torch_step(
    cfg: Config,
    model: Any,
    logits_of: Callable[[Any], Any],
    tokens_BS: np.ndarray,
    device: str = "cpu",
    loss_of: Callable[[Any, Any], Any] | None = None,
) -> Callable[[], None]:
    """A training step in torch: cross entropy, clipping, fused AdamW.

    Args:
      cfg: of the run; its optimizer's settings are used.
      model: whose parameters are trained, on the device.
      logits_of: takes token ids [B, T] on the device, gives logits [B, T, V].
      tokens_BS: rows of T + 1 tokens.
      device: of torch.
      loss_of: takes logits [B * T, V] and targets [B * T]; torch's cross entropy if
        not given.
    """
    import torch

    loss_of = loss_of or torch.nn.functional.cross_entropy

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.optim.peak_lr,
        betas=(cfg.optim.b1, cfg.optim.b2),
        eps=cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
        fused=True,
    )
    tokens = torch.from_numpy(tokens_BS.astype(np.int64)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def step() -> None:
        logits = logits_of(inputs).flatten(0, 1)
        loss = loss_of(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
