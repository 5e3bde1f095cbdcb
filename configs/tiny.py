"""A model of 0.1 million parameters that trains in seconds; the tests' own.

python -m mtp_jax prepare --input=mtp_jax --output=data/tiny --heldout=0.2
python -m mtp_jax train --config=configs/tiny.py --workdir=runs/tiny
"""

from mtp_jax.config import default


def get_config():
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=64,
        num_layers=4,
        n_future_tokens=3,
        num_query_heads=4,
        num_kv_heads=2,
        d_head=16,
        d_ff=128,
    )
    c.data.update(sources=("data/tiny",), seq_len=64, batch_size=8)
    c.optim.update(peak_lr=1e-2, warmup_steps=10)
    c.train.steps = 50
    c.checkpoint.every = 20
    c.eval.update(every=25, batches=2, sample_tokens=32, sample_prompt_tokens=16)
    c.log.every = 5
    return c
