"""Imports of what transformers saves say what transformers says."""

import json
import pickle

import foreign
import numpy as np
import pytest

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.run.import_model import import_model

pytestmark = pytest.mark.packages
IDS = np.random.default_rng(0).integers(0, foreign.V, 40)
_SIZES = {
    "vocab_size": foreign.V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 30.0, **more}}


def yarn(**more):
    return rope("yarn", factor=4.0, original_max_position_embeddings=8, **more)


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
CASES = {
    "llama": ("llama", {}),
    "llama, llama3, all biases": (
        "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, **LLAMA3}
    ),
    "llama, linear, tied": (
        "llama", {"tie_word_embeddings": True, **rope("linear", factor=4.0)}
    ),
    "llama, yarn": ("llama", yarn()),
    "llama, yarn, mscale": ("llama", yarn(mscale=0.7, mscale_all_dim=1.3)),
    "llama, yarn, factor": ("llama", yarn(attention_factor=1.4, truncate=False)),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, yarn": ("qwen3", {"head_dim": 12, **yarn()}),
    "phi3": ("phi3", {"sliding_window": 9, "pad_token_id": 0}),
    "olmo2": ("olmo2", {}),
    "olmo2, bias": ("olmo2", {"attention_bias": True}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True}),
    "qwen2, wide heads": ("qwen2", {"head_dim": 16}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "phi3, tied": (
        "phi3", {"tie_word_embeddings": True, "pad_token_id": 0, "head_dim": 16}
    ),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True, "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, fields = CASES[name]
    config = transformers.AutoConfig.for_model(family, **{**_SIZES, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn_like(x))  # no bias is 0, no norm's scale is 1
        exact_TV = model(torch.tensor(IDS[None])).logits[0].numpy()
    shards = {"max_shard_size": "20KB"} if "windows" in name or "tied" in name else {}
    model.save_pretrained(tmp_path / "hf", **shards)

    import_model(tmp_path / "hf", tmp_path / "run", tokenizer="bytes")

    logits_NBTV = head_outputs(restore_model(tmp_path / "run"), IDS[None]).logits_NBTV
    np.testing.assert_allclose(logits_NBTV[0, 0], exact_TV, atol=1e-4)
    assert exact_TV.std() > 0.1


PARAMS = {
    "dim": 16, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": foreign.V,
    "multiple_of": 8, "norm_eps": 1e-5, "rope_theta": 1000.0, "n_future_tokens": 3,
}  # fmt: skip


def meta_state(rng):
    """A random state dict in Meta's layout."""
    found = {
        "tok_embeddings.weight": (foreign.V, 16),
        "norm.weight": (16,),
        "output.weight": (foreign.V, 16),
    }
    for prefix in ("layers.0.", "layers.1.", "layers.2.",
                   "extra_heads.0.", "extra_heads.1."):  # fmt: skip
        found |= {
            f"{prefix}attention_norm.weight": (16,),
            f"{prefix}attention.wq.weight": (16, 16),
            f"{prefix}attention.wk.weight": (8, 16),
            f"{prefix}attention.wv.weight": (8, 16),
            f"{prefix}attention.wo.weight": (16, 16),
            f"{prefix}ffn_norm.weight": (16,),
            f"{prefix}feed_forward.w1.weight": (48, 16),
            f"{prefix}feed_forward.w2.weight": (16, 48),
            f"{prefix}feed_forward.w3.weight": (48, 16),
        }
    return {
        name: rng.normal(size=shape).astype(np.float32) * 0.3 + (len(shape) == 1)
        for name, shape in found.items()
    }


def meta_forward(w, ids):
    """Logits of each of three heads, [3, T, V], with pairs as complex numbers."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    t = np.arange(len(ids))
    turn_T1k = np.exp(1j * t[:, None] * 1000.0 ** (-np.arange(0, 4, 2) / 4))[:, None]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def turned(x):
        pairs = np.ascontiguousarray(x).view(np.complex128) * turn_T1k
        return pairs.view(np.float64)

    def layer(p, x):
        h = norm(x, w[f"{p}attention_norm.weight"])
        q, k, v = (h @ w[f"{p}attention.w{n}.weight"].T for n in "qkv")
        q, k, v = (z.reshape(len(t), -1, 4) for z in (q, k, v))
        q, k = turned(q), turned(k)
        k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
        score = np.einsum("thk,shk->hts", q, k) / 2
        score = np.where(t[:, None] >= t[None], score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        read = np.einsum("hts,shk->thk", weight, v).reshape(len(t), -1)
        x = x + read @ w[f"{p}attention.wo.weight"].T
        h = norm(x, w[f"{p}ffn_norm.weight"])
        gate = h @ w[f"{p}feed_forward.w1.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ w[f"{p}feed_forward.w3.weight"].T)
        return x + inner @ w[f"{p}feed_forward.w2.weight"].T

    x = w["tok_embeddings.weight"][ids]
    for i in range(2):
        x = layer(f"layers.{i}.", x)
    heads = ("layers.2.", "extra_heads.0.", "extra_heads.1.")
    outs = [norm(layer(p, x), w["norm.weight"]) for p in heads]
    return np.stack(outs) @ w["output.weight"].T


def test_all_heads_of_a_checkpoint_of_meta(tmp_path):
    torch = pytest.importorskip("torch")
    state = meta_state(np.random.default_rng(0))
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    tensors = {name: torch.tensor(x) for name, x in state.items()}
    torch.save(tensors, folder / "consolidated.pth")

    report = import_model(folder, tmp_path / "run", tokenizer="bytes")

    logits_NBTV = head_outputs(restore_model(tmp_path / "run"), IDS[None]).logits_NBTV
    np.testing.assert_allclose(logits_NBTV[:, 0], meta_forward(state, IDS), atol=1e-4)
    assert report.format == "meta" and not report.tied


class Runs:
    """An object whose pickle would run code, which would say so."""

    def __reduce__(self):
        return print, ("code was run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, refusal):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    torch.save({"x": Runs()}, folder / "consolidated.pth")

    where = [f"--from={folder}", f"--workdir={tmp_path / 'run'}", "--tokenizer=bytes"]
    assert "not a file of weights alone" in refusal("import", *where)

    (folder / "consolidated.pth").write_bytes(pickle.dumps(Runs()))
    assert "not a file of weights alone" in refusal("import", *where)
    assert not (tmp_path / "run").exists()
