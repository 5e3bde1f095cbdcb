"""The config of a Hugging Face folder as a model of ours, and back.

Families: llama (also SmolLM2, TinyLlama), mistral, qwen2 (also Qwen 2.5), qwen3, phi3,
olmo2. Fields and defaults are those of transformers 5, older names too; what is not
known is refused, since a field that is passed over makes another model in silence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtp_jax.config import LayerConfig, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import real, told_with, truth, whole
from mtp_jax.interop.hf_rope import rope_from_hf, rope_to_hf

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type, and what its class takes for granted."""

    architecture: str
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    d_head: int | None = None  # where the file has none; None: width / heads
    context: int = 2048
    window: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", context=131_072, window=4096),
    "qwen2": Family("Qwen2ForCausalLM", context=32_768),
    "qwen3": Family("Qwen3ForCausalLM", context=32_768, d_head=128),
    "phi3": Family("Phi3ForCausalLM", norm_eps=1e-5, context=4096),
    "olmo2": Family("Olmo2ForCausalLM", norm_eps=1e-5),
}
# Without a meaning for what a model computes when it runs.
_NO_MEANING = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "initializer_range",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "model_type",
        "pad_token_id",
        "resid_pdrop",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "tokenizer_class",
    ]
)
# Those that have one, and the only value with which it is none.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
}
_READ = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
    ]
)
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_attention_heads": "num_query_heads",
}


def from_hf(
    config: Json, where: str, more: frozenset[str] = frozenset(), family: str = ""
) -> tuple[ModelConfig, bool | None]:
    """The model of head 1 alone of a `config.json`.

    Args:
      config: its content.
      where: the file, for errors.
      more: further fields that the caller reads itself.
      family: the key of `FAMILIES` whose rules hold; empty: `model_type`.

    Returns:
      The model, untied; and what the file says of ties, None if nothing.

    Raises:
      UserError: a family, a field or a value that is not known, or one that is missing.
    """
    kind = family or config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {kind!r}; known are {', '.join(FAMILIES)}."
        )
    _refuse_unknown(config, where, more)
    sizes: dict[str, Any] = {
        ours: whole(config, theirs, where) for theirs, ours in _SIZES.items()
    }
    of, heads = FAMILIES[kind], sizes["num_query_heads"]
    layers = whole(config, "num_hidden_layers", where)
    context = whole(config, "max_position_embeddings", where, of.context)
    tied = config.get("tie_word_embeddings")
    if tied is not None:
        tied = truth(config, "tie_word_embeddings", where)
    kv_heads = whole(config, "num_key_value_heads", where, heads)
    d_head = of.d_head or sizes["d_model"] // heads
    d_head = whole(config, "head_dim", where, d_head)
    norm_eps = real(config, "rms_norm_eps", where, of.norm_eps)
    layer = _layer(config, kind, layers, where)
    with told_with(where):
        model = ModelConfig(
            **sizes,
            num_kv_heads=kv_heads,
            d_head=d_head,
            num_layers=layers,
            n_future_tokens=1,
            rope_theta=10_000.0,
            norm_eps=norm_eps,
            layer=layer,
        )
    theta, rope = rope_from_hf(config, of.rope_theta, context, where)
    return dataclasses.replace(model, rope_theta=theta, rope=rope), tied


def _refuse_unknown(config: Json, where: str, more: frozenset[str]) -> None:
    for name, value in config.items():
        if name in _ONLY:
            if value not in (None, _ONLY[name]):
                raise UserError(
                    f"{where}: {name} is {value!r}, and only {_ONLY[name]!r} is known."
                )
        elif name not in _NO_MEANING | _READ | more and value not in (None, False):
            raise UserError(
                f"{where}: {name} is {value!r}, a field that is not known here; a "
                "model that needs it would be another one without."
            )


def _layer(config: Json, kind: str, layers: int, where: str) -> LayerConfig:
    """Biases, norms and windows of the layers."""
    bias = truth(config, "attention_bias", where)
    mlp_bias = truth(config, "mlp_bias", where)
    if bias and kind in ("mistral", "phi3", "qwen2"):
        raise UserError(f"{where}: {kind} has no attention_bias, and it is {bias}.")
    if mlp_bias and kind != "llama":
        raise UserError(f"{where}: {kind} has no mlp_bias, and it is True.")
    return LayerConfig(
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=mlp_bias,
        qk_norm={"qwen3": "head", "olmo2": "whole"}.get(kind, "none"),  # type: ignore[arg-type]
        norms="after" if kind == "olmo2" else "before",
        windows=_windows(config, kind, layers, where),
    )


