"""Every model of the paper, with any number of heads: `SHAPE-nN`.

python -m mtp_jax train --config=configs/paper.py:7b-n4 --workdir=runs/7b-n4 \
    --config.data.sources=data/code

Shapes and settings are those of arXiv:2404.19737, tables S13 and S14; feed-forward
widths follow Llama: 8/3 of the width, rounded up to a multiple of 256. The names of
the first seven shapes count parameters without the embeddings, the others all.
"""

from mtp_jax.config import default
from mtp_jax.errors import UserError

# name: width, layers (heads included), attention heads
SHAPES = {
    "1m": (128, 5, 4),
    "3m": (256, 4, 8),
    "10m": (384, 6, 8),
    "30m": (512, 10, 8),
    "100m": (768, 14, 12),
    "300m": (1024, 25, 16),
    "1b": (1536, 36, 24),
    "0.3b": (1024, 18, 16),
    "0.6b": (1280, 27, 20),
    "1.3b": (2048, 24, 16),
    "3b": (2560, 36, 20),
    "7b": (4096, 32, 32),
    "7b-bytes": (4096, 32, 32),
    "13b": (5120, 40, 40),
}

# name: batch in 2^20 tokens, steps, warm-up, peak rate, row, decay ratio
_SYNTHETIC = (0.25, 100_000, 2000, 1e-4, 2048, 0.03)
_SCALING = (8, 10_850, 1000, 3e-4, 4096, 0.03)
RECIPES = {
    **dict.fromkeys(("1m", "3m", "10m", "30m", "100m", "300m", "1b"), _SYNTHETIC),
    **dict.fromkeys(("0.3b", "0.6b", "1.3b", "3b"), _SCALING),
    "7b": (8, 25_000, 2000, 3e-4, 4096, 0.03),
    "7b-bytes": (12, 25_000, 2000, 3e-4, 8192, 0.03),
    "13b": (8, 25_000, 1000, 3e-4, 4096, 0.03),
}


def get_config(argument: str = "0.3b-n4"):
    name, separator, n = argument.rpartition("-n")
    if name not in SHAPES or not separator or not n.isdecimal():
        raise UserError(
            f"configs/paper.py:{argument} is not SHAPE-nN such as 7b-n4; the shapes "
            f"are {', '.join(SHAPES)}."
        )
    d_model, num_layers, num_heads = SHAPES[name]
    batch, steps, warmup_steps, peak_lr, seq_len, decay_ratio = RECIPES[name]
    c = default()
    c.model.update(
        vocab_size=256 if name.endswith("bytes") else 32_000,
        d_model=d_model,
        num_layers=num_layers,
        n_future_tokens=int(n),
        num_query_heads=num_heads,
        num_kv_heads=num_heads,
        d_head=d_model // num_heads,
        d_ff=-(-8 * d_model // 3 // 256) * 256,
        compute_dtype="bfloat16",
    )
    c.data.update(seq_len=seq_len, batch_size=int(batch * 2**20) // seq_len)
    c.optim.update(peak_lr=peak_lr, warmup_steps=warmup_steps, decay_ratio=decay_ratio)
    c.train.steps = steps
    return c
