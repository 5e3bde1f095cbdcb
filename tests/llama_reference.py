"""A Llama and its heads in NumPy, to compare exported folders with the model.

It reads tensors by the names of Hugging Face, and shares nothing with the model but the
formulas (arXiv:2302.13971, section 2.2).

Axes: T positions, D model width, H query heads, G key-value heads, K head width,
V vocabulary.
"""

from typing import Any

import numpy as np

from mtp_jax.interop.hf_rope import rope_from_hf
from mtp_jax.model.rope import frequencies

Arrays = dict[str, np.ndarray]


def norm(x_TD: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm, float64 [T, D]."""
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + eps) * scale_D


def layer(
    x_TD: np.ndarray, w: Arrays, prefix: str, about: dict[str, Any]
) -> np.ndarray:
    """x after a transformer layer, float64 [T, D].

    Args:
      x_TD: its input, of one text.
      w: tensors, float64.
      prefix: of the names of the layer's.
      about: the content of config.json.
    """
    h, g, k = (
        about[name]
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    eps, t = about["rms_norm_eps"], len(x_TD)

    def of(name: str) -> np.ndarray:
        return w[f"{prefix}{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ of(name).T + w.get(f"{prefix}{name}.bias", 0.0)

    a_TD = norm(x_TD, of("input_layernorm"), eps)
    q_THK = _turned(linear(a_TD, "self_attn.q_proj").reshape(t, h, k), about)
    k_TGK = _turned(linear(a_TD, "self_attn.k_proj").reshape(t, g, k), about)
    v_TGK = linear(a_TD, "self_attn.v_proj").reshape(t, g, k)
    read_THK = np.empty_like(q_THK)
    seen_TT = np.tril(np.ones((t, t), bool))
    for head in range(h):
        of_group = head // (h // g)
        scores_TT = q_THK[:, head] @ k_TGK[:, of_group].T / np.sqrt(k)
        scores_TT = np.where(seen_TT, scores_TT, -np.inf)
        p_TT = np.exp(scores_TT - scores_TT.max(-1, keepdims=True))
        read_THK[:, head] = p_TT @ v_TGK[:, of_group] / p_TT.sum(-1, keepdims=True)
    x_TD = x_TD + linear(read_THK.reshape(t, h * k), "self_attn.o_proj")
    b_TD = norm(x_TD, of("post_attention_layernorm"), eps)
    inner_TF = silu(linear(b_TD, "mlp.gate_proj")) * linear(b_TD, "mlp.up_proj")
    return x_TD + linear(inner_TF, "mlp.down_proj")


def streams(ids_T: np.ndarray, w: Arrays, about: dict[str, Any]) -> list[np.ndarray]:
    """The input of each layer of a model, and the last output, [T, D] each."""
    found = [w["model.embed_tokens.weight"][ids_T]]
    for i in range(about["num_hidden_layers"]):
        found.append(layer(found[-1], w, f"model.layers.{i}.", about))
    return found


def silu(x: np.ndarray) -> np.ndarray:
    """x times its logistic function."""
    return x / (1 + np.exp(-x))


def _turned(x_THK: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """x with rotary positions, halves of a head as pairs (arXiv:2104.09864)."""
    k = x_THK.shape[-1]
    theta, rope = rope_from_hf(about, 0.0, about["max_position_embeddings"], "config")
    angle = np.arange(len(x_THK))[:, None, None] * frequencies(rope, k, theta)
    x_THK = x_THK * rope.on_queries_and_keys
    first, second = x_THK[..., : k // 2], x_THK[..., k // 2 :]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )


def all_logits(
    ids_T: np.ndarray, llama: Arrays, heads: Arrays, about: dict[str, Any]
) -> list[np.ndarray]:
    """Logits of head 1 and of each exported head, float64 [T, V], in NumPy.

    Args:
      ids_T: one text.
      llama, heads: tensors of the folder, by name.
      about: the content of config.json.
    """
    wide = {name: x.astype(np.float64) for name, x in (llama | heads).items()}
    found_TD = streams(ids_T, wide, about)
    eps, scale_D = about["rms_norm_eps"], wide["model.norm.weight"]
    table_VD = wide.get("lm_head.weight", wide["model.embed_tokens.weight"])
    found = [norm(found_TD[-1], scale_D, eps) @ table_VD.T]
    of = about.get("mtp_heads", {})
    kind = of.get("kind")
    trunk_TD = found_TD[-1]
    if kind in ("parallel", "causal"):
        trunk_TD = found_TD[about["num_hidden_layers"] - of["layers"]]
    stream_TD = found_TD[-1]
    for number in range(of.get("n_future_tokens", 1) - 1):
        prefix = f"heads.{number}."
        own_D = wide.get(f"{prefix}norm.weight", scale_D)
        if kind == "residual":
            hidden_TD = norm(trunk_TD, own_D, eps)
            for i in range(of["layers"]):
                w, b = (wide[f"{prefix}blocks.{i}.{x}"] for x in ("weight", "bias"))
                hidden_TD = hidden_TD + silu(hidden_TD @ w.T + b)
        elif kind == "linear":
            stream_TD = trunk_TD @ wide[f"{prefix}map.weight"].T
        else:
            stream_TD = trunk_TD if kind == "parallel" else stream_TD
            for i in range(of["layers"]):
                name = f"{prefix}layers.{i}."
                stream_TD = layer(stream_TD, wide, name, about)
        if kind != "residual":
            hidden_TD = norm(stream_TD, own_D, eps)
        logits_TV = hidden_TD @ wide.get(f"{prefix}unembedding.weight", table_VD).T
        if "markov_in.weight" in wide:
            before_T = np.append(ids_T[number + 1 :], np.zeros(number + 1, int))
            logits_TV += (
                wide["markov_in.weight"][before_T] @ wide["markov_out.weight"].T
            )
        found.append(logits_TV)
    return found
