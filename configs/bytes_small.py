"""Bytes of the Python standard library, 0.64 M parameters: minutes on two CPU cores.

A pass of a model this small costs the number of its operations, and not the reading of
its weights: what drafting cannot make faster. The corpus is the one that
`make quickstart` prepares.

python -m mtp_jax train --config=configs/bytes_small.py --workdir=runs/bytes_small
"""

from mtp_jax.config import default


def get_config():
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=96,
        num_layers=6,
        n_future_tokens=4,
        num_query_heads=3,
        num_kv_heads=1,
        d_head=32,
        d_ff=256,
    )
    c.data.update(sources=("data/stdlib",), seq_len=320, batch_size=2)
    c.optim.update(peak_lr=5e-3, warmup_steps=100)
    c.train.steps = 4500
    c.checkpoint.update(every=1500, keep_latest=2)
    c.eval.update(every=1500, batches=64, sample_tokens=96)
    c.log.every = 150
    return c
