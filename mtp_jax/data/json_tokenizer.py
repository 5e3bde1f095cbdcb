"""The tokenizers of Hugging Face folders: tokenizer.json, and what stands beside it.

tokenizer.json has the vocabulary and the rules. Which ids begin and end a text stands
in other files: `tokenizer_config.json`, `special_tokens_map.json`, and the ids at which
generation stops in `generation_config.json`, or else the model's `config.json`. All of
them are kept byte for byte.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from mtp_jax.data.utf8 import MOST_BYTES, pending_bytes
from mtp_jax.errors import UserError

RULES, CONFIG, MAP = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
FILES = (RULES, CONFIG, MAP, GENERATION, TEMPLATE)
MODEL = "config.json"  # of the model: read where there is no generation_config.json

_SPACE = "\u2581"  # stands for a space inside the pieces of SentencePiece
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OF_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class JsonTokenizer:
    """A tokenizer.json, with the special tokens that the files beside it name.

    `encode` puts nothing in front of a text and nothing behind it; a special token that
    is written out in a text becomes its id, as in the library. Where the files name no
    begin of text, `bos_id` is end of text, and nothing is put in front of prompts.
    """

    kind = "tokenizer.json"

    def __init__(self, files: Mapping[str, bytes], name: str):
        """Loads the content of files by their names; `name` is for messages.

        Args:
          files: of those in `FILES` that there are, tokenizer.json at least.
          name: where they are from.

        Raises:
          UserError: one of them is damaged, pieces whose bytes are not known, or no id
            for end of text.
        """
        kept = {key: files[key] for key in FILES if key in files}
        self.files: Mapping[str, bytes] = kept
        self.name = name
        self._config = _parsed(files, CONFIG)
        self._map = _parsed(files, MAP)
        stops = _parsed(files, GENERATION)
        self.special_texts = self._special_texts()
        rules = _parsed(files, RULES)
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(rules))
        except Exception as error:
            raise UserError(f"{RULES} is not one of a tokenizer ({error}).") from None
        self._bytes_of = _bytes_of_pieces(rules.get("decoder"))
        self._own_spaces = _spaces_in_front(rules.get("decoder"))
        self._add_named_tokens()
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._model.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in added.items() if t.special)
        self._added_ids = frozenset(added)
        self.end_ids = self._end_ids(stops)
        self.eos_id = self.end_ids[0]
        bos_id = self._named_id("bos", stops)
        self.bos_id = self.eos_id if bos_id is None else bos_id
        self.prompt_begin = self._prompt_begin(bos_id)
        # It would put ids in front, and take spaces out of what a token stands for.
        rules = json.loads(self._model.to_str())
        self._model = tokenizers.Tokenizer.from_str(
            json.dumps({**rules, "post_processor": None})
        )
        known = [
            self.bos_id,
            self.eos_id,
            sorted((i, str(t)) for i, t in added.items()),
        ]
        digest = hashlib.sha256(self.files[RULES])
        digest.update(json.dumps(known).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the chat template; None if the files have none."""
        if TEMPLATE in self.files:
            return self.files[TEMPLATE].decode(errors="replace")
        found = self._config.get("chat_template")
        if isinstance(found, list):  # of several with names
            named = {x.get("name"): x.get("template") for x in found}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [tokens], without begin and end of text."""
        return np.array(self._model.encode(text, add_special_tokens=False).ids, "i4")

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, int32 [tokens], and the characters of each, int32 [tokens, 2].

        Those from the first number up to the second. The tokens of a character that has
        several all stand for it.
        """
        found = self._model.encode(text, add_special_tokens=False)
        spans = np.array(found.offsets, np.int32).reshape(-1, 2)
        return np.array(found.ids, np.int32), spans

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens, begin and end of text too, are left out.

        Bytes that are not UTF-8 become U+FFFD, one by one. The library makes U+FFFD of
        all bytes of a run then, so a text that goes on could lose what it had.
        """
        values = np.asarray(ids, np.int64).tolist()
        text = b"".join(map(self._piece, values)).decode(errors="replace")
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self._own_spaces) :]

    def unfinished(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of ids at the end that begin a character and do not end it."""
        last: list[bytes] = []
        for i in reversed(np.asarray(ids, np.int64)[-MOST_BYTES:].tolist()):
            last.insert(0, self._piece(i))
        pending = pending_bytes(b"".join(last))
        count = 0
        while pending > 0:
            count += 1
            pending -= len(last[-count])
        return count

    def piece_bytes(self) -> np.ndarray:
        """The number of bytes of UTF-8 of each id, int32 [vocab_size].

        Special tokens count 0. A tokenizer that puts a space in front of every text
        counts it, as in `SentencePieceTokenizer`.
        """
        return np.array([len(self._piece(i)) for i in range(self.vocab_size)], "i4")

    def with_end(self, end_id: int) -> "JsonTokenizer":
        """Returns this tokenizer with one more id that ends a text."""
        stops = _parsed(self.files, GENERATION)
        stops["eos_token_id"] = [*self.end_ids, end_id]
        files = {**self.files, GENERATION: (json.dumps(stops, indent=2)).encode()}
        return JsonTokenizer(files, self.name)

    def text_of(self, i: int) -> str:
        """An id as it stands in the vocabulary, special tokens too."""
        return self._model.id_to_token(i) or ""

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        pieces = []
        for i in range(self.vocab_size):
            text = self._model.id_to_token(i)
            if text is None or i in self.special_ids:
                pieces.append(b"")
            else:
                pieces.append(self._bytes_of(text, i in self._added_ids))
        return pieces

    def _piece(self, i: int) -> bytes:
        return self._pieces[i] if 0 <= i < self.vocab_size else b""

    def _special_texts(self) -> dict[str, str]:
        """Texts of bos_token, eos_token and so on, those that are named."""
        found = {}
        for name in _NAMED:
            key = f"{name}_token"
            value = self._config.get(key, self._map.get(key))
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
        return found

    def _add_named_tokens(self) -> None:
        """Makes special tokens of those that only the configuration names as such."""
        listed = self._config.get("added_tokens_decoder") or {}
        try:
            entries = [dict(listed[key]) for key in sorted(listed, key=int)]
            entries += [
                {"content": text, "special": True}
                for text in self.special_texts.values()
            ]
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = self._config.get(key) or []
                more = more.values() if isinstance(more, dict) else more
                named = [x if isinstance(x, dict) else {"content": x} for x in more]
                entries += [{**entry, "special": True} for entry in named]
            known = {str(t) for t in self._model.get_added_tokens_decoder().values()}
            for entry in entries:
                entry.pop("__type", None)
                if (content := str(entry.pop("content"))) in known:
                    continue
                known.add(content)
                token = tokenizers.AddedToken(content, **entry)
                if token.special:
                    self._model.add_special_tokens([token])
                else:
                    self._model.add_tokens([token])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{CONFIG}: its added tokens are damaged ({error})."
            ) from None

    def _named_id(self, name: str, stops: dict[str, Any]) -> int | None:
        """The id of the token that the files name so; None if they do not."""
        text = self.special_texts.get(f"{name}_token")
        if text is not None and (found := self._model.token_to_id(text)) is not None:
            return int(found)
        value = stops.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int else None

    def _end_ids(self, stops: dict[str, Any]) -> tuple[int, ...]:
        first = self._named_id("eos", stops)
        listed = stops.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        found = [i for i in (first, *listed) if i is not None]
        if not all(type(i) is int for i in found):
            raise UserError(
                f"{GENERATION}: eos_token_id is {stops['eos_token_id']!r}; it must be "
                "an id or a list of ids."
            )
        if not found:
            raise UserError(
                f"no file beside {RULES} names the token that ends a text; give "
                f'"eos_token" in {CONFIG}.'
            )
        if max(found) >= self.vocab_size or min(found) < 0:
            raise UserError(
                f"end of text has the ids {found}, the vocabulary {self.vocab_size}; "
                f"mend {GENERATION}."
            )
        return tuple(dict.fromkeys(found))

    def _prompt_begin(self, bos_id: int | None) -> tuple[int, ...]:
        """The ids that the files have put in front of a text."""
        # As transformers does: what the configuration says counts more than the rules.
        if (asked := self._config.get("add_bos_token")) is not None:
            return (bos_id,) if asked and bos_id is not None else ()
        if "add_eos_token" in self._config:
            return ()
        probe = "a"
        plain = self._model.encode(probe, add_special_tokens=False).ids
        framed = self._model.encode(probe).ids
        starts = range(len(framed) - len(plain) + 1)
        at = next(i for i in starts if framed[i : i + len(plain)] == plain)
        return tuple(framed[:at])


