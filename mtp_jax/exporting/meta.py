"""Meta's layout of its multi-token models: consolidated.pth and params.json.

Layers of the trunk and head 1 are `layers.*`, heads 2 to n `extra_heads.*`, all with
one norm and one output matrix; queries and keys are in the order of neighbouring rotary
pairs (arXiv:2404.19737; the checkpoints of facebook/multi-token-prediction).
"""

import dataclasses
import pathlib

import numpy as np
from etils import epath

from mtp_jax.data.tokenizer import save_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.exporting import tensors
from mtp_jax.exporting.check import check_as_import
from mtp_jax.exporting.fast_llm import require_plain_heads
from mtp_jax.exporting.parts import Arrays, Parts
from mtp_jax.interop.hf_llama import interleaved
from mtp_jax.interop.meta import to_meta
from mtp_jax.storage import write_json

_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def write_meta(parts: Parts, folder: pathlib.Path, positions: int) -> list[str]:
    """Writes the folder and reads it again; returns what it does not hold.

    Raises:
      UserError: heads that the format does not know, or torch is not installed.
      RunFailed: what was read is not what was to be written.
    """
    require_plain_heads(parts, "meta")
    if parts.cfg.heads.norm == "own" and _norms_differ(parts):
        raise UserError(
            "--format=meta has one norm for all heads, and config.heads.norm is own; "
            "choose hf or fastllm."
        )
    try:
        import torch
    except ImportError:
        raise UserError(
            "--format=meta is a file of torch, which is not installed; pip install "
            "torch."
        ) from None
    arrays = meta_tensors(parts)
    state = {
        name: torch.from_numpy(x.astype(np.float32)).to(getattr(torch, x.dtype.name))
        for name, x in arrays.items()
    }
    torch.save(state, folder / "consolidated.pth")
    # Tied tables are written as two.
    untied = dataclasses.replace(parts.cfg, tie_embeddings=False)
    write_json(folder / "params.json", to_meta(untied, positions))
    lost = []
    if parts.model.tokenizer.kind == "sentencepiece":
        save_tokenizer(parts.model.tokenizer, epath.Path(folder))
    else:
        lost = ["the tokenizer, which is no SentencePiece model"]
    saved = torch.load(folder / "consolidated.pth", weights_only=True)
    found = {
        name: x.float().numpy().astype(arrays[name].dtype) for name, x in saved.items()
    }
    tensors.compare(folder / "consolidated.pth", arrays, found)
    check_as_import(parts, folder)
    return lost


def meta_tensors(parts: Parts) -> Arrays:
    """The tensors of a model under Meta's names."""
    llama = parts.llama
    table = llama["model.embed_tokens.weight"]
    found = {
        "tok_embeddings.weight": table,
        "norm.weight": llama["model.norm.weight"],
        "output.weight": llama.get("lm_head.weight", table),
    }
    for name, x in (llama | parts.heads).items():
        head = name.startswith("heads.")
        if not (head and ".layers.0." in name) and not name.startswith("model.layers."):
            continue
        _, number, rest = name.removeprefix("model.").split(".", 2)
        rest = rest.removeprefix("layers.0.").removesuffix(".weight")
        counts = {"self_attn.q_proj": parts.plain.num_query_heads}
        counts["self_attn.k_proj"] = parts.plain.num_kv_heads
        if rest in counts:
            x = interleaved(x, counts[rest])
        place = "extra_heads" if head else "layers"
        found[f"{place}.{number}.{_LAYER[rest]}.weight"] = x
    return found


def _norms_differ(parts: Parts) -> bool:
    scale_D = parts.llama["model.norm.weight"]
    own = [x for name, x in parts.heads.items() if name.endswith(".norm.weight")]
    own = [x for x in own if x.shape == scale_D.shape]
    return any(not np.array_equal(x, scale_D) for x in own)
