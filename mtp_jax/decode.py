"""Text from a model: prompts in, continuations out, in batches on any mesh.

Axes: B batch, T new tokens.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtp_jax.config import ModelConfig
from mtp_jax.decode_batch import Batch, Texts
from mtp_jax.decode_model import unstack
from mtp_jax.decode_program import Programs
from mtp_jax.decoders import DECODERS
from mtp_jax.decoders.sampling import Sampling
from mtp_jax.decoders.state import Decoder
from mtp_jax.errors import UserError
from mtp_jax.tokenizer import Tokenizer

_LOOK = 16  # forward passes between two looks for stop strings
_GREEDY = Sampling()


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
    heads: list[
        int
    ]  # which head said each of them first: 1, or the one that drafted it
    forwards: int  # forward passes, the one that reads the prompt included
    tokens_per_forward: float  # end of text and stop string count; 1.0 for plain
    accepted_by_head: list[float]
    tokens_per_s: float  # of the batch: its new tokens / its time, without compilation
    finish: str  # "length", "eos" or "stop"
    departures: int | None = None  # tokens not the exact choice; None: exact decoder


class Generator:
    """A model ready to write; keeps what it compiled for calls of equal shapes."""

    def __init__(
        self, model_cfg: ModelConfig, params: Any, tokenizer: Tokenizer, mesh: Mesh
    ):
        """Takes parameters as `model_builder` makes them, on the mesh."""
        self.cfg = model_cfg
        self.tokenizer = tokenizer
        self.mesh = mesh
        self._programs = Programs(model_cfg, tokenizer.eos_id)
        self.use(params)

    def use(self, params: Any) -> None:
        """Takes other parameters of the same model; None lets go of the present."""
        with jax.set_mesh(self.mesh):
            self._params: Any = None if params is None else unstack(self.cfg, params)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        decoder: str | Decoder = "blockwise",
        heads: int | None = None,
        sampling: Sampling = _GREEDY,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Continues every prompt, all in one batch.

        Args:
          prompts: texts, or token ids; begin of text is put in front.
          max_new_tokens: most tokens a continuation may have, end of text included.
          decoder: a name in DECODERS, or one with options of its own.
          heads: use the first so many heads; all if None.
          sampling: the law of the next token; greedy if not given.
          stop: a continuation ends before the first of these that it contains.

        Returns:
          A generation a prompt. Its `tokens_per_s` counts the new tokens of the batch
          and the time from the prompts' ids to the last id of a continuation.

        Raises:
          UserError: an argument out of range, or a token id the model does not know.
        """
        decoder, heads = self._check(max_new_tokens, decoder, heads, stop)
        rows = [self._prompt_ids(prompt) for prompt in prompts]
        if not rows:
            return []
        # Without stop strings there is nothing to look for on the way.
        look = _LOOK if stop else max_new_tokens
        with jax.set_mesh(self.mesh):
            assert self._params is not None, "no parameters in use"
            params = {**self._params, "heads": self._params["heads"][:heads]}
            batch = Batch(
                self._programs, params, decoder, rows, max_new_tokens, sampling
            )
            started, compiled = time.perf_counter(), self._programs.compile_s
            batch.begin()
            while True:
                texts = batch.advance(look)
                if texts.done_B.all():
                    break
                batch.end(b for b in range(len(rows)) if self._stops(texts, b, stop))
            compiled = self._programs.compile_s - compiled  # for a cache that grew
            elapsed_s = time.perf_counter() - started - compiled
        results = [self._result(texts, b, stop, heads - 1) for b in range(len(rows))]
        made = sum(r.tokens_per_forward * r.forwards for r in results)
        return [dataclasses.replace(r, tokens_per_s=made / elapsed_s) for r in results]

    def _check(
        self,
        max_new_tokens: int,
        decoder: str | Decoder,
        heads: int | None,
        stop: Sequence[str],
    ) -> tuple[Decoder, int]:
        """The decoder, and how many heads it runs."""
        n = self.cfg.n_future_tokens
        heads = n if heads is None else heads
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
        if isinstance(decoder, str):
            if decoder not in DECODERS:
                raise UserError(f"no decoder {decoder!r}; known are {list(DECODERS)}.")
            decoder = DECODERS[decoder]()
        if not 1 <= heads <= n:
            raise UserError(f"heads is {heads}; the model has heads 1 to {n}.")
        if isinstance(stop, str) or not all(stop):
            raise UserError("a stop string is empty; give some text, or none at all.")
        return decoder, decoder.heads(heads)

    def _prompt_ids(self, prompt: str | np.ndarray) -> np.ndarray:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = np.concatenate([[self.tokenizer.bos_id], np.asarray(ids, np.int64)])
        if not 0 <= ids.min() <= ids.max() < self.cfg.vocab_size:
            raise UserError(
                f"a prompt has token ids from {ids.min()} to {ids.max()}; the model "
                f"knows 0 to {self.cfg.vocab_size - 1}."
            )
        return ids.astype(np.int32)

    def _stops(self, texts: Texts, b: int, stop: Sequence[str]) -> bool:
        return self._find_stop(texts.new_tokens(b), stop) is not None

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
        self, texts: Texts, b: int, stop: Sequence[str], drafts: int
    ) -> Generation:
        start = int(texts.start_B[b])
        tokens = texts.new_tokens(b)
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
        forward_T = texts.forward_BE[b, start : start + made]
        agreed_T = texts.agreed_BE[b, start : start + made]
        passes, first, nth_T = np.unique(
            forward_T, return_index=True, return_inverse=True
        )
        place_T = np.arange(made) - first[nth_T]
        heads_T = np.where(place_T < agreed_T, place_T + 2, 1)
        agreed = agreed_T[first[1:]]  # the first pass read the prompt
        return Generation(
            prompt=self.tokenizer.decode(texts.tokens_BE[b, :start]),
            text=text,
            tokens=tokens,
            heads=heads_T[: len(tokens)].tolist(),
            forwards=len(passes),
            tokens_per_forward=made / len(passes),
            accepted_by_head=[
                float(np.mean(agreed > i)) if agreed.size else 0.0
                for i in range(drafts)
            ],
            tokens_per_s=0.0,
            finish=finish,
            departures=None
            if texts.departed_BE is None
            else int(texts.departed_BE[b, start : start + made].sum()),
        )
