"""The tokenizers of llama2.c, `tokenizer.bin`, as the files of a tokenizer.json.

SentencePiece's byte pairs: the length of the longest piece, then a score, a length and
a text of each, little-endian. Ids 0 to 2 are unknown, begin and end of text, the 256
after them bytes; a text gets a space in front. The program stops at begin of text, too,
with which its models' texts are joined (github.com/karpathy/llama2.c, run.c).
"""

import json
import pathlib
import struct

from mtp_jax.data import json_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.interop.tokenizer_rules import SPACE, Json, Pieces, rules_of_pieces

_NAMES = ("<unk>", "<s>", "</s>")
_FIRST_BYTE = len(_NAMES)
_USUAL = "tokenizer.bin"


def is_tokenizer(path: pathlib.Path) -> bool:
    """True for the name of such a file."""
    return path.suffix == ".bin" and path.name.startswith("tok")


def tokenizer_beside(model: pathlib.Path) -> pathlib.Path | None:
    """The file beside a model: tokenizer.bin, or the only one that it can be."""
    if (usual := model.parent / _USUAL).exists():
        return usual
    found = [p for p in model.parent.glob("tok*.bin") if p != model]
    return found[0] if len(found) == 1 else None


def llama2c_tokenizer(path: pathlib.Path) -> dict[str, bytes]:
    """The files of a `JsonTokenizer`, by name.

    Raises:
      UserError: the file cannot be read, is cut, or no tokenizer of llama2.c.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}.") from None
    texts, scores = _pieces(data, path)
    of_bytes = frozenset(range(_FIRST_BYTE, _FIRST_BYTE + 256))
    pieces = Pieces(
        texts,
        scores,
        special=frozenset(range(_FIRST_BYTE)),
        user=frozenset(),
        of_bytes=of_bytes,
        unk_id=0,
        adds_space=True,
    )
    named = zip(("unk", "bos", "eos"), _NAMES, strict=True)
    about: Json = {f"{name}_token": text for name, text in named}
    about |= {
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    stops = {"bos_token_id": 1, "eos_token_id": [2, 1]}
    files = {
        json_tokenizer.RULES: rules_of_pieces(pieces, 1),
        json_tokenizer.CONFIG: about,
        json_tokenizer.GENERATION: stops,
    }
    return {
        name: json.dumps(x, ensure_ascii=False, indent=1).encode()
        for name, x in files.items()
    }


def _pieces(data: bytes, path: pathlib.Path) -> tuple[list[str], list[float]]:
    """Texts, with the sign for spaces, and scores.

    Raises:
      UserError: the bytes are not those of such a file.
    """
    texts: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        (longest,) = struct.unpack_from("<i", data)
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            text = data[at + 8 : at + 8 + size]
            if not 0 <= size <= longest or len(text) != size:
                raise ValueError(f"piece {len(texts)} has a length of {size}")
            texts.append(text.decode())
            scores.append(score)
            at += 8 + size
        of_bytes = [f"<0x{i:02X}>" for i in range(256)]
        if texts[_FIRST_BYTE : _FIRST_BYTE + 256] != of_bytes:
            raise ValueError("ids 3 to 258 are not the bytes")
        texts = [*_NAMES, *texts[_FIRST_BYTE:]]
        if len(set(texts)) < len(texts):
            raise ValueError("a piece is there twice")
    except (struct.error, ValueError) as error:
        raise UserError(
            f"tokenizer {path} is cut, or none of llama2.c ({error})."
        ) from None
    return [text.replace(" ", SPACE) for text in texts], scores
