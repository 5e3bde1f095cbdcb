"""Llama 3.1 8B with extra heads on its 32 layers: `8b-nN`, or `8b-nN-heads`.

python -m mtp_jax plan --config=configs/llama.py:8b-n4 --topology=v5e:4x4

Unlike the models of the paper it grows with n: trunk and head 1 keep the 32 layers of
arXiv:2407.21783, table 3, and each further head is one more, so that a trained model's
weights fit. The batch is one row of 4096 tokens on each of 16 chips. `-heads` trains
the further heads alone, as the recipe heads of configs/finetune.py does.
"""

from mtp_jax.config import default
from mtp_jax.errors import UserError


def get_config(argument: str = "8b-n4"):
    frozen = argument.endswith("-heads")
    name, separator, n = argument.removesuffix("-heads").rpartition("-n")
    if name != "8b" or not separator or not n.isdecimal() or int(n) < 1 + frozen:
        raise UserError(
            f"configs/llama.py:{argument} is not 8b-nN, such as 8b-n4, or 8b-n4-heads."
        )
    c = default()
    c.model.update(
        vocab_size=128_256,
        d_model=4096,
        num_layers=31 + int(n),
        n_future_tokens=int(n),
        num_query_heads=32,
        num_kv_heads=8,
        d_head=128,
        d_ff=14_336,
        rope_theta=500_000.0,
        compute_dtype="bfloat16",
    )
    c.data.update(seq_len=4096, batch_size=16)
    if frozen:
        c.heads.norm = "own"
        c.optim.update(
            peak_lr=1e-3,
            decays=(("heads", 0.0), ("norms", 0.0)),
            frozen=("trunk", "embedding", "unembedding"),
        )
        c.loss.head_weights = (0.0,) + (1.0,) * (int(n) - 1)
    return c
