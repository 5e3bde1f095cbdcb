"""A model's trunk and head 1 as Hugging Face's Llama: an ordinary transformer."""

from typing import Any

import numpy as np

from mtp_jax.config import ModelConfig


def llama_of(cfg: ModelConfig, params: Any, positions: int) -> Any:
    """LlamaForCausalLM with the same weights, float32, ready to generate.

    Args:
      cfg: of the model.
      params: as `model_builder` makes them, NumPy arrays.
      positions: the longest text.
    """
    import torch

    llama = new_llama(cfg.keep_heads(1), positions)
    weights = llama_weights(params)
    arrays = {k: torch.tensor(np.array(w, np.float32)) for k, w in weights.items()}
    llama.load_state_dict(arrays, strict=True)
    return llama.eval()


def new_llama(cfg: ModelConfig, positions: int, **changed: Any) -> Any:
    """LlamaForCausalLM of the shape of a model of one head, its weights random.

    Args:
      cfg: of the model; the output matrix is untied, as one that is given may differ.
      positions: the longest text.
      changed: other arguments of LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    of = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_query_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.d_head,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**of, **changed))


def llama_weights(params: Any) -> dict[str, np.ndarray]:
    """The weights of trunk and head 1 under the names of Hugging Face's Llama."""
    weights = {
        "model.embed_tokens.weight": params["w_embedding"],
        "model.norm.weight": params["norm"],
        "lm_head.weight": params.get("w_unembedding", params["w_embedding"]),
    }
    trunk = [(params["trunk"], i) for i in range(len(params["trunk"]["w_q"]))]
    for number, (stacked, i) in enumerate([*trunk, (params["heads"], 0)]):
        d = stacked["w_q"].shape[1]
        mlp = stacked["mlp"]
        weights |= {
            f"model.layers.{number}.{name}.weight": x
            for name, x in {
                "input_layernorm": stacked["norm_attention"][i],
                "self_attn.q_proj": stacked["w_q"][i].reshape(d, -1).T,
                "self_attn.k_proj": stacked["w_k"][i].reshape(d, -1).T,
                "self_attn.v_proj": stacked["w_v"][i].reshape(d, -1).T,
                "self_attn.o_proj": stacked["w_o"][i].reshape(-1, d).T,
                "post_attention_layernorm": stacked["norm_mlp"][i],
                "mlp.gate_proj": mlp["w_gate"][i].T,
                "mlp.up_proj": mlp["w_up"][i].T,
                "mlp.down_proj": mlp["w_down"][i].T,
            }.items()
        }
    return weights


def interleaved(rows_XI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of Meta's and llama.cpp's rotary pairs.

    Those turn neighbours (2 j, 2 j + 1) of a head, these halves (j, j + K / 2).
    """
    halves = rows_XI.reshape(heads, 2, -1, *rows_XI.shape[1:])
    return np.ascontiguousarray(np.swapaxes(halves, 1, 2)).reshape(rows_XI.shape)
