"""A batch of texts on its way from the prompts to the last token.

Axes: B batch, P prompt, E tokens of a text at most.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mtp_jax.cache import grow
from mtp_jax.decode_program import Programs, Prompts
from mtp_jax.decoders.sampling import Chance, Sampling, law_of
from mtp_jax.decoders.state import Decoder, DecodeState
from mtp_jax.sharding import batch_shards, spec

_LEAST = 64  # room for a text; it comes in doubles of this, so that programs are shared


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts on the host, as far as they are written."""

    tokens_BE: np.ndarray
    forward_BE: np.ndarray
    agreed_BE: np.ndarray
    departed_BE: np.ndarray | None  # None: the decoder is exact
    length_B: np.ndarray
    done_B: np.ndarray
    start_B: np.ndarray  # lengths of the prompts

    def new_tokens(self, b: int | np.integer) -> list[int]:
        """The tokens after the prompt of text b."""
        return self.tokens_BE[b, self.start_B[b] : self.length_B[b]].tolist()


class Batch:
    """Texts that are written together, each with its own length and end.

    The cache holds a few more tokens than the longest text has, and doubles when it is
    full: short texts do not pay for a long limit. Needs the mesh to be set.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        decoder: Decoder,
        rows: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling,
        first: int = 0,
    ):
        """Compiles what is not compiled yet, so that no compilation is measured.

        Args:
          programs: of the model.
          params: from `decode_model.unstack`, with the heads that are used.
          decoder: how to decode.
          rows: token ids of the prompts, int32, at least one of each.
          max_new_tokens: most tokens of a continuation.
          sampling: the law of the next token.
          first: number of the first prompt; its draws depend on that and the seed.
        """
        self._programs = programs
        self._params = params
        self._decoder = decoder
        self._depth = len(params["heads"])
        self._width = decoder.width(self._depth)
        longest = max(map(len, rows))
        # A finished text is still read with the others: its drafts need room, too.
        self._room = _ladder(longest + max_new_tokens + self._width)
        self._slots = min(self._room, _ladder(longest + 2 * self._width))
        self._prompts = _prompts(rows, max_new_tokens, sampling, first, params)
        self._count = len(rows)
        self._begin, shapes = programs.begin(
            decoder, params, self._prompts, self._room, self._slots
        )
        programs.advance(decoder, params, self._depth, shapes)
        self._state: DecodeState | None = None

    def begin(self) -> None:
        """Reads the prompts and commits the first token of each text."""
        self._state = self._begin(self._params, self._prompts)

    def advance(self, forwards: int) -> Texts:
        """Goes on for so many forward passes, or until all texts are done."""
        assert self._state is not None, "begin comes first"
        end = int(self._state.forward) + forwards
        while True:
            state = self._state
            program = self._programs.advance(
                self._decoder, self._params, self._depth, state
            )
            left = np.int32(end - int(state.forward))
            state = self._state = program(self._params, state, left)
            texts = self._fetch()
            if texts.done_B.all() or int(state.forward) >= end:
                return texts
            self._state = _with_slots(state, 2 * state.cache.slots)

    def end(self, rows: Iterable[int]) -> None:
        """Ends texts where they are."""
        assert self._state is not None, "begin comes first"
        done_B = _host(self._state.done_B).copy()
        done_B[list(rows)] = True
        done_B = jax.device_put(done_B, self._state.done_B.sharding)
        self._state = dataclasses.replace(self._state, done_B=done_B)

    def _fetch(self) -> Texts:
        assert self._state is not None, "begin comes first"
        names = ("tokens_BE", "forward_BE", "agreed_BE", "length_B", "done_B")
        arrays = {name: _host(getattr(self._state, name)) for name in names}
        departed_BE = self._state.departed_BE
        return Texts(
            **arrays,
            departed_BE=None if departed_BE is None else _host(departed_BE),
            start_B=_host(self._prompts.length_B),
        )


def _ladder(tokens: int, least: int = _LEAST) -> int:
    """The first of least, 2 least, 4 least ... that is enough."""
    return max(least, 1 << (tokens - 1).bit_length())


def _prompts(
    rows: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    first: int,
    params: Any,
) -> Prompts:
    """Rows as arrays on the mesh, with rows of nothing to fill it up."""
    mesh = jax.sharding.get_mesh()
    shards = batch_shards(mesh)
    b = -(-len(rows) // shards) * shards
    tokens_BP = np.zeros((b, _ladder(max(map(len, rows)), least=8)), np.int32)
    length_B = np.ones(b, np.int32)
    for i, row in enumerate(rows):
        tokens_BP[i, : len(row)] = row
        length_B[i] = len(row)
    fold_in = functools.partial(jax.random.fold_in, jax.random.key(sampling.seed))
    keys_B = jax.vmap(fold_in)(np.arange(first, first + b, dtype=np.uint32))
    put = functools.partial(_put, mesh)
    return Prompts(
        tokens_BP=put(tokens_BP),
        length_B=put(length_B),
        limit_B=put(length_B + np.int32(max_new_tokens)),
        done_B=put(np.arange(b) >= len(rows)),
        law=law_of(sampling, params["w_embedding"].shape[0]),
        chance=Chance(put(np.asarray(jax.random.key_data(keys_B)))),
    )


def _put(mesh: Mesh, x: np.ndarray) -> jax.Array:
    axes = ("batch", *[None] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(mesh, spec(*axes)))


@functools.partial(jax.jit, static_argnums=1)
def _with_slots(state: DecodeState, slots: int) -> DecodeState:
    return dataclasses.replace(state, cache=grow(state.cache, slots))


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
