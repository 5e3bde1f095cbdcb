"""Llama 3.1 with extra heads on its layers: `SIZE-nN`, `SIZE-nN-long`, `SIZE-nN-heads`.

python -m mtp_jax plan --config=configs/llama.py:8b-n4 --topology=v5e:4x4
python -m mtp_jax plan --config=configs/llama.py:8b-n4-long --topology=v5p:4x4x4
python -m mtp_jax plan --config=configs/llama.py:70b-n4 --topology=v5p:8x8x8
python -m mtp_jax plan --config=configs/llama.py:405b-n4 --topology=2xv5p:8x8x8 \
    --config.mesh.replica=2 --config.data.batch_size=256

Unlike the models of the paper they grow with n: trunk and head 1 keep all layers of
arXiv:2407.21783, table 3, and each further head is one more, so that a trained model's
weights fit. `-long` trains on rows of 131,072 tokens, each split over 16 devices;
`-heads` trains the further heads alone, as recipe heads of configs/finetune.py does.
"""

from mtp_jax.config import default
from mtp_jax.errors import UserError

# name: width, layers, query heads, feed-forward width
SHAPES = {
    "8b": (4096, 32, 32, 14_336),
    "70b": (8192, 80, 64, 28_672),
    "405b": (16_384, 126, 128, 53_248),
}
# name: rows of a batch, tokens of a row, mesh beside fsdp. Of 8b a row on each of 16
# chips; of 70b four, of 405b two on each of 64 groups of eight chips, which split heads
# and widths: shards of the model's width are to be at least 128 wide, as compilers make
# all-reduces, which send twice as much, of gathers of narrower ones.
RECIPES = {
    "8b": (16, 4096, {}),
    "70b": (256, 8192, {"tensor": 8}),
    "405b": (128, 8192, {"tensor": 8}),
}


def get_config(argument: str = "8b-n4"):
    size, _, rest = argument.partition("-n")
    n, _, how = rest.partition("-")
    known = size in SHAPES and n.isdecimal() and how in ("", "long", "heads")
    if not known or int(n) < 1 + (how == "heads") or argument.endswith("-"):
        raise UserError(
            f"configs/llama.py:{argument} is not SIZE-nN, such as 8b-n4, SIZE-nN-long "
            f"or SIZE-nN-heads; the sizes are {', '.join(SHAPES)}."
        )
    d_model, num_layers, num_heads, d_ff = SHAPES[size]
    batch_size, seq_len, mesh = RECIPES[size]
    if how == "long":
        batch_size, seq_len, mesh = 4, 131_072, mesh | {"sequence": 16}
    c = default()
    c.model.update(
        vocab_size=128_256,
        d_model=d_model,
        num_layers=num_layers - 1 + int(n),
        n_future_tokens=int(n),
        num_query_heads=num_heads,
        num_kv_heads=8,
        d_head=128,
        d_ff=d_ff,
        rope_theta=500_000.0,
        compute_dtype="bfloat16",
    )
    c.data.update(seq_len=seq_len, batch_size=batch_size)
    c.mesh.update(mesh)
    if how == "heads":
        c.heads.norm = "own"
        c.optim.update(
            peak_lr=1e-3,
            decays=(("heads", 0.0), ("norms", 0.0)),
            frozen=("trunk", "embedding", "unembedding"),
        )
        c.loss.head_weights = (0.0,) + (1.0,) * (int(n) - 1)
    return c
