"""Text from a model: prompts in, continuations out, in batches on any mesh.

Axes: B batch, P prompt, S slots, T new tokens.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mtp_jax.config import ModelConfig
from mtp_jax.decode_program import Program, compile_program
from mtp_jax.decoders import DECODERS
from mtp_jax.decoders.state import DecodeState
from mtp_jax.errors import UserError
from mtp_jax.sharding import batch_shards, spec
from mtp_jax.tokenizer import Tokenizer

_SLOTS = 64  # slots come in multiples of it, so that near lengths share a program
_LOOK = 16  # forward passes between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt and its continuation.

    Counts end with the token that ends the text, that is end of text, or the token that
    completes a stop string, or the last one, and with the forward pass that made it.
    `accepted_by_head[i]` is the share of the forward passes that verified drafts in
    which the draft of head i + 2 and all drafts before it were right.
    """

    prompt: str
    text: str  # up to the stop string
    tokens: list[int]  # new ones, without end of text; none reaches into a stop string
    forwards: int  # forward passes, the one that reads the prompt included
    tokens_per_forward: float  # end of text and stop string count; 1.0 for plain
    accepted_by_head: list[float]
    tokens_per_s: float  # of the batch: its new tokens / its time, without compilation
    finish: str  # "length", "eos" or "stop"


