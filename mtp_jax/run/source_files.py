"""The files of a model that several processes import: alike everywhere, hashed once."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.distributed import hosts
from mtp_jax.errors import UserError
from mtp_jax.interop.formats import Foreign
from mtp_jax.parallel.processes import of_all

_BYTES = hashlib.sha256().digest_size


def refuse_other_sources(foreign: Foreign, tokenizer: Tokenizer) -> None:
    """Refuses a model that is another one on another host, by all that is small of it.

    That is its config, the names, shapes and sizes of its tensors and files, and its
    tokenizer; values are compared at the end, by what the whole model says.

    Raises:
      UserError: on all hosts, naming those whose model is not that of host 0.
    """
    source = foreign.source
    content = {
        "model": dataclasses.asdict(foreign.model),
        "family": [foreign.format, foreign.family],
        "shapes": sorted(source.shapes.items()),
        "files": [[path.name, path.stat().st_size] for path in source.files],
        "ignored": sorted(foreign.ignored),
        "tokenizer": tokenizer.fingerprint,
    }
    text = json.dumps(content, sort_keys=True)
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = of_all(own)
    others = [i for i, digest in enumerate(found) if (digest != found[0]).any()]
    if others:
        named = ", ".join(hosts.name_of(i) for i in others)
        raise UserError(
            f"{source.where} is another model on {named} than on {hosts.name_of(0)}; "
            "give all hosts the same files."
        )


def digests(files: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The sha256 of each file, in hexadecimal; each process reads its share of them."""
    own = np.zeros((len(files), _BYTES), np.uint8)
    for i in range(jax.process_index(), len(files), jax.process_count()):
        with files[i].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        own[i] = np.frombuffer(digest, np.uint8)
    found = of_all(own).max(axis=0)  # 0 where another process has read it
    return {file: found[i].tobytes().hex() for i, file in enumerate(files)}
