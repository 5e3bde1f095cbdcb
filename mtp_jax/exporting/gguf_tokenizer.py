"""Tokenizers as llama.cpp reads them from a GGUF file.

It has rules of its own for two families: pieces with scores (SentencePiece models of
byte pairs), and merges of bytes, with the name of a way to cut text into words.
"""

import json
from typing import Any

from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import UserError

Piece = tuple[str, float, int]  # text, score, kind
_BYTE_PAIRS = 2  # the number of that type of SentencePiece models
# The cuts that are known by name, by what tells them in tokenizer.json.
_CUTS = {
    "\\p{N}{1,3}": "llama-bpe",
    "\\p{L}+|\\p{N}|": "qwen2",
    '"Digits"': "smollm",
}


def add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Adds a tokenizer to a file of a model with `size` ids.

    Raises:
      UserError: llama.cpp has no rules for it.
    """
    if tokenizer.kind == "tokenizer.json":
        _add_merges(gguf, writer, tokenizer, size)
    else:
        _add_pieces(gguf, writer, tokenizer, size)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_eos_token(False)
    template = getattr(tokenizer, "chat_template", None)
    if template:
        writer.add_chat_template(template)


def _add_pieces(gguf: Any, writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """The pieces of a SentencePiece model of byte pairs, or the bytes as pieces."""
    kinds = gguf.TokenType
    ends = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    adds_space = False
    if tokenizer.kind == "sentencepiece":
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2

        content = tokenizer.model_bytes  # type: ignore[attr-defined]
        proto = messages.ModelProto.FromString(content)
        if proto.trainer_spec.model_type != _BYTE_PAIRS:
            raise UserError(
                "--format=gguf knows SentencePiece models of byte pairs, and this one "
                "is of another type; choose hf."
            )
        pieces = [(p.piece, p.score, int(p.type)) for p in proto.pieces]
        adds_space = proto.normalizer_spec.add_dummy_prefix
        writer.add_unk_token_id(proto.trainer_spec.unk_id)
    else:
        pieces = [
            (ends[i], 0.0, int(kinds.CONTROL))
            if i in ends
            else (f"<0x{i:02X}>", 0.0, int(kinds.BYTE))
            for i in range(256)
        ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _add_list(gguf, writer, pieces, size)
    writer.add_token_scores(_scores(pieces, size))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(adds_space)


def _add_merges(gguf: Any, writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """The vocabulary and merges of a tokenizer.json of bytes."""
    files = tokenizer.files
    rules = json.loads(files["tokenizer.json"])
    model, cut = rules["model"], json.dumps(rules.get("pre_tokenizer"))
    known = [name for sign, name in _CUTS.items() if sign in cut]
    if "ByteLevel" in cut and not known and '"Split"' not in cut:
        known = ["gpt-2"]
    if model.get("type") != "BPE" or not known or "ByteLevel" not in cut:
        raise UserError(
            "--format=gguf knows tokenizers of byte pairs that cut text as GPT-2, "
            "Llama 3, Qwen 2 or SmolLM do, and this one does otherwise; choose hf."
        )
    kinds = gguf.TokenType
    texts = {i: (text, int(kinds.NORMAL)) for text, i in model["vocab"].items()}
    for token in rules.get("added_tokens", ()):
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        texts[token["id"]] = (token["content"], int(kind))
    pieces = [
        (*texts[i][:1], 0.0, texts[i][1])
        if i in texts
        else (f"<unused{i}>", 0.0, int(kinds.UNUSED))
        for i in range(max(texts) + 1)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[0])
    _add_list(gguf, writer, pieces, size)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(pairs)
    writer.add_add_bos_token(bool(getattr(tokenizer, "prompt_begin", ())))


def _add_list(gguf: Any, writer: Any, pieces: list[Piece], size: int) -> None:
    """Texts and kinds of all ids of the model, of which some may be to spare."""
    unused = int(gguf.TokenType.UNUSED)
    spare = [(f"<unused{i}>", 0.0, unused) for i in range(len(pieces), size)]
    both = [*pieces, *spare]
    writer.add_token_list([text.encode() for text, _, _ in both])
    writer.add_token_types([kind for _, _, kind in both])


def _scores(pieces: list[Piece], size: int) -> list[float]:
    return [score for _, score, _ in pieces] + [0.0] * (size - len(pieces))
