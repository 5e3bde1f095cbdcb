"""Writes continuations into a JSONL file that may be there already, in part."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.fitting import settings_of
from mtp_jax.decode.generation import Generation
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.prompt_list import as_prompts
from mtp_jax.decode.questions import Question
from mtp_jax.errors import UserError

_HALF = "\ufffd"
BATCH_SIZE = 16  # prompts at a time where nothing else is asked for


def generate_to_file(
    generator: Generator,
    path: str,
    prompts: Sequence[Any],
    *,
    step: int,
    decoder: Decoder,
    sampling: Sampling,
    batch_size: int | None = None,
    questions: Sequence[Question] | None = None,
    **settings: Any,
) -> int:
    """Appends the continuations that are not in a JSONL file yet, batch by batch.

    Args:
      generator: the model.
      path: of the file; it is made if it is not there.
      prompts: as `Generator.generate` takes them.
      step: checkpoint of the model, kept with every line.
      decoder: how to decode.
      sampling: the distribution of the next token.
      batch_size: prompts at a time; 16 if None.
      questions: of the prompts; each line then has the answered conversation, too.
      settings: other arguments of `Generator.generate`, in JSON's types.

    Returns:
      How many continuations were there already.

    Raises:
      UserError: the file cannot be used, or is of other prompts or settings.
    """
    kept = {
        **settings,
        "decoder": settings_of(decoder),
        "sampling": dataclasses.asdict(sampling),
        "step": step,
        "heads": generator.cfg.n_future_tokens,
    }
    prompts = as_prompts(prompts)
    output = JsonlOutput(path, [generator.prompt_text(p) for p in prompts], kept)
    before, size = output.done, batch_size or BATCH_SIZE
    while output.done < len(prompts):
        results = generator.generate(
            prompts[output.done : output.done + size],
            first=output.done,
            decoder=decoder,
            sampling=sampling,
            **settings,
        )
        answered = [
            questions[i].answered(result.text) if questions is not None else {}
            for i, result in enumerate(results, output.done)
        ]
        output.append(results, answered)
    return before


class JsonlOutput:
    """A file with a line a prompt, in their order, each whole or not there."""

    def __init__(self, path: str, prompts: Sequence[str], settings: dict[str, Any]):
        """Reads what is there; a last line that is not finished is cut off.

        Args:
          path: the path of the file; it is made if it is not there.
          prompts: as `Generation.prompt` has them.
          settings: how they are continued, in JSON's types; kept with every line.

        Raises:
          UserError: the file cannot be used, or is of other prompts or settings.
        """
        self._path = pathlib.Path(path)
        self._settings = json.loads(json.dumps(settings))
        try:
            with open(self._path, "ab+") as file:
                file.seek(0)
                data = file.read()
                whole = data.rfind(b"\n") + 1
                file.truncate(whole)
        except OSError as error:
            raise UserError(
                f"--output={path} cannot be used: {error.strerror}."
            ) from None
        lines = data[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines):
            self._check(line, number, prompts)
        self.done = len(lines)  # prompts that need no more work

    def append(
        self, results: Sequence[Generation], also: Sequence[dict[str, Any]]
    ) -> None:
        """Appends a line a result, each with what else is to be in it."""
        with open(self._path, "a", encoding="utf-8") as file:
            for result, more in zip(results, also, strict=True):
                row = dataclasses.asdict(result)
                row = {**row, **more, "settings": self._settings}
                file.write(json.dumps(row) + "\n")
        self.done += len(results)

    def _check(self, line: bytes, number: int, prompts: Sequence[str]) -> None:
        """Raises UserError if a line is not that of its prompt and these settings."""
        try:
            row = json.loads(line)
            prompt, settings = row["prompt"], row["settings"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"--output={self._path}: line {number + 1} is not one of this program; "
                "give another file."
            ) from None
        # Earlier versions left half a character at the end of a prompt.
        if number >= len(prompts) or prompt.rstrip(_HALF) != prompts[number].rstrip(
            _HALF
        ):
            raise UserError(
                f"--output={self._path}: line {number + 1} is of another prompt; give "
                "the prompts it was begun with, or another file."
            )
        if settings != self._settings:
            differs = [
                key
                for key in {**settings, **self._settings}
                if settings.get(key) != self._settings.get(key)
            ]
            raise UserError(
                f"--output={self._path} was begun with another {', '.join(differs)}; "
                "give the same, or another file."
            )
