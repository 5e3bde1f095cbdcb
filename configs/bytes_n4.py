"""Bytes of the Python standard library, 4 heads: half an hour on two CPU cores.

Made for decoding: what drafting gains is bounded by the share of the trunk in what a
pass reads, and matrices of this width keep both cores busy with few tokens. The corpus
is the one that `make quickstart` prepares.

python -m mtp_jax train --config=configs/bytes_n4.py --workdir=runs/bytes_n4
"""

from mtp_jax.config import default


def get_config():
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=256,
        num_layers=16,
        n_future_tokens=4,
        num_query_heads=2,
        num_kv_heads=1,
        d_head=128,
        d_ff=1024,
    )
    c.data.update(sources=("data/stdlib",), seq_len=512, batch_size=2)
    c.optim.update(peak_lr=1e-3, warmup_steps=200)
    c.train.steps = 2400
    c.checkpoint.update(every=800, keep_latest=2)
    c.eval.update(every=2400, batches=32, sample_tokens=96)
    c.log.every = 50
    return c
