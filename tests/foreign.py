"""Small folders in formats of other people, and their forward pass in float64.

Written from the formats' definitions, and sharing nothing with the package.

Axes: T time, D width, F feed-forward width, H query heads, G key-value heads, K head
width, V vocabulary.
"""

import json
import math
import struct

import numpy as np

V, D, F, LAYERS, H, G = 256, 16, 24, 3, 4, 2
_SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "transformers_version": "5.24.0",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# In files of today and of before.
CONFIGS = {
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 30.0,
        "rope_scaling": _LLAMA3,
    },
    "mistral": {
        **_SIZES,
        "model_type": "mistral",
        "head_dim": 6,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": False,
        "rope_theta": 30.0,
        "rope_scaling": _YARN,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
    },
    "phi3": {
        **_SIZES,
        "model_type": "phi3",
        "rope_theta": 1000.0,
        "sliding_window": 7,
        "original_max_position_embeddings": 64,
        "rope_scaling": None,
    },
    "olmo2": {
        **_SIZES,
        "model_type": "olmo2",
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 100.0,
        },
    },
}


def width(config):
    return config.get("head_dim") or D // H


def tensors_of(config, seed=0):
    """Random tensors of a config, by the names of its family, float32."""
    rng, kind, k = np.random.default_rng(seed), config["model_type"], width(config)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{x}": s for x, s in _of_layer(config, k).items()}
    if kind == "mtp_llama":
        n = config["prediction_heads"]
        for i in range(n - 1):
            of_layer = _of_layer(config, k).items()
            shapes |= {f"model.mtp_heads.{i}.{x}": s for x, s in of_layer}
        shapes |= {f"model.mtp_norms.{i}.weight": (D,) for i in range(n)}
        del shapes["model.norm.weight"]
    found = {}
    for name, shape in shapes.items():
        x = 0.3 * rng.normal(size=shape)
        is_norm = name.endswith("weight") and len(shape) == 1
        found[name] = (1 + x if is_norm else x).astype(np.float32)
    return found


def _of_layer(config, k):
    kind = config["model_type"]
    a = "self_attn."
    found = {
        f"{a}q_proj.weight": (H * k, D),
        f"{a}k_proj.weight": (G * k, D),
        f"{a}v_proj.weight": (G * k, D),
        f"{a}o_proj.weight": (D, H * k),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if kind == "qwen2" or config.get("attention_bias"):
        found |= {f"{a}q_proj.bias": (H * k,), f"{a}k_proj.bias": (G * k,)}
        found |= {f"{a}v_proj.bias": (G * k,)}
    if config.get("attention_bias"):
        found[f"{a}o_proj.bias"] = (D,)
    if config.get("mlp_bias"):
        found |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,)}
        found["mlp.down_proj.bias"] = (D,)
    if kind == "qwen3":
        found |= {f"{a}q_norm.weight": (k,), f"{a}k_norm.weight": (k,)}
    if kind == "olmo2":
        found |= {f"{a}q_norm.weight": (H * k,), f"{a}k_norm.weight": (G * k,)}
        found["post_feedforward_layernorm.weight"] = (D,)
        del found["input_layernorm.weight"]
    if kind == "phi3":
        for name in ("q_proj", "k_proj", "v_proj"):
            del found[f"{a}{name}.weight"]
        found[f"{a}qkv_proj.weight"] = ((H + 2 * G) * k, D)
        del found["mlp.gate_proj.weight"], found["mlp.up_proj.weight"]
        found["mlp.gate_up_proj.weight"] = (2 * F, D)
    return found


def write_safetensors(path, tensors):
    """A file of float32 tensors."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        spot = [at, at + x.nbytes]
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": spot}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_folder(folder, config, tensors, shards=1):
    """A folder of Hugging Face, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    where, names = {}, list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        own = names[i::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in own})
        where |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def forward(config, tensors, ids):
    """Logits of every head at every position, [N, T, V], in float64."""
    w = {name: x.astype(np.float64) for name, x in tensors.items()}
    x_TD = w["model.embed_tokens.weight"][ids]
    last = config["num_hidden_layers"] - 1
    for i in range(last):
        x_TD = _layer(config, w, f"model.layers.{i}.", x_TD, _window(config, i))
    prefixes = [f"model.layers.{last}."]
    norms = ["model.norm.weight"]
    if config["model_type"] == "mtp_llama":
        n = config["prediction_heads"]
        prefixes += [f"model.mtp_heads.{i}." for i in range(n - 1)]
        norms = [f"model.mtp_norms.{i}.weight" for i in range(n)]
    if "mtp_heads" in config:  # as an exported folder has them, of one layer each
        further = range(config["mtp_heads"]["n_future_tokens"] - 1)
        prefixes += [f"heads.{i}.layers.0." for i in further]
        norms += [f"heads.{i}.norm.weight" for i in further]
    out_VD = w["model.embed_tokens.weight"]
    out_VD = out_VD if config["tie_word_embeddings"] else w["lm_head.weight"]
    found = []
    for prefix, norm in zip(prefixes, norms, strict=True):
        y_TD = _layer(config, w, prefix, x_TD, _window(config, last))
        found.append(_norm(config, y_TD, w[norm]) @ out_VD.T)
    return np.stack(found)