class Generator:
    """A model ready to write; keeps what it compiled for calls of equal shapes."""

    def __init__(
        self, model_cfg: ModelConfig, params: Any, tokenizer: Tokenizer, mesh: Mesh
    ):
        """Takes parameters as `model_builder` makes them, on the mesh."""
        self.cfg = model_cfg
        self.tokenizer = tokenizer
        self.mesh = mesh
        self._programs: dict[tuple[str, int, int, int, int], Program] = {}
        self.use(params)

    def use(self, params: Any) -> None:
        """Takes other parameters of the same model; None lets go of the present."""
        # Layers cast their weights whenever they use them; once is enough here.
        with jax.set_mesh(self.mesh):
            self._params = jax.tree.map(
                lambda w: w.astype(self.cfg.compute_dtype), params
            )
        self._first_heads: dict[int, tuple[ModelConfig, Any]] = {}

    def generate(
        self,
        prompts: Sequence[str] | Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        decoder: str = "blockwise",
        heads: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Continues every prompt, all in one batch.

        Args:
          prompts: texts, or token ids; begin of text is put in front.
          max_new_tokens: most tokens a continuation may have, end of text included.
          decoder: a name in DECODERS.
          heads: use the first so many heads; all if None.
          stop: a continuation ends before the first of these that it contains.

        Returns:
          A generation a prompt. Its `tokens_per_s` counts the new tokens of the batch
          and the time from the prompts' ids to the last id of a continuation.

        Raises:
          UserError: an argument out of range, or a token id the model does not know.
        """
        heads = self._check(max_new_tokens, decoder, heads, stop)
        rows = [self._prompt_ids(prompt) for prompt in prompts]
        if not rows:
            return []
        with jax.set_mesh(self.mesh):
            program, batch = self._prepare(rows, max_new_tokens, decoder, heads)
            _, params = self._with_heads(DECODERS[decoder].heads(heads))
            started = time.perf_counter()
            host = self._decode(program, params, batch, len(rows), stop)
            elapsed_s = time.perf_counter() - started
        drafts = DECODERS[decoder].heads(heads) - 1
        results = [self._result(host, b, stop, drafts) for b in range(len(rows))]
        made = sum(r.tokens_per_forward * r.forwards for r in results)
        return [dataclasses.replace(r, tokens_per_s=made / elapsed_s) for r in results]

    def _check(
        self, max_new_tokens: int, decoder: str, heads: int | None, stop: Sequence[str]
    ) -> int:
        n = self.cfg.n_future_tokens
        heads = n if heads is None else heads
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
        if decoder not in DECODERS:
            raise UserError(f"no decoder {decoder!r}; known are {list(DECODERS)}.")
        if not 1 <= heads <= n:
            raise UserError(f"heads is {heads}; the model has heads 1 to {n}.")
        if isinstance(stop, str) or not all(stop):
            raise UserError("a stop string is empty; give some text, or none at all.")
        return heads

    def _prompt_ids(self, prompt: str | np.ndarray) -> np.ndarray:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = np.concatenate([[self.tokenizer.bos_id], np.asarray(ids, np.int64)])
        if not 0 <= ids.min() <= ids.max() < self.cfg.vocab_size:
            raise UserError(
                f"a prompt has token ids from {ids.min()} to {ids.max()}; the model "
                f"knows 0 to {self.cfg.vocab_size - 1}."
            )
        return ids.astype(np.int32)

    def _prepare(
        self, rows: list[np.ndarray], max_new_tokens: int, decoder: str, heads: int
    ) -> tuple[Program, list[jax.Array]]:
        """The program, and its tokens_BP, length_B, limit_B and done_B."""
        shards = batch_shards(self.mesh)
        b = -(-len(rows) // shards) * shards
        longest = max(map(len, rows))
        p = max(8, 1 << (longest - 1).bit_length())
        s = -(-(longest + max_new_tokens) // _SLOTS) * _SLOTS
        tokens_BP = np.zeros((b, p), np.int32)
        length_B = np.ones(b, np.int32)
        done_B = np.arange(b) >= len(rows)  # rows that only fill up the batch
        for i, row in enumerate(rows):
            tokens_BP[i, : len(row)] = row
            length_B[i] = len(row)
        limit_B = length_B + np.int32(max_new_tokens)
        batch = [self._put(x) for x in (tokens_BP, length_B, limit_B, done_B)]
        used = DECODERS[decoder].heads(heads)
        key = decoder, used, b, p, max(p, s)
        if key not in self._programs:
            cfg, params = self._with_heads(used)
            self._programs[key] = compile_program(
                cfg, params, DECODERS[decoder], self.tokenizer.eos_id, key[-1], batch
            )
        return self._programs[key], batch

    def _with_heads(self, n: int) -> tuple[ModelConfig, Any]:
        """The model with its first n heads only, which is a model too."""
        if n not in self._first_heads:
            layers = self.cfg.num_trunk_layers + n
            cfg = dataclasses.replace(self.cfg, num_layers=layers, n_future_tokens=n)
            some = jax.tree.map(lambda w: w[:n], self._params["heads"])
            params = self._params
            if n < self.cfg.n_future_tokens:
                params = {**self._params, "heads": some}
            self._first_heads[n] = cfg, params
        return self._first_heads[n]

    def _put(self, x: np.ndarray) -> jax.Array:
        axes = ("batch", *[None] * (x.ndim - 1))
        return jax.device_put(x, NamedSharding(self.mesh, spec(*axes)))

    def _decode(
        self,
        program: Program,
        params: Any,
        batch: list[jax.Array],
        rows: int,
        stop: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Runs to the end; the arrays of the final state but its cache."""
        state = program.begin(params, *batch)
        # Without stop strings there is nothing to look for on the way.
        forwards = np.int32(_LOOK if stop else state.tokens_BS.shape[1])
        while True:
            state = program.advance(params, state, forwards)
            host = _fetch(state)
            host["prompt_B"] = _fetch_one(batch[1])
            done_B = host["done_B"].copy()
            for b in np.flatnonzero(~done_B[:rows]) if stop else ():
                done_B[b] = self._find_stop(self._new_tokens(host, b), stop) is not None
            if done_B.all():
                return host
            state = dataclasses.replace(state, done_B=self._put(done_B))

    def _new_tokens(
        self, host: dict[str, np.ndarray], b: int | np.integer
    ) -> list[int]:
        return host["tokens_BS"][b, host["prompt_B"][b] : host["length_B"][b]].tolist()

    def _find_stop(self, tokens: list[int], stop: Sequence[str]) -> int | None:
        """How many tokens it takes to complete a stop string, if there is one."""

        def complete(count: int) -> bool:
            text = self.tokenizer.decode(tokens[:count])
            return any(s in text for s in stop)

        if not stop or not complete(len(tokens)):
            return None
        low, high = 0, len(tokens)  # not complete at low, complete at high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if complete(middle) else (middle, high)
        return high

    def _result(
        self, host: dict[str, np.ndarray], b: int, stop: Sequence[str], drafts: int
    ) -> Generation:
        start = int(host["prompt_B"][b])
        tokens = self._new_tokens(host, b)
        made, finish = len(tokens), "length"
        if tokens[-1] == self.tokenizer.eos_id:
            tokens, finish = tokens[:-1], "eos"
        text = self.tokenizer.decode(tokens)
        if (found := self._find_stop(tokens, stop)) is not None:
            made, finish = found, "stop"
            text = self.tokenizer.decode(tokens[:found])
            text = text[: min(text.find(s) for s in stop if s in text)]
            kept = found
            while len(self.tokenizer.decode(tokens[:kept])) > len(text):
                kept -= 1
            tokens = tokens[:kept]
        forward_T = host["forward_BS"][b, start : start + made]
        agreed_T = host["agreed_BS"][b, start : start + made]
        passes, first = np.unique(forward_T, return_index=True)
        agreed = agreed_T[first[1:]]  # the first pass read the prompt
        return Generation(
            prompt=self.tokenizer.decode(host["tokens_BS"][b, :start]),
            text=text,
            tokens=tokens,
            forwards=len(passes),
            tokens_per_forward=made / len(passes),
            accepted_by_head=[
                float(np.mean(agreed > i)) if agreed.size else 0.0
                for i in range(drafts)
            ],
            tokens_per_s=0.0,
            finish=finish,
        )


def _fetch(state: DecodeState) -> dict[str, np.ndarray]:
    """The state on the host, without its cache and what the decoder keeps."""
    names = ("tokens_BS", "forward_BS", "agreed_BS", "length_B", "done_B")
    return {name: _fetch_one(getattr(state, name)) for name in names}


def _fetch_one(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
