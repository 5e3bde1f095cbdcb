"""The same shape with one head in transformers and torch, for the ratio to ours.

bfloat16 with float32 weights (autocast), SDPA, `torch.compile`, fused AdamW.

python -m benchmarks.gpu.torch_training --shape=1.3b
"""

import sys
from typing import Any

import numpy as np

from benchmarks.gpu.results import Results, installed, median_s, parsed, shape
from benchmarks.timing import script
from benchmarks.torch_baseline import torch_step
from mtp_jax.config import Config
from mtp_jax.interop.hf_llama import new_llama

_ROUNDS = 10


@script
def main(argv: list[str]) -> int:
    """Adds one result, or says why there is none."""
    args = parsed(argv, "One training step in torch.", shape="1.3b")
    what = {"shape": args.shape, "n": 1}
    if not installed("torch", "transformers"):
        Results(args.out, args.rehearse, "none").add(
            "torch_training", **what, error="torch or transformers is not installed"
        )
        return 0
    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "cpu"
    results = Results(args.out, args.rehearse, name)
    with results.failures_told("torch_training", **what):
        cfg = shape(args.shape, 1, args.rehearse)
        seconds = median_s(_step(cfg, gpu, compile_it=not args.rehearse), _ROUNDS)
        positions = cfg.data.batch_size * cfg.data.seq_len
        results.add(
            "torch_training",
            **what,
            positions=positions,
            step_s=seconds,
            tokens_per_s=positions / seconds,
            peak_bytes=torch.cuda.max_memory_allocated() if gpu else None,
        )
    return 0


def _step(cfg: Config, gpu: bool, compile_it: bool) -> Any:
    import torch

    device = "cuda" if gpu else "cpu"
    torch.set_float32_matmul_precision("high")
    model = new_llama(
        cfg.model, cfg.data.seq_len, use_cache=False, attn_implementation="sdpa"
    ).to(device)
    model.train()
    loss_of = torch.nn.functional.cross_entropy
    if compile_it:
        # Layer by layer: the whole model takes minutes, for the same kernels.
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(loss_of)
    size = (cfg.data.batch_size, cfg.data.seq_len + 1)
    drawn_BS = np.random.default_rng(0).integers(cfg.model.vocab_size, size=size)

    def logits_of(ids: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return model(input_ids=ids).logits.float()

    return torch_step(cfg, model, logits_of, drawn_BS, device, loss_of)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