def _window(config, layer):
    if "layer_types" in config:
        slides = config["layer_types"][layer] == "sliding_attention"
        return config["sliding_window"] if slides else None
    if config["model_type"] == "qwen2":
        slides = config["use_sliding_window"] and layer >= config["max_window_layers"]
        return config["sliding_window"] if slides else None
    return config.get("sliding_window")


def _norm(config, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale


def _layer(config, w, prefix, x_TD, window):
    kind, k = config["model_type"], width(config)

    def linear(x, name):
        y = x @ w[f"{prefix}{name}.weight"].T
        return y + w.get(f"{prefix}{name}.bias", 0)

    def norm(x, name):
        return _norm(config, x, w[f"{prefix}{name}.weight"])

    h = x_TD if kind == "olmo2" else norm(x_TD, "input_layernorm")
    if kind == "phi3":
        qkv = linear(h, "self_attn.qkv_proj")
        q, key, v = np.split(qkv, [H * k, (H + G) * k], axis=1)
    else:
        q, key, v = (linear(h, f"self_attn.{x}_proj") for x in "qkv")
    if kind == "olmo2":
        q, key = norm(q, "self_attn.q_norm"), norm(key, "self_attn.k_norm")
    q, key, v = (x.reshape(len(x), -1, k) for x in (q, key, v))
    if kind == "qwen3":
        q, key = norm(q, "self_attn.q_norm"), norm(key, "self_attn.k_norm")
    q, key = _rotate(config, q), _rotate(config, key)
    t = np.arange(len(q))
    read = np.empty_like(q)
    for i in range(H):
        score = q[:, i] @ key[:, i // (H // G)].T / math.sqrt(k)
        hidden = t[None] > t[:, None]
        if window:
            hidden |= t[:, None] - t[None] >= window
        weight = np.exp(np.where(hidden, -np.inf, score))
        read[:, i] = weight / weight.sum(1, keepdims=True) @ v[:, i // (H // G)]
    out = linear(read.reshape(len(t), -1), "self_attn.o_proj")
    if kind == "olmo2":
        x_TD = x_TD + norm(out, "post_attention_layernorm")
        return x_TD + norm(_mlp(config, linear, x_TD), "post_feedforward_layernorm")
    x_TD = x_TD + out
    return x_TD + _mlp(config, linear, norm(x_TD, "post_attention_layernorm"))


def _mlp(config, linear, h):
    if config["model_type"] == "phi3":
        gate, up = np.split(linear(h, "mlp.gate_up_proj"), 2, axis=1)
    else:
        gate, up = linear(h, "mlp.gate_proj"), linear(h, "mlp.up_proj")
    return linear(gate / (1 + np.exp(-gate)) * up, "mlp.down_proj")


def _rotate(config, x):
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = found.get("rope_theta") or config["rope_theta"]
    kind = found.get("rope_type") or found.get("type") or "default"
    half, scale = x.shape[2] // 2, 1.0
    y = np.empty_like(x)
    for j in range(half):
        f = theta ** (-2 * j / x.shape[2])
        if kind == "linear":
            f /= found["factor"]
        if kind == "llama3":
            turns = found["original_max_position_embeddings"] * f / (2 * math.pi)
            low, high = found["low_freq_factor"], found["high_freq_factor"]
            share = min(max((turns - low) / (high - low), 0), 1)
            f *= share + (1 - share) / found["factor"]
        if kind == "yarn":
            original = found["original_max_position_embeddings"]

            def pair(turns, original=original):
                far = math.log(original / (turns * 2 * math.pi))
                return x.shape[2] * far / (2 * math.log(theta))

            low, high = math.floor(pair(32)), math.ceil(pair(1))
            low, high = max(low, 0), min(high, x.shape[2] - 1)
            share = min(max((j - low) / ((high - low) or 0.001), 0), 1)
            f *= 1 - share + share / found["factor"]
            scale = 0.1 * math.log(found["factor"]) + 1
        a = np.arange(len(x))[:, None] * f
        y[..., j] = (x[..., j] * np.cos(a) - x[..., j + half] * np.sin(a)) * scale
        y[..., j + half] = (
            x[..., j + half] * np.cos(a) + x[..., j] * np.sin(a)
        ) * scale
    return y
