"""Tokenizers in the files that Hugging Face's libraries read.

`PreTrainedTokenizerFast` is the class to name: others rebuild parts of tokenizer.json
by their own rules, and the name that transformers 5 writes is not known to version 4.
"""

import json
import pathlib
from typing import Any

import tokenizers

from mtp_jax.data.json_tokenizer import byte_letters
from mtp_jax.data.tokenizer import Tokenizer, save_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.interop.tokenizer_rules import (
    Added,
    Json,
    Pieces,
    byte_level,
    byte_pairs,
    rules,
    rules_of_pieces,
)

_BYTE_NAMES = ("<s>", "</s>")
_BYTE_PAIRS = 2  # the number of that type of SentencePiece models
_SAMPLES = (
    "Once upon a time, there was a naïve fox.",
    "def f(x):\n    return x ** 2  # 3.14\n\n",
    "  two spaces\tand a tab; 12345 digits; 你好, мир! 🙂",
    "",
)


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, positions: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and checks what they say.

    A SentencePiece model is written beside them; one that is not of byte pairs has no
    tokenizer.json, and loads as LlamaTokenizer. A tokenizer.json stays byte for byte,
    with the files that came with it.

    Raises:
      UserError: ids differ from those of the tokenizer.
    """
    about = {
        "bos_token": _BYTE_NAMES[0],
        "eos_token": _BYTE_NAMES[1],
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    content = None
    save_tokenizer(tokenizer, str(folder))
    if tokenizer.kind == "tokenizer.json":
        _name_class(folder / "tokenizer_config.json")
        return
    if tokenizer.kind == "sentencepiece":
        model_bytes = tokenizer.model_bytes  # type: ignore[attr-defined]
        about |= _named(model_bytes)
        if (pieces := _pieces(model_bytes)) is not None:
            content = rules_of_pieces(pieces, tokenizer.bos_id)
        else:
            about |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    else:
        content = _of_bytes(tokenizer)
    _write_json(folder / "tokenizer_config.json", about)
    if content is not None:
        _write_json(folder / "tokenizer.json", content)
        _compare_ids(folder / "tokenizer.json", tokenizer)


def _named(model_bytes: bytes) -> dict[str, str]:
    """The texts of begin and end of text and of the unknown."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    return {f"{name}_token": model.id_to_piece(i) for name, i in ids.items()}


def _name_class(path: pathlib.Path) -> None:
    """Names the class that takes tokenizer.json as it is, whatever a file named."""
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    _write_json(path, {**about, "tokenizer_class": "PreTrainedTokenizerFast"})


def _of_bytes(tokenizer: Tokenizer) -> Json:
    """tokenizer.json of the 256 bytes, two of which begin and end a text."""
    ends = dict(zip((tokenizer.bos_id, tokenizer.eos_id), _BYTE_NAMES, strict=True))
    letters = sorted((byte, letter) for letter, byte in byte_letters().items())
    vocab = {ends.get(byte, letter): byte for byte, letter in letters}
    return rules(
        (tokenizer.bos_id, _BYTE_NAMES[0]),
        Added(ends),
        model=byte_pairs(vocab, []),
        pre_tokenizer=byte_level(use_regex=False),
        decoder=byte_level(use_regex=False),
    )


def _pieces(model_bytes: bytes) -> Pieces | None:
    """The pieces of a SentencePiece model; None if it is not one of byte pairs."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2

    proto = messages.ModelProto.FromString(model_bytes)
    if proto.trainer_spec.model_type != _BYTE_PAIRS:
        return None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    kinds = [int(piece.type) for piece in proto.pieces]

    def of(*wanted: int) -> frozenset[int]:
        return frozenset(i for i, kind in enumerate(kinds) if kind in wanted)

    return Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        special=of(2, 3),  # unknown, control
        user=of(4),
        of_bytes=of(6),
        unk_id=processor.unk_id(),
        adds_space=proto.normalizer_spec.add_dummy_prefix,
    )


def _compare_ids(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Compares ids with the library's."""
    library = tokenizers.Tokenizer.from_file(str(path))
    for text in _SAMPLES:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        found = library.encode(text).ids
        if found != ids:
            raise UserError(
                f"tokenizer.json would give {text!r} the ids {found}, and the model's "
                f"tokenizer gives {ids}; this tokenizer cannot be exported."
            )


def _write_json(path: pathlib.Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
