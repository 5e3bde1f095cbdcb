"""Tasks whose answers the model writes: samples, and what they are worth."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.fitting import default_decoder, settings_of
from mtp_jax.decode.generation import Generation
from mtp_jax.decode.generator import Generator
from mtp_jax.eval.collect import Line
from mtp_jax.eval.task_data import TaskData
from mtp_jax.eval.tasks.kinds import AnswerTask, CodeTask
from mtp_jax.sandbox.sandbox import Sandbox

_TRIAL_TOKENS = 32
_TRIALS = 2  # of each decoder, after one that compiles


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts of a task, and how many were too long."""

    ids: list[np.ndarray]  # int32, without begin of text
    max_new_tokens: int
    truncated: int  # prompts that were cut from the left


def make_prompts(generator: Generator, data: TaskData) -> Prompts:
    """Prompts that leave room for the answer in what the model reads.

    A prompt that is too long is cut from the left, as lm-evaluation-harness does it.
    At most half of the room is for the answer.
    """
    room = generator.max_prompt_tokens
    wanted = data.settings.max_new_tokens or 1
    assert room is not None
    new = max(1, min(wanted, room // 2))
    most = max(1, room - new - 1)  # begin of text comes before it
    whole = [generator.tokenizer.encode(data.shown + x.prompt) for x in data.examples]
    return Prompts(
        [ids[-most:] for ids in whole], new, sum(len(ids) > most for ids in whole)
    )


class Samples:
    """Writes and judges samples of a task, a batch at a time.

    The samples of all temperatures have one numbering: all samples of the first
    example, then of the second ..., then the same with the next temperature. What is
    drawn for a sample depends on its number and the seed alone.
    """

    def __init__(
        self,
        generator: Generator,
        data: TaskData,
        prompts: Prompts,
        sandbox: Sandbox | None,
    ):
        self._generator = generator
        self._data = data
        self._prompts = prompts
        self._sandbox = sandbox
        self.decoder: Decoder | None = None

    @property
    def total(self) -> int:
        """The number of samples."""
        settings = self._data.settings
        assert settings.temperatures is not None
        per_temperature = len(self._data.examples) * settings.samples
        return per_temperature * len(settings.temperatures)

    def work(self, start: int, end: int) -> list[Line]:
        """Samples of these numbers, with what they are worth, in JSON's types."""
        lines: list[Line] = []
        each = self.total // len(self._data.settings.temperatures or (0.0,))
        while start < end:  # a batch has one temperature
            stop = min(end, (start // each + 1) * each)
            lines += self._of_temperature(start, stop, start // each, each)
            start = stop
        return lines

    def _of_temperature(
        self, start: int, end: int, which: int, each: int
    ) -> list[Line]:
        settings = self._data.settings
        assert settings.temperatures is not None
        temperature = settings.temperatures[which]
        numbers = [i % each // settings.samples for i in range(start, end)]
        written = self._generator.generate(
            [self._prompts.ids[i] for i in numbers],
            max_new_tokens=self._prompts.max_new_tokens,
            decoder=self.decoder,
            sampling=self._sampling(temperature),
            stop=self._task.stop,
            first=start,
        )
        worth = self._worth(numbers, [result.text for result in written])
        return [
            {
                "item": item,
                "sample": (start + i) % settings.samples,
                "temperature": temperature,
                "text": result.text,
                "tokens": round(result.tokens_per_forward * result.forwards),
                "forwards": result.forwards,
                "finish": result.finish,
                **of_text,
            }
            for i, (item, result, of_text) in enumerate(
                zip(numbers, written, worth, strict=True)
            )
        ]

    @property
    def _task(self) -> AnswerTask | CodeTask:
        assert isinstance(self._data.task, AnswerTask | CodeTask)
        return self._data.task

    def _sampling(self, temperature: float) -> Sampling:
        settings = self._data.settings
        if temperature == 0:
            return Sampling(seed=settings.seed)
        return Sampling(
            temperature=temperature, top_p=settings.top_p or 1.0, seed=settings.seed
        )

    def _worth(self, numbers: Sequence[int], texts: list[str]) -> list[Line]:
        """Scores of texts; for programs, the verdicts."""
        examples = [self._data.examples[i] for i in numbers]
        pairs = zip(examples, texts, strict=True)
        if isinstance(self._task, AnswerTask):
            return [{"scores": self._task.score(t, x.answers)} for x, t in pairs]
        assert self._sandbox is not None
        verdicts = self._sandbox.run_all([x.program(text) for x, text in pairs])
        return [{"scores": {"passed": float(v.passed)}, "why": v.why} for v in verdicts]

    def choose_decoder(self) -> dict[str, Any]:
        """The faster one of plain and drafting decoding, measured on the first batch.

        Returns:
          `decoder`, its name and options, and for a model with heads to draft with
          `tokens_per_s` of both, new tokens a second.
        """
        heads = self._generator.cfg.n_future_tokens
        name = default_decoder(heads)
        if name == "plain":
            return {"decoder": settings_of(DECODERS[name]())}
        speeds = {kind: self._speed(DECODERS[kind]()) for kind in ("plain", name)}
        chosen = DECODERS[max(speeds, key=lambda kind: speeds[kind])]()
        return {"decoder": settings_of(chosen), "tokens_per_s": speeds}

    def _speed(self, decoder: Decoder) -> float:
        settings = self._data.settings
        assert settings.temperatures is not None
        each = self.total // len(settings.temperatures)
        count = min(settings.batch_size, each)
        prompts = [self._prompts.ids[i // settings.samples] for i in range(count)]
        new = min(_TRIAL_TOKENS, self._prompts.max_new_tokens)

        def run() -> list[Generation]:
            return self._generator.generate(
                prompts,
                max_new_tokens=new,
                decoder=decoder,
                sampling=self._sampling(settings.temperatures[-1]),  # type: ignore[index]
            )

        run()
        speeds = []
        for _ in range(_TRIALS):
            began = time.perf_counter()
            made = sum(r.tokens_per_forward * r.forwards for r in run())
            speeds.append(made / (time.perf_counter() - began))
        return max(speeds)