def _parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no such file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object.")
    return value


def stops_of_model(config: bytes) -> bytes | None:
    """A generation_config.json from a model's config.json; None if it names no ids."""
    found = _parsed({MODEL: config}, MODEL)
    keys = ("bos_token_id", "eos_token_id")
    ids = {key: found[key] for key in keys if found.get(key) is not None}
    return json.dumps(ids).encode() if ids else None


def _bytes_of_pieces(decoder: Any) -> Callable[[str, bool], bytes]:
    """`f(piece, added)`: the bytes that a piece of the vocabulary stands for.

    Raises:
      UserError: the rules decode in a way for which that is not known.
    """
    steps = decoder if isinstance(decoder, dict) else {}
    listed = steps.get("decoders", [steps])
    kinds = {step.get("type") for step in listed}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return lambda piece, added: _of_byte_level(piece)
    if kinds <= _OF_SENTENCEPIECE and kinds & {"Replace", "Metaspace"}:
        has_bytes = "ByteFallback" in kinds

        def of_piece(piece: str, added: bool) -> bytes:
            if has_bytes and (found := _BYTE.fullmatch(piece)):
                return bytes([int(found[1], 16)])
            return piece.replace(_SPACE, " ").encode()

        return of_piece
    raise UserError(
        f"{RULES} has the decoder {' + '.join(sorted(map(str, kinds)))}; known are "
        "ByteLevel, and those of SentencePiece (Replace, ByteFallback, Fuse, Strip, "
        "Metaspace)."
    )


def _spaces_in_front(decoder: Any) -> int:
    """How many spaces that encoding puts in front decoding takes off, at most."""
    steps = decoder if isinstance(decoder, dict) else {}
    found = 0
    for step in steps.get("decoders", [steps]):
        if step.get("type") == "Strip" and step.get("content") == " ":
            found += int(step.get("start", 0))
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            found += scheme != "never" and step.get("add_prefix_space", True)
    return found


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte (GPT-2's)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    letters = {chr(b): b for b in own}
    return letters | {chr(256 + i): b for i, b in enumerate(rest)}


def _of_byte_level(piece: str) -> bytes:
    letters = byte_letters()
    if all(c in letters for c in piece):
        return bytes(letters[c] for c in piece)
    return piece.encode()  # an added token, which stands for itself
