"""The model card of a folder: what it is, how to load it, what was measured."""

from typing import Any

from mtp_jax import __version__
from mtp_jax.exporting.parts import Parts
from mtp_jax.model.sizes import sizes_of


def model_card(parts: Parts, figures: dict[str, Any] | None) -> str:
    """README.md of a folder for Hugging Face's libraries.

    Args:
      parts: of the model.
      figures: as `evaluate` gives them; None if there is no held-out text.
    """
    cfg, plain = parts.cfg, parts.plain
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [multi-token-prediction, speculative-decoding, mtp_jax]",
        "---",
        "",
        f"A model of {sizes_of(plain).total / 1e6:.2f} M parameters "
        f"({parts.family}: {plain.num_layers} layers, width {plain.d_model}, "
        f"vocabulary {plain.vocab_size}), trained for {parts.model.step} steps with "
        f"mtp_jax {__version__}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    if parts.heads:
        lines += [
            f"It has {cfg.n_future_tokens - 1} {cfg.heads.kind} heads more, which "
            "draft tokens that the model checks: the text is the same, in fewer "
            "passes. They are in `mtp_heads/`, and run by `modeling_mtp_heads.py` "
            "(transformers 5, one text at a time):",
            "",
            "```python",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", '
            "trust_remote_code=True)",
            'model.generate(**tokenizer(TEXT, return_tensors="pt"), use_mtp=True)',
            "```",
            "",
        ]
    if parts.dropped:
        lines += [f"Its {parts.dropped} are not in this folder.", ""]
    return "\n".join([*lines, *_measured(figures)]) + "\n"


def _measured(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return ["Nothing was measured: there was no held-out text."]
    rows = [
        f"Measured on {figures['tokens']} tokens of held-out text "
        f"({', '.join(figures['data'])}), {figures['bits_per_byte']:.4f} bits a byte:",
        "",
        "| head | loss (nats) | accuracy | drafts accepted up to it |",
        "|---|---|---|---|",
    ]
    accepted = [1.0, *figures["accept"]["by_head"]]
    for head, share in zip(figures["heads"], accepted, strict=True):
        rows.append(
            f"| {head['offset']} | {head['loss']:.4f} | {head['accuracy']:.4f} | "
            f"{share:.4f} |"
        )
    if len(accepted) > 1:
        length = figures["accept"]["length"]
        rows += [
            "",
            f"A greedy pass accepts {length:.3f} tokens on average on true text.",
        ]
    return rows