def _windows(config: Json, kind: str, layers: int, where: str) -> tuple[int, ...]:
    """Windows as `config.layer.windows` has them: one value if all are alike."""
    kinds = _layer_types(config, layers, where)
    if kind in ("llama", "olmo2"):
        if config.get("sliding_window") is not None or "sliding_attention" in kinds:
            raise UserError(f"{where}: {kind} has no sliding_window.")
        return ()
    is_qwen = kind.startswith("qwen")
    if is_qwen and not truth(config, "use_sliding_window", where):
        return ()
    window = config.get("sliding_window", 4096 if is_qwen else FAMILIES[kind].window)
    if window is not None:
        window = whole({"sliding_window": window}, "sliding_window", where)
    elif is_qwen:
        return ()
    elif "sliding_attention" in kinds:
        raise UserError(f"{where}: layer_types has sliding_attention, without a width.")
    full = whole(config, "max_window_layers", where, 28, least=0) if is_qwen else 0
    kinds = kinds or [
        "sliding_attention" if i >= full else "full_attention" for i in range(layers)
    ]
    each = tuple(window or 0 if k == "sliding_attention" else 0 for k in kinds)
    return _shortest(each)


def _layer_types(config: Json, layers: int, where: str) -> list[str]:
    """The kind of attention of each layer; none if the file does not say it."""
    kinds = config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is None:
        return []
    if type(kinds) is not list or len(kinds) != layers or set(kinds) - {*known}:
        raise UserError(
            f"{where}: layer_types must name {layers} layers, each "
            f"{' or '.join(known)}."
        )
    return kinds


def _shortest(windows: tuple[int, ...]) -> tuple[int, ...]:
    """Windows of all layers, as one value where they are alike, as none without."""
    if not any(windows):
        return ()
    return windows[:1] if len(set(windows)) == 1 else windows


def family_of(model: ModelConfig) -> str:
    """The family that holds a model's layers, a key of `FAMILIES`.

    Raises:
      UserError: none does.
    """
    layer, form = model.layer, model.layer
    biases = (form.qkv_bias, form.out_bias)
    mixed = len(set(layer.windows)) > 1
    if form.norms == "after" or form.qk_norm == "whole":
        fits = form.norms == "after" and form.qk_norm == "whole"
        if fits and biases[0] == biases[1] and not form.mlp_bias and not layer.windows:
            return "olmo2"
    elif form.qk_norm == "head":
        if biases[0] == biases[1] and not form.mlp_bias:
            return "qwen3"
    elif biases == (True, False) and not form.mlp_bias:
        return "qwen2"
    elif any(layer.windows):
        if biases == (False, False) and not form.mlp_bias and not mixed:
            return "mistral"
    elif biases[0] == biases[1]:
        return "llama"
    raise UserError(
        f"no family of {', '.join(FAMILIES)} has layers as config.layer has them: "
        f"{layer}."
    )


def to_hf(model: ModelConfig, context: int, family: str = "") -> dict[str, Any]:
    """The `config.json` of a model's trunk and head 1, all its fields written out.

    Args:
      model: any; its further heads are left out.
      context: positions of the longest text.
      family: a key of `FAMILIES`; empty: that of `family_of`.

    Raises:
      UserError: no family, or not this one, has such layers.
    """
    model = model.keep_heads(1)
    kind = family or family_of(model)
    layer, layers = model.layer, model.num_layers
    found: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": model.num_query_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope_to_hf(model),
    }
    if kind in ("llama", "qwen3", "olmo2"):
        found["attention_bias"] = layer.qkv_bias
    if kind == "llama":
        found["mlp_bias"] = layer.mlp_bias
    if kind in ("mistral", "phi3"):
        found["sliding_window"] = (layer.windows or (None,))[0]
    if kind in ("qwen2", "qwen3"):
        windows = layer.windows or (0,)
        windows = windows * layers if len(windows) == 1 else windows
        found["use_sliding_window"] = any(windows)
        found["sliding_window"] = max(windows) or None
        found["layer_types"] = [
            "sliding_attention" if w else "full_attention" for w in windows
        ]
    again, _ = from_hf(found, "the config that was made", family=kind)
    same = dataclasses.replace(again, tie_embeddings=model.tie_embeddings)
    wanted = dataclasses.replace(
        model,
        rope=dataclasses.replace(model.rope, context=context),
        layer=dataclasses.replace(layer, windows=_shortest(layer.windows or (0,))),
        param_dtype=same.param_dtype,
        compute_dtype=same.compute_dtype,
        heads=same.heads,
    )
    if same != wanted:
        raise UserError(
            f"{kind} cannot hold this model: {again.layer} and {again.rope} is what "
            f"it can, of {wanted.layer} and {wanted.rope}."
        )
    return found
