"""Head 1 for llama.cpp: a file of its format GGUF, as an architecture `llama`.

Names: the package gguf, of llama.cpp. Queries and keys are in the order of neighbouring
rotary pairs, as Meta has them.
"""

import pathlib
from typing import Any

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.exporting import tensors
from mtp_jax.exporting.check import check_as_import
from mtp_jax.exporting.gguf_tokenizer import add_tokenizer
from mtp_jax.exporting.parts import Arrays, Parts
from mtp_jax.interop.hf_llama import interleaved

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_FILE = "model.gguf"


def write_gguf(parts: Parts, folder: pathlib.Path, positions: int) -> None:
    """Writes model.gguf and reads it again.

    Raises:
      UserError: the package gguf is not installed, or the tokenizer cannot be written.
      RunFailed: what was read is not what was to be written.
    """
    gguf = _library()
    cfg = parts.plain
    writer = gguf.GGUFWriter(str(folder / _FILE), "llama")
    writer.add_name(f"mtp_jax-{parts.model.step}")
    writer.add_context_length(positions)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.num_query_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.d_head)
    writer.add_value_length(cfg.d_head)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.d_head)
    writer.add_vocab_size(cfg.vocab_size)
    kinds = gguf.LlamaFileType
    is_wide = cfg.param_dtype == "float32"
    writer.add_file_type(kinds.ALL_F32 if is_wide else kinds.MOSTLY_BF16)
    add_tokenizer(gguf, writer, parts.model.tokenizer, cfg.vocab_size)
    arrays = gguf_tensors(parts)
    for name, x in arrays.items():
        if x.dtype == np.float32:
            writer.add_tensor(name, x)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, x.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(str(folder / _FILE))
    found = {
        x.name: np.array(x.data)
        .view(arrays[x.name].dtype)
        .reshape(arrays[x.name].shape)
        for x in read.tensors
    }
    tensors.compare(folder / _FILE, arrays, found)
    check_as_import(parts, folder / _FILE)


def gguf_tensors(parts: Parts) -> Arrays:
    """The tensors of trunk and head 1 under the names of GGUF; norms are float32."""
    found: Arrays = {}
    for name, x in parts.llama.items():
        if name in _TOP:
            found[_TOP[name]] = x
            continue
        _, _, number, rest = name.removesuffix(".weight").split(".", 3)
        counts = {"self_attn.q_proj": parts.plain.num_query_heads}
        counts["self_attn.k_proj"] = parts.plain.num_kv_heads
        if rest in counts:
            x = interleaved(x, counts[rest])
        found[f"blk.{number}.{_LAYER[rest]}.weight"] = x
    return {
        name: x.astype(np.float32) if x.ndim == 1 else np.ascontiguousarray(x)
        for name, x in found.items()
    }


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "--format=gguf needs the package gguf; pip install 'mtp-jax[interop]'."
        ) from None
    return gguf
