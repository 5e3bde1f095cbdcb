"""Text from a model: prompts in, continuations out, in batches on any mesh.

Axes: B batch, T new tokens.
"""

import dataclasses
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.config import ModelConfig
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.decode.batch import DecodeBatch, Texts, rows_of
from mtp_jax.decode.clock import Clock, with_speed
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder, ReadsTables
from mtp_jax.decode.fitting import default_decoder, needs_heads, why_not
from mtp_jax.decode.generation import Generation, generation_of
from mtp_jax.decode.programs import Programs
from mtp_jax.decode.prompt_list import as_prompts, check_numbers
from mtp_jax.decode.text_stream import Continuation, find_stop, settled
from mtp_jax.errors import UserError

_LOOK = 16  # forward passes between two looks for stop strings
_MOST_NEW = 2**20  # tokens of a continuation: there is room for all of them at once
_GREEDY = Sampling()


class Generator:
    """A model ready to generate; keeps its compiled programs for equal shapes."""

    def __init__(
        self,
        model_cfg: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_prompt_tokens: int | None = None,
    ):
        """Takes parameters as `model_builder` makes them, on the mesh.

        Prompts of more than `max_prompt_tokens`, begin of text included, are refused.
        """
        self.cfg = model_cfg
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.max_prompt_tokens = max_prompt_tokens
        # A model may have ids to spare, which no token has.
        self._ids = min(model_cfg.vocab_size, tokenizer.vocab_size)
        self._programs = Programs(model_cfg, tokenizer.eos_id, self._ids)
        self._tables: dict[ReadsTables, Any] = {}
        self.use(params)

    @classmethod
    def from_checkpoint(
        cls,
        workdir: str,
        mesh: Mesh | None = None,
        step: int | None = None,
        heads: int | None = None,
    ) -> Self:
        """Restores a trained model, with the tokenizer it was trained with.

        Args:
          workdir: the folder of a run.
          mesh: from `sharding.make_mesh`; None for all devices.
          step: the step of the checkpoint; None for the newest that is intact.
          heads: how many heads to keep, counted from head 1; None for all.

        Raises:
          UserError: no such run or checkpoint, or more heads than the model has.
        """
        return cls.from_restored(
            restore_model(workdir, mesh=mesh, step=step, heads=heads)
        )

    @classmethod
    def from_restored(cls, restored: Restored) -> Self:
        """Makes a generator of a restored model.

        Prompts may be as long as the rows that it was trained on.
        """
        return cls(
            restored.config.model,
            restored.params,
            restored.tokenizer,
            restored.mesh,
            max_prompt_tokens=restored.config.context,
        )

    def use(self, params: Any) -> None:
        """Takes other parameters of the same model; None lets go of the present.

        They are laid out for decoding when they are first needed.
        """
        self._given = params
        self._params: Any = None

    def generate(
        self,
        prompts: str | np.ndarray | Sequence[str] | Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        decoder: str | Decoder | None = None,
        heads: int | None = None,
        sampling: Sampling = _GREEDY,
        stop: str | Sequence[str] = (),
        batch_size: int | None = None,
        first: int = 0,
        adaptive: bool | Sequence[int] = False,
    ) -> list[Generation]:
        """Continues every prompt.

        Args:
          prompts: texts, or token ids; begin of text is put in front. No ids at all
            stand for begin of text alone; an empty text is refused. One text, or the
            ids of one, is one prompt.
          max_new_tokens: most tokens a continuation may have, end of text included.
          decoder: a name in DECODERS, or one with options of its own; if None,
            blockwise where there are heads to draft with, else plain.
          heads: use the first so many heads; all if None.
          sampling: how next tokens are chosen; greedy if not given.
          stop: a continuation ends before the first of these that it contains.
          batch_size: how many prompts are decoded at a time; all if None.
          first: number of the first prompt. What is drawn for a prompt depends on the
            seed and its number, not on the other prompts.
          adaptive: use as many of the heads as is fastest, from moment to moment; of
            no effect on lossy decoders. Greedy texts stay what they are, and sampled
            ones keep their distribution; but which text is drawn then depends on the
            numbers of heads, which follow measured times. Numbers of heads in a list
            are used instead, one a forward pass, the first for the prompts, over and
            over: then seed and number of a prompt decide its text.

        Returns:
          A generation a prompt. Its `tokens_per_s` counts the new tokens of its batch
          and the time from the prompts' ids to the last id of a continuation.

        Raises:
          UserError: an argument out of range, a prompt that is empty or too long, or a
            token id the model does not know; before anything is compiled.
        """
        stop = [stop] if isinstance(stop, str) else stop
        decoder, heads = self._check(max_new_tokens, decoder, heads, stop, adaptive)
        rows = [self._prompt_ids(prompt) for prompt in as_prompts(prompts)]
        check_numbers(first, len(rows))
        size = len(rows) if batch_size is None else batch_size
        if rows and size < 1:
            raise UserError(f"batch_size is {size}; give at least 1.")
        # Without stop strings there is nothing to look for on the way.
        # A search may yet change its mind: its text is cut when it is complete.
        look = _LOOK if stop and rows_of(decoder) == 1 else max_new_tokens
        results: list[Generation] = []
        for start in range(0, len(rows), size or 1):
            now = rows[start : start + size]
            clock = Clock(self._programs)
            batch = self._batch(
                now,
                decoder,
                heads,
                max_new_tokens,
                sampling,
                first + start,
                adaptive,
                clock,
            )
            while True:
                texts = self._advance(batch, look, stop, len(now))
                if texts.done_B.all():
                    break
            seconds = clock.seconds()
            made = [
                generation_of(self.tokenizer, texts, b, stop, heads - 1)
                for b in range(len(now))
            ]
            results += [with_speed(r, made, seconds) for r in made]
        return results

    def stream(
        self,
        prompt: str | np.ndarray,
        *,
        max_new_tokens: int,
        decoder: str | Decoder | None = None,
        heads: int | None = None,
        sampling: Sampling = _GREEDY,
        stop: str | Sequence[str] = (),
        first: int = 0,
        adaptive: bool | Sequence[int] = False,
    ) -> Coroutine[str, None, Generation]:
        """Yields the continuation of a prompt as it is written, a forward pass a time.

        A piece never ends within a character, and never holds a part of a stop string
        that may yet become whole. Together the pieces are the text that `generate`
        gives; what it returns is the value of the StopIteration, or of `yield from`.

        Raises:
          UserError: as `generate`, when the first piece is asked for.
        """
        stop = [stop] if isinstance(stop, str) else stop
        decoder, heads = self._check(max_new_tokens, decoder, heads, stop, adaptive)
        rows = [self._prompt_ids(prompt)]
        after = Continuation(self.tokenizer, rows[0])
        check_numbers(first, 1)
        clock = Clock(self._programs)
        batch = self._batch(
            rows, decoder, heads, max_new_tokens, sampling, first, adaptive, clock
        )
        shown = 0
        while True:
            look = 1 if rows_of(decoder) == 1 else max_new_tokens
            texts = self._advance(batch, look, stop, len(rows))
            if texts.done_B.all():
                break
            text = settled(after.decode(texts.new_tokens(0)), stop)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        result = generation_of(self.tokenizer, texts, 0, stop, heads - 1)
        if len(result.text) > shown:
            yield result.text[shown:]
        return with_speed(result, [result], clock.seconds())

    def prompt_length(self, prompt: str | np.ndarray) -> int:
        """Tokens of a prompt, begin of text included.

        Raises:
          UserError: as `generate` of such a prompt.
        """
        return len(self._prompt_ids(prompt))

    def prompt_text(self, prompt: str | np.ndarray) -> str:
        """Returns a prompt as `Generation.prompt` has it."""
        return Continuation(self.tokenizer, self._prompt_ids(prompt)).prompt

    def _batch(
        self,
        rows: list[np.ndarray],
        decoder: Decoder,
        heads: int,
        max_new_tokens: int,
        sampling: Sampling,
        first: int,
        adaptive: bool | Sequence[int],
        clock: "Clock",
    ) -> DecodeBatch:
        """Makes a batch and reads its prompts; starts the clock before."""
        # The mesh must not stay set between the pieces of a stream.
        with jax.set_mesh(self.mesh):
            if self._params is None:
                assert self._given is not None, "no parameters in use"
                self._params, self._given = unstack(self.cfg, self._given), None
            params = {**self._params, "heads": self._params["heads"][:heads]}
            if isinstance(decoder, ReadsTables):
                params["tables"] = self.tables_of(decoder)
            batch = DecodeBatch(
                self._programs,
                params,
                decoder,
                rows,
                max_new_tokens,
                sampling,
                first=first,
                adaptive=adaptive,
            )
            clock.start()
            batch.begin()
        return batch

    def tables_of(self, decoder: ReadsTables) -> Any:
        """The arrays that a decoder reads besides the model, on every device."""
        if decoder not in self._tables:
            tables = decoder.tables(self.tokenizer.fingerprint, self.cfg.vocab_size)
            self._tables[decoder] = jax.device_put(
                tables, jax.NamedSharding(self.mesh, jax.P())
            )
        return self._tables[decoder]

    def _advance(
        self, batch: DecodeBatch, forwards: int, stop: Sequence[str], count: int
    ) -> Texts:
        """Goes on for so many forward passes, and ends texts that hold a stop string.

        `count` is the number of prompts; other rows fill up the batch.
        """
        with jax.set_mesh(self.mesh):
            texts = batch.advance(forwards)
            stopped = [b for b in range(count) if stop and self._stops(texts, b, stop)]
            if not stopped or texts.done_B.all():
                return texts
            batch.end(stopped)
            done_B = texts.done_B.copy()
            done_B[stopped] = True
            return dataclasses.replace(texts, done_B=done_B)

    def _stops(self, texts: Texts, b: int, stop: Sequence[str]) -> bool:
        """Returns True if the continuation of text b holds a stop string."""
        after = Continuation(self.tokenizer, texts.tokens_BE[b, : texts.start_B[b]])
        return find_stop(after, texts.new_tokens(b), stop) is not None

    def _check(
        self,
        max_new_tokens: int,
        decoder: str | Decoder | None,
        heads: int | None,
        stop: Sequence[str],
        adaptive: bool | Sequence[int],
    ) -> tuple[Decoder, int]:
        """Checks arguments; returns the decoder and the number of heads it runs."""
        n = self.cfg.n_future_tokens
        heads = n if heads is None else heads
        if not 1 <= max_new_tokens <= _MOST_NEW:
            raise UserError(
                f"max_new_tokens is {max_new_tokens}; give at least 1, and at most "
                f"{_MOST_NEW}."
            )
        if not 1 <= heads <= n:
            raise UserError(f"heads is {heads}; the model has heads 1 to {n}.")
        if decoder is None:
            decoder = default_decoder(heads)
        if isinstance(decoder, str):
            if decoder not in DECODERS:
                raise UserError(f"no decoder {decoder!r}; known are {list(DECODERS)}.")
            decoder = DECODERS[decoder]()
        if heads == 1 and needs_heads(decoder):
            name = type(decoder).__name__.lower()
            whose = "the model has" if n == 1 else "heads is"
            raise UserError(f"{name} drafts with heads 2 to n; {whose} 1: use plain.")
        if why := why_not(decoder, self.cfg, heads):
            raise UserError(f"{type(decoder).__name__.lower()} cannot run: {why}.")
        if not isinstance(adaptive, bool) and not all(
            1 <= d <= heads for d in adaptive
        ):
            raise UserError(
                f"adaptive is {list(adaptive)}; give True, or numbers of heads from 1 "
                f"to {heads}."
            )
        if not all(stop):
            raise UserError("a stop string is empty; give some text, or none at all.")
        return decoder, decoder.heads(heads)

    def _prompt_ids(self, prompt: str | np.ndarray) -> np.ndarray:
        """The checked token ids of a prompt, begin of text first, int32."""
        if isinstance(prompt, str) and not prompt:
            raise UserError("a prompt is empty; give some text.")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = np.concatenate([[self.tokenizer.bos_id], np.asarray(ids, np.int64)])
        most = self.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise UserError(
                f"a prompt has {len(ids)} tokens, begin of text included; at most "
                f"{most} are allowed (max_prompt_tokens)."
            )
        if not 0 <= ids.min() <= ids.max() < self._ids:
            raise UserError(
                f"a prompt has token ids from {ids.min()} to {ids.max()}; the model "
                f"knows 0 to {self._ids - 1}."
            )
        return ids.astype(np.int32)
