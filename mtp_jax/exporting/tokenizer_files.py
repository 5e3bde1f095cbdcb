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

_SPACE = "\u2581"
_BYTE_NAMES = ("<s>", "</s>")
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
        pieces = _Pieces(tokenizer.model_bytes)  # type: ignore[attr-defined]
        about |= {
            "bos_token": pieces.names[tokenizer.bos_id],
            "eos_token": pieces.names[tokenizer.eos_id],
            "unk_token": pieces.names[pieces.unk_id],
        }
        if pieces.is_bpe:
            content = _of_pieces(pieces, tokenizer)
        else:
            about |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    else:
        content = _of_bytes(tokenizer)
    _write_json(folder / "tokenizer_config.json", about)
    if content is not None:
        _write_json(folder / "tokenizer.json", content)
        _compare_ids(folder / "tokenizer.json", tokenizer)


def _name_class(path: pathlib.Path) -> None:
    """Names the class that takes tokenizer.json as it is, whatever a file named."""
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    _write_json(path, {**about, "tokenizer_class": "PreTrainedTokenizerFast"})


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the 256 bytes, two of which begin and end a text."""
    ends = dict(zip((tokenizer.bos_id, tokenizer.eos_id), _BYTE_NAMES, strict=True))
    letters = sorted((byte, letter) for letter, byte in byte_letters().items())
    vocab = {ends.get(byte, letter): byte for byte, letter in letters}
    split = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _content(
        tokenizer,
        _BYTE_NAMES[0],
        {i: name for i, name in ends.items()},
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
        pre_tokenizer={"type": "ByteLevel", **split},
        decoder={"type": "ByteLevel", **split},
    )


def _of_pieces(pieces: "_Pieces", tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model of byte pairs.

    It joins the two neighbours whose joined piece has the best score, which is the
    order of merges that is written.
    """
    ids = {name: i for i, name in enumerate(pieces.names)}
    merges = []
    for i, name in enumerate(pieces.names):
        if i in pieces.special or pieces.is_byte(i):
            continue
        cuts = [(name[:k], name[k:]) for k in range(1, len(name))]
        found = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(pieces.scores[i], ids[a], ids[b], a, b) for a, b in found]
    merges.sort(key=lambda m: (-m[0], m[1], m[2]))
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if pieces.adds_space else []
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if pieces.adds_space else []),
    ]
    return _content(
        tokenizer,
        pieces.names[tokenizer.bos_id],
        {i: pieces.names[i] for i in pieces.special},
        user={i: pieces.names[i] for i in pieces.user},
        model={
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.names[pieces.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[a, b] for _, _, _, a, b in merges],
        },
        normalizer={
            "type": "Sequence",
            "normalizers": [
                *prefix,
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _content(
    tokenizer: Tokenizer,
    bos: str,
    special: dict[int, str],
    *,
    model: dict[str, Any],
    user: dict[int, str] | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """The content of tokenizer.json; a text begins with its begin of text."""

    def added(i: int, text: str, is_special: bool) -> dict[str, Any]:
        sides = {"single_word": False, "lstrip": False, "rstrip": False}
        return {
            "id": i,
            "content": text,
            **sides,
            "normalized": False,
            "special": is_special,
        }

    both = [added(i, text, True) for i, text in special.items()]
    both += [added(i, text, False) for i, text in (user or {}).items()]
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": x, "type_id": t}} for x, t in (("A", 0), ("B", 1)))
    begin_b = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(both, key=lambda token: token["id"]),
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, a],
            "pair": [begin, a, begin_b, b],
            "special_tokens": {
                bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}
            },
        },
        "decoder": parts.get("decoder"),
        "model": model,
    }


class _Pieces:
    """The pieces of a SentencePiece model, and what its processor does not tell."""

    def __init__(self, model_bytes: bytes):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2

        proto = messages.ModelProto.FromString(model_bytes)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        self.names = [piece.piece for piece in proto.pieces]
        self.scores = [piece.score for piece in proto.pieces]
        self.is_bpe = proto.trainer_spec.model_type == 2
        self.adds_space = proto.normalizer_spec.add_dummy_prefix
        self.unk_id = self._processor.unk_id()
        kinds = [piece.type for piece in proto.pieces]  # 2 unknown, 3 control, 4 user
        self.special = [i for i, kind in enumerate(kinds) if kind in (2, 3)]
        self.user = [i for i, kind in enumerate(kinds) if kind == 4]

    def is_byte(self, i: int) -> bool:
        """True for a piece that stands for one byte."""
        return self._processor.is_byte(i)


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
