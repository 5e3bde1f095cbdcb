"""The content of tokenizer.json: of pieces with scores, or of merges of bytes.

Fields: github.com/huggingface/tokenizers.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]
SPACE = "\u2581"  # stands for a space inside the pieces of SentencePiece


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A vocabulary of SentencePiece's byte pairs, by ids from 0 on."""

    texts: Sequence[str]
    scores: Sequence[float]
    special: frozenset[int]  # unknown and control
    user: frozenset[int]  # that are never cut
    of_bytes: frozenset[int]  # each stands for a byte
    unk_id: int
    adds_space: bool  # in front of every text
    unused: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Added:
    """Tokens that are found in a text before all others are."""

    special: Mapping[int, str]
    user: Mapping[int, str] = dataclasses.field(default_factory=dict)
    rstrip: frozenset[int] = frozenset()  # ids that take white space after them along

    def listed(self) -> list[Json]:
        """All of them, as tokenizer.json has them."""
        both = [(i, text, True) for i, text in self.special.items()]
        both += [(i, text, False) for i, text in self.user.items()]
        return [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": i in self.rstrip,
                "normalized": False,
                "special": special,
            }
            for i, text, special in sorted(both)
        ]


def rules_of_pieces(
    pieces: Pieces, begin: int | None, rstrip: frozenset[int] = frozenset()
) -> Json:
    """tokenizer.json of a SentencePiece model of byte pairs.

    It joins the two neighbours whose joined piece has the best score, which is the
    order of merges that is written.

    Args:
      pieces: of the model.
      begin: id of the token that begins a text, None without one.
      rstrip: ids of special tokens that take white space after them along.
    """
    texts = pieces.texts
    ids = {text: i for i, text in enumerate(texts) if i not in pieces.unused}
    merges = []
    for name, i in ids.items():
        if i in pieces.special or i in pieces.of_bytes:
            continue
        cuts = [(name[:k], name[k:]) for k in range(1, len(name))]
        found = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(pieces.scores[i], ids[a], ids[b], a, b) for a, b in found]
    merges.sort(key=lambda m: (-m[0], m[1], m[2]))
    prefix = [{"type": "Prepend", "prepend": SPACE}] if pieces.adds_space else []
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if pieces.adds_space else []),
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return rules(
        None if begin is None else (begin, texts[begin]),
        Added(
            {i: texts[i] for i in pieces.special},
            {i: texts[i] for i in pieces.user},
            rstrip,
        ),
        model=byte_pairs(
            ids,
            [[a, b] for _, _, _, a, b in merges],
            unk_token=texts[pieces.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        ),
        normalizer={"type": "Sequence", "normalizers": [*prefix, space]},
        decoder={"type": "Sequence", "decoders": decoders},
    )


def byte_pairs(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any
) -> Json:
    """The model of tokenizer.json that joins pairs, the first of `merges` first."""
    usual = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**usual, **options, "vocab": dict(vocab), "merges": list(merges)}


def byte_level(use_regex: bool) -> Json:
    """The step that writes bytes as letters; with a cut into words as GPT-2's."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }


def rules(
    begin: tuple[int, str] | None,
    added: Added,
    *,
    model: Json,
    normalizer: Json | None = None,
    pre_tokenizer: Json | None = None,
    decoder: Json | None = None,
) -> Json:
    """The content of tokenizer.json.

    Args:
      begin: id and text of the token that begins a text, None without one.
      added: special tokens and others that are found first.
      model, normalizer, pre_tokenizer, decoder: its parts.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added.listed(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if begin is None else _framed(*begin),
        "decoder": decoder,
        "model": model,
    }


def _framed(i: int, text: str) -> Json:
    """The step that puts a token in front of each text."""
    pair: list[Json] = list(
        itertools.chain.from_iterable(
            (
                {"SpecialToken": {"id": text, "type_id": number}},
                {"Sequence": {"id": name, "type_id": number}},
            )
            for number, name in enumerate("AB")
        )
    )
    return {
        "type": "TemplateProcessing",
        "single": pair[:2],
        "pair": pair,
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}},
    }
