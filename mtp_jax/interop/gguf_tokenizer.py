"""The tokenizer that a GGUF file carries, as the files of a tokenizer.json.

Two families are read: `llama`, SentencePiece's byte pairs with scores, and `gpt2`,
merges of bytes, where `tokenizer.ggml.pre` names a way to cut a text into words. The
keys and what they mean where they are missing: github.com/ggml-org/llama.cpp,
gguf-py/gguf/constants.py and src/llama-vocab.cpp.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_jax.data import json_tokenizer
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

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_MODELS = ("llama", "gpt2")
# Phi-3's special tokens take white space along, these excepted.
_PHI_3 = ("phi-3", "phi3")
_PHI_3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Cut:
    """A way to cut a text into words, and what goes with its name."""

    pre_tokenizer: Json
    ignore_merges: bool = False  # words that are in the vocabulary stay whole
    add_bos: bool = False  # unless the file says otherwise


def _split(pattern: str) -> Json:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}
    steps = [{**cut, "behavior": "Isolated"}, byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def _words(numbers: str) -> Json:
    """Llama 3's cut and its relatives', which differ in what of a number is a word."""
    return _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers +
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip


_GPT2 = byte_level(use_regex=True)
_DIGITS: Json = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = _split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = Cut(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
CUTS: dict[str, Cut] = {
    **dict.fromkeys(("gpt-2", "olmo"), Cut(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), Cut(_DIGITS)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_3),
    "smaug-bpe": Cut(_words(r"\p{N}{1,3}")),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2"), Cut(_words(r"\p{N}"))
    ),
    "tekken": Cut(_TEKKEN, ignore_merges=True, add_bos=True),
}  # fmt: skip


def gguf_tokenizer(
    fields: Mapping[str, Any], where: str, context: int
) -> dict[str, bytes]:
    """The files of a `JsonTokenizer`, by name, made of the keys of a GGUF file.

    Args:
      fields: values by key.
      where: the file, for errors.
      context: positions of the longest text.

    Raises:
      UserError: no tokenizer in the file, one of a kind or with a cut that is not
        known, or keys that contradict each other.
    """
    keys = _Keys(fields, where)
    model = keys.get("model", "none")
    if model not in _MODELS:
        raise UserError(
            f"{where} holds no tokenizer that is known here (tokenizer.ggml.model is "
            f"{model!r}; known are {', '.join(_MODELS)}); give one with "
            "--tokenizer=PATH."
        )
    tokens = keys.tokens()
    make = _of_pieces if model == "llama" else _of_merges
    content, begins = make(keys, tokens)
    special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    usual = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {ours: keys.token_id(name, usual.get(name)) for name, ours in special.items()}
    if ids["eos"] is None:
        raise UserError(f"{where} does not say which token ends a text (eos_token_id).")
    if begins and ids["bos"] is None:
        raise UserError(f"{where} does not say which token begins a text.")
    ends = [ids["eos"], keys.token_id("eot"), keys.token_id("eom")]
    stops = {"bos_token_id": ids["bos"], "pad_token_id": ids["pad"]}
    stops = {name: i for name, i in stops.items() if i is not None}
    about: Json = {
        f"{name}_token": tokens.texts[i]
        for name, i in ids.items()
        if i is not None and tokens.kinds[i] != _UNUSED
    }
    about |= {
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    listed = [i for i in dict.fromkeys(ends) if i is not None]
    files = {
        json_tokenizer.RULES: content,
        json_tokenizer.CONFIG: about,
        json_tokenizer.GENERATION: {**stops, "eos_token_id": listed},
    }
    found = {
        name: json.dumps(x, ensure_ascii=False, indent=1).encode()
        for name, x in files.items()
    }
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        found[json_tokenizer.TEMPLATE] = template.encode()
    return found


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The vocabulary of a file by ids, and how each is used."""

    texts: Sequence[str]
    kinds: Sequence[int]
    rstrip: frozenset[int]

    def of(self, *kinds: int) -> frozenset[int]:
        """The ids of some kinds."""
        return frozenset(i for i, kind in enumerate(self.kinds) if kind in kinds)

    def texts_of(self, *kinds: int) -> dict[int, str]:
        """The texts of some kinds, by ids."""
        return {i: self.texts[i] for i in sorted(self.of(*kinds))}


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a file's tokenizer."""

    fields: Mapping[str, Any]
    where: str

    def get(self, name: str, usual: Any = None) -> Any:
        return self.fields.get(f"tokenizer.ggml.{name}", usual)

    def token_id(self, name: str, usual: int | None = None) -> int | None:
        """The id of a token that has a name; None if there is none."""
        found = self.get(f"{name}_token_id", usual)
        count = len(self.get("tokens", ()))
        if found is not None and not 0 <= int(found) < count:
            raise UserError(
                f"{self.where}: {name}_token_id is {found}, and there are {count} ids."
            )
        return None if found is None else int(found)

    def tokens(self) -> _Tokens:
        """The vocabulary.

        Raises:
          UserError: there is none, lists are not as long as each other, or a token is
            there twice.
        """
        texts = self.get("tokens") or []
        kinds = self.get("token_type") or [_NORMAL] * len(texts)
        if not texts or len(kinds) != len(texts):
            raise UserError(
                f"{self.where} has {len(texts)} tokens and {len(kinds)} types of them."
            )
        used = [text for text, kind in zip(texts, kinds, strict=True)
                if kind != _UNUSED]  # fmt: skip
        if len(set(used)) < len(used):
            seen: set[str] = set()
            twice = next(t for t in used if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise UserError(f"{self.where} has the token {twice!r} twice.")
        name = str(self.fields.get("general.name", "")).lower()
        rstrip: frozenset[int] = frozenset()
        if any(part in name for part in _PHI_3):
            rstrip = frozenset(
                i for i, kind in enumerate(kinds)
                if kind in (_CONTROL, _USER, _UNKNOWN) and texts[i] not in _PHI_3_PLAIN
            )  # fmt: skip
        return _Tokens(texts, kinds, rstrip)


def _of_pieces(keys: _Keys, tokens: _Tokens) -> tuple[Json, bool]:
    """tokenizer.json of pieces with scores, and whether a text has a beginning."""
    scores = keys.get("scores") or []
    if len(scores) != len(tokens.texts):
        raise UserError(
            f"{keys.where} has {len(tokens.texts)} tokens and {len(scores)} scores of "
            "them."
        )
    pieces = Pieces(
        tokens.texts,
        scores,
        special=tokens.of(_UNKNOWN, _CONTROL),
        user=tokens.of(_USER),
        of_bytes=tokens.of(_BYTE),
        unk_id=keys.token_id("unknown", 0) or 0,
        adds_space=bool(keys.get("add_space_prefix", True)),
        unused=tokens.of(_UNUSED),
    )
    begins = bool(keys.get("add_bos_token", True))
    bos = keys.token_id("bos", 1) if begins else None
    return rules_of_pieces(pieces, bos, tokens.rstrip), begins


def _of_merges(keys: _Keys, tokens: _Tokens) -> tuple[Json, bool]:
    """tokenizer.json of merges of bytes, and whether a text has a beginning."""
    pre = keys.get("pre", "default")
    if pre not in CUTS:
        raise UserError(
            f"{keys.where}: tokenizer.ggml.pre is {pre!r}, a way to cut text that is "
            f"not known here; known are {', '.join(CUTS)}. Give a tokenizer with "
            "--tokenizer=PATH."
        )
    cut = CUTS[pre]
    unused = tokens.of(_UNUSED)
    vocab = {text: i for i, text in enumerate(tokens.texts) if i not in unused}
    merges = []
    for line in keys.get("merges") or []:
        one, _, other = line.partition(" ")
        if not {one, other, one + other} <= vocab.keys():
            raise UserError(
                f"{keys.where} merges {line!r}, which is not of its vocabulary."
            )
        merges.append([one, other])
    begins = bool(keys.get("add_bos_token", cut.add_bos))
    bos = keys.token_id("bos") if begins else None
    added = Added(
        tokens.texts_of(_CONTROL, _UNKNOWN), tokens.texts_of(_USER), tokens.rstrip
    )
    content = rules(
        None if bos is None else (bos, tokens.texts[bos]),
        added,
        model=byte_pairs(vocab, merges, ignore_merges=cut.ignore_merges),
        pre_tokenizer=cut.pre_tokenizer,
        decoder=byte_level(use_regex=True),
    )
    return content, begins
