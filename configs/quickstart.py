"""The default run: bytes of the Python standard library, minutes on two CPU cores.

A model that drafting makes faster though it is small: few layers that are wide, so that
a pass is reading weights rather than starting operations, and heads of one matrix each
with a bias by the token before, which cost a pass next to nothing.

make quickstart
"""

from mtp_jax.config import default


def get_config():
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=256,
        num_layers=3,
        n_future_tokens=4,
        num_query_heads=4,
        num_kv_heads=1,
        d_head=64,
        d_ff=768,
    )
    c.heads.update(kind="linear", markov_rank=64)
    c.compute.remat = "none"
    c.data.update(sources=("data/stdlib",), seq_len=320, batch_size=2)
    c.optim.update(peak_lr=4e-3, warmup_steps=100)
    c.train.steps = 3000
    c.checkpoint.update(every=1000, keep_latest=2)
    c.eval.update(every=1000, batches=64, sample_tokens=96)
    c.log.every = 150
    return c
