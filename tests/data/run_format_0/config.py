from mtp_jax.config import default


def get_config():
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=16,
        num_layers=3,
        n_future_tokens=2,
        num_query_heads=2,
        num_kv_heads=1,
        d_head=8,
        d_ff=32,
    )
    c.data.update(sources=("corpus",), seq_len=32, batch_size=4)
    c.optim.update(peak_lr=1e-2, warmup_steps=4)
    c.train.update(steps=30, compilation_cache="")
    c.checkpoint.update(every=20, keep_latest=2)
    c.eval.update(every=20, batches=2, sample_tokens=8, sample_prompt_tokens=8)
    c.log.update(every=1, tensorboard=False)
    return c
