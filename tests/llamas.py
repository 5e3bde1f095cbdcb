"""The real small Llama of the shared data, and models that share its weights."""

import dataclasses
import pathlib

import numpy as np
import pytest
from runs import SHARED

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data.tokenizer import ByteTokenizer

FOLDER = SHARED / "stories260K"
MODEL = ModelConfig(
    vocab_size=512,
    d_model=64,
    num_layers=5,
    n_future_tokens=1,
    num_query_heads=8,
    num_kv_heads=4,
    d_head=8,
    d_ff=172,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tie_embeddings=True,
)
# Name, rows and columns of each weight of a layer, in the order of the file.
_LAYERS = (
    ("norm_attention", 64, None), ("w_q", 64, 64), ("w_k", 32, 64), ("w_v", 32, 64),
    ("w_o", 64, 64), ("norm_mlp", 64, None), ("w_gate", 172, 64), ("w_down", 64, 172),
    ("w_up", 172, 64),
)  # fmt: skip


class Ids(ByteTokenizer):
    """A stand-in for a tokenizer of 512 ids, whose texts are not asked for."""

    vocab_size = 512
    bos_id = 1
    eos_id = 2


def stories_weights():
    """The file's matrices by name, float32 [layers, out, in]; skips without it."""
    path = FOLDER / "stories260K.bin"
    if not path.exists():
        pytest.skip(f"{FOLDER} is not there")
    values = np.frombuffer(pathlib.Path(path).read_bytes()[28:], "<f4")
    found = {"w_embedding": values[: 512 * 64].reshape(512, 64)}
    at = 512 * 64
    for name, rows, columns in _LAYERS:
        shape = (5, rows) if columns is None else (5, rows, columns)
        found[name] = values[at : at + np.prod(shape)].reshape(shape)
        at += int(np.prod(shape))
    found["norm"] = values[at : at + 64]
    return found


def half_split(w_LOI):
    """Rows of each head in the order of pairs (j, j + K/2) instead of (2j, 2j + 1)."""
    heads = w_LOI.reshape(5, -1, 8, 64)
    return heads[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]


def stories_params():
    """Parameters of `MODEL`, NumPy float32."""
    w = stories_weights()

    def layers(which):
        q, k, v = (
            half_split(w["w_q"]),
            half_split(w["w_k"]),
            w["w_v"].reshape(5, 4, 8, 64),
        )
        return {
            "norm_attention": w["norm_attention"][which],
            "norm_mlp": w["norm_mlp"][which],
            "w_q": np.moveaxis(q, -1, 1)[which],
            "w_k": np.moveaxis(k, -1, 1)[which],
            "w_v": np.moveaxis(v, -1, 1)[which],
            "w_o": np.swapaxes(w["w_o"], 1, 2).reshape(5, 8, 8, 64)[which],
            "mlp": {
                name: np.swapaxes(w[name], 1, 2)[which]
                for name in ("w_gate", "w_up", "w_down")
            },
        }  # fmt: skip

    return {
        "w_embedding": w["w_embedding"],
        "norm": w["norm"],
        "trunk": layers(slice(0, 4)),
        "heads": layers(slice(4, 5)),
    }


def stories_in_transformers():
    """Transformers' Llama with the file's weights, by names of its own."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    w = stories_weights()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=172, num_hidden_layers=5,
            num_attention_heads=8, num_key_value_heads=4, vocab_size=512,
            max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": w["w_embedding"],
        "lm_head.weight": w["w_embedding"],
        "model.norm.weight": w["norm"],
    }
    for i in range(5):
        of_layer = {
            "input_layernorm": w["norm_attention"][i],
            "self_attn.q_proj": half_split(w["w_q"])[i].reshape(64, 64),
            "self_attn.k_proj": half_split(w["w_k"])[i].reshape(32, 64),
            "self_attn.v_proj": w["w_v"][i],
            "self_attn.o_proj": w["w_o"][i],
            "post_attention_layernorm": w["norm_mlp"][i],
            "mlp.gate_proj": w["w_gate"][i],
            "mlp.up_proj": w["w_up"][i],
            "mlp.down_proj": w["w_down"][i],
        }
        for name, x in of_layer.items():
            state[f"model.layers.{i}.{name}.weight"] = x
    arrays = {k: torch.tensor(np.array(x)) for k, x in state.items()}
    llama.load_state_dict(arrays, strict=True)
    return llama.eval()


def restored(cfg, params, mesh, tokenizer=None, seq_len=512):
    """A restored model of parameters that are on a mesh."""
    data = dataclasses.replace(DataConfig(), seq_len=seq_len)
    config = Config(model=cfg, data=data)
    return Restored(config, params, mesh, 7, tokenizer or Ids())
