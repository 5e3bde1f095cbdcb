"""GGUF files of llama.cpp: head 1 of a model, float or de-quantised.

Read by PyPI's `gguf`. Files of architecture llama (Llama, Mistral, SmolLM) have queries
and keys in pairs (2j, 2j + 1); qwen2, qwen3 and phi3 have them as Hugging Face does.
Llama 3's stretched positions are a tensor of divisors, `rope_freqs.weight`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtp_jax.config import LayerConfig, ModelConfig, RopeConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import told_with
from mtp_jax.interop.places import Names
from mtp_jax.interop.sources import Arrays
from mtp_jax.model.rope import frequencies

ROPE_TENSOR = "rope_freqs.weight"
# Those tensors of published files that follow from their config.
_LLAMA3 = [(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]
_LAYER = {
    "norm_attention": "attn_norm.weight",
    "w_q": "attn_q.weight",
    "w_k": "attn_k.weight",
    "w_v": "attn_v.weight",
    "w_o": "attn_output.weight",
    "bias_q": "attn_q.bias",
    "bias_k": "attn_k.bias",
    "bias_v": "attn_v.bias",
    "bias_o": "attn_output.bias",
    "norm_q": "attn_q_norm.weight",
    "norm_k": "attn_k_norm.weight",
    "norm_mlp": "ffn_norm.weight",
    "mlp/w_gate": "ffn_gate.weight",
    "mlp/w_up": "ffn_up.weight",
    "mlp/w_down": "ffn_down.weight",
    "mlp/bias_gate": "ffn_gate.bias",
    "mlp/bias_up": "ffn_up.bias",
    "mlp/bias_down": "ffn_down.bias",
}
_FUSED = {
    "w_q": "attn_qkv.weight",
    "w_k": "attn_qkv.weight",
    "w_v": "attn_qkv.weight",
    "mlp/w_gate": "ffn_up.weight",
    "mlp/w_up": "ffn_up.weight",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")


def gguf_names(architecture: str) -> Names:
    """The names of tensors of an architecture of `ARCHITECTURES`."""
    return Names(
        embedding="token_embd.weight",
        norm="output_norm.weight",
        unembedding="output.weight",
        layers="blk.{}.",
        layer=_LAYER | (_FUSED if architecture == "phi3" else {}),
        interleaved=architecture == "llama",
    )


def from_gguf(
    fields: Mapping[str, Any], names: set[str], where: str
) -> tuple[ModelConfig, str]:
    """The model of the keys of a file, untied, and its architecture.

    Args:
      fields: values by key.
      names: of the tensors; which biases there are is seen from them.
      where: the file, for errors.

    Raises:
      UserError: an architecture or a kind of positions that is not known, or a key that
        is missing.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{where} is of architecture {arch!r}; known are "
            f"{', '.join(ARCHITECTURES)}."
        )

    def value(key: str, usual: Any = None) -> Any:
        found = fields.get(f"{arch}.{key}", usual)
        if found is None:
            raise UserError(f"{where} lacks the key {arch}.{key}.")
        return found

    if fields.get(f"{arch}.expert_count"):
        raise UserError(f"{where} is a mixture of experts, which is not known here.")
    d, heads = int(value("embedding_length")), int(value("attention.head_count"))
    d_head = int(value("attention.key_length", d // heads))
    if int(value("attention.value_length", d_head)) != d_head:
        raise UserError(f"{where}: values and keys are not of the same width.")
    if int(value("rope.dimension_count", d_head)) != d_head:
        raise UserError(f"{where}: only a part of each head turns, which is not known.")
    window = int(value("attention.sliding_window", 0))
    layer = LayerConfig(
        qkv_bias="blk.0.attn_q.bias" in names,
        out_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
        qk_norm="head" if arch == "qwen3" else "none",
        windows=(window,) if window else (),
    )
    vocab = value("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())) or None)
    model = ModelConfig(
        vocab_size=int(vocab),
        d_model=d,
        num_layers=int(value("block_count")),
        n_future_tokens=1,
        num_query_heads=heads,
        num_kv_heads=int(value("attention.head_count_kv", heads)),
        d_head=d_head,
        d_ff=int(value("feed_forward_length")),
        rope_theta=float(value("rope.freq_base", 10_000.0)),
        norm_eps=_short(value("attention.layer_norm_rms_epsilon")),
        layer=layer,
        rope=_rope(fields, arch, int(value("context_length")), where),
    )
    return model, arch


def _short(x: float) -> float:
    """The decimal number that a float32 was written as: 1e-5, not 9.999999747e-06."""
    return float(str(np.float32(x)))


def _rope(fields: Mapping[str, Any], arch: str, context: int, where: str) -> RopeConfig:
    kind = fields.get(f"{arch}.rope.scaling.type", "none")
    factor = float(fields.get(f"{arch}.rope.scaling.factor", 1.0))
    if kind == "none" or factor == 1.0:
        return RopeConfig(context=context)
    if kind == "linear":
        return RopeConfig(scaling="linear", factor=factor, context=context)
    if kind == "yarn":
        original = fields.get(f"{arch}.rope.scaling.original_context_length", context)
        return RopeConfig(
            scaling="yarn",
            factor=factor,
            original_context=int(original),
            context=context,
        )
    raise UserError(f"{where}: rope.scaling.type is {kind!r}, which is not known.")


def llama3_of(divisors: np.ndarray, model: ModelConfig, where: str) -> RopeConfig:
    """The stretching of positions that a file's divisors of frequencies come from.

    Raises:
      UserError: none of the published ones.
    """
    plain = frequencies(RopeConfig(), model.d_head, model.rope_theta)
    for factor, low, high, original in _LLAMA3:
        rope = RopeConfig(
            scaling="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=original,
            context=model.rope.context,
        )
        stretched = frequencies(rope, model.d_head, model.rope_theta)
        if np.allclose(plain / stretched, divisors, rtol=1e-4):
            return rope
    raise UserError(f"{where}: {ROPE_TENSOR} is not one of Llama 3's.")


def read_gguf(path: pathlib.Path) -> tuple[ModelConfig, str, Arrays, dict[str, Any]]:
    """The model of a file, untied; its architecture; its tensors; its keys.

    Raises:
      UserError: the file cannot be read, or what `from_gguf` raises.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{path} is read with gguf, which is not installed: pip install gguf."
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as error:  # of a file of any content
        raise UserError(f"{path} is damaged, or no GGUF file: {error}.") from None
    try:
        with told_with(str(path)):
            model, arch = from_gguf(fields, set(tensors), str(path))
    except (ArithmeticError, TypeError, ValueError):
        raise UserError(
            f"{path} has keys of a model that cannot be, or that differ by layer."
        ) from None

    def make(name: str) -> np.ndarray:
        t = tensors[name]
        return gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)

    # GGUF lists axes from the fastest to the slowest.
    shapes = {
        name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()
    }
    if ROPE_TENSOR in shapes:
        rope = llama3_of(make(ROPE_TENSOR), model, str(path))
        model = dataclasses.replace(model, rope=rope)
        del shapes[ROPE_TENSOR]
    return model, arch, Arrays(str(path), [path], shapes, make), fields
