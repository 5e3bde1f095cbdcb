"""Head 2 as an EAGLE-3 drafter of one token, for vLLM.

A drafter's layer reads [embedding of the token before; hidden state], twice the width.
Head 2 reads the hidden state alone: its queries, keys and values get zeros for the
embedding, and `fc`, which joins the states of several layers, is the identity of one,
the trunk's output (libraries: vllm/model_executor/models/llama_eagle3.py).
"""

import pathlib

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.exporting import tensors
from mtp_jax.exporting.fast_llm import require_plain_heads
from mtp_jax.exporting.parts import Parts
from mtp_jax.storage import write_json


def write_eagle3(parts: Parts, folder: pathlib.Path, positions: int) -> list[str]:
    """Writes the folder and reads it again; returns what it does not hold.

    Raises:
      UserError: a model of one head, or heads that the format does not know.
      RunFailed: what was read is not what was to be written.
    """
    n = parts.cfg.n_future_tokens
    if n == 1:
        raise UserError("--format=eagle3 holds head 2, and the model has one head.")
    require_plain_heads(parts, "eagle3")
    d, llama = parts.plain.d_model, parts.llama
    prefix = "heads.0.layers.0."
    of_layer = {
        name.removeprefix(prefix): x
        for name, x in parts.heads.items()
        if name.startswith(prefix)
    }
    dtype = llama["model.norm.weight"].dtype
    arrays = {
        "embed_tokens.weight": llama["model.embed_tokens.weight"],
        "fc.weight": np.eye(d, dtype=dtype),
        "midlayer.hidden_norm.weight": of_layer.pop("input_layernorm.weight"),
        "midlayer.input_layernorm.weight": np.ones(d, dtype),
        "norm.weight": parts.heads.get(
            "heads.0.norm.weight", llama["model.norm.weight"]
        ),
        "lm_head.weight": llama.get(
            "lm_head.weight", llama["model.embed_tokens.weight"]
        ),
    }
    for name, x in of_layer.items():
        if name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
            x = np.concatenate([np.zeros_like(x), x], axis=1)
        arrays[f"midlayer.{name}"] = x
    tensors.write(folder, arrays, 1 << 62)
    about = parts.config(positions) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": parts.plain.vocab_size,
        "num_aux_hidden_states": 1,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [parts.plain.num_layers - 1],
            "use_aux_hidden_state": True,
        },
    }
    write_json(folder / "config.json", about)
    tensors.compare(folder, arrays, tensors.read(folder))
    lost = ["the model itself: give its hf folder as the target"]
    return [*lost, *([f"heads 3 to {n}" if n > 3 else "head 3"] if n > 2 else [])]
