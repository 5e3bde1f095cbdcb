"""7B models with heads of every kind, by name.

python -m mtp_jax train --config=configs/head_kinds.py:s4-causal --workdir=runs/causal \
    --config.data.sources=data/code

s4-...: the rows of the paper's comparison (arXiv:2404.19737, table S4): 4 heads on 32
layers, heads included. A linear head is no layer, so that model keeps 32 in its trunk.
s4-parallel-plus3 has a trunk as deep as without heads.

deepseek: one serial module, as DeepSeek-V3 (arXiv:2412.19437, sections 2.2 and 4.2): it
weighs 0.3; the trunk is dense here. repeated: three modules of the same weights, with
one cache in decoding. medusa: four residual heads, each with an unembedding of its own
(arXiv:2401.10774, section 2.1). markov: the paper's parallel heads, and a bias of rank
256 by the token before.
"""

from typing import Any

from mtp_jax.config import default
from mtp_jax.errors import UserError

# name: layers that are counted, heads, the section of heads, weights of their losses
_MODELS: dict[str, tuple[int, int, dict[str, Any], tuple[float, ...]]] = {
    "s4-next-token": (32, 1, {}, ()),
    "s4-linear": (32, 4, {"kind": "linear"}, ()),
    "s4-anticausal": (32, 4, {"kind": "anticausal"}, ()),
    "s4-causal": (32, 4, {"kind": "causal"}, ()),
    "s4-parallel": (32, 4, {}, ()),
    "s4-parallel-plus3": (35, 4, {}, ()),
    "deepseek": (33, 2, {"kind": "serial"}, (1.0, 0.3)),
    "repeated": (
        33,
        4,
        {"kind": "serial", "shared": True, "draft_cache": "shared"},
        (1.0, 0.1, 0.1, 0.1),
    ),
    "medusa": (32, 5, {"kind": "residual", "unembedding": "own"}, ()),
    "markov": (32, 4, {"markov_rank": 256}, ()),
}


def get_config(name: str = "s4-parallel"):
    if name not in _MODELS:
        raise UserError(
            f"configs/head_kinds.py:{name} is unknown; the names are "
            f"{', '.join(_MODELS)}."
        )
    num_layers, n, heads, weights = _MODELS[name]
    c = default()
    c.model.update(
        vocab_size=32_000,
        d_model=4096,
        num_layers=num_layers,
        n_future_tokens=n,
        num_query_heads=32,
        num_kv_heads=32,
        d_head=128,
        d_ff=11_008,
        compute_dtype="bfloat16",
    )
    c.heads.update(**heads)
    c.loss.head_weights = weights
    c.data.update(seq_len=4096, batch_size=2048)
    c.optim.update(peak_lr=3e-4, warmup_steps=2000)
    c.train.steps = 25_000  # 200 billion tokens
    return c
