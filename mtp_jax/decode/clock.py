"""The speed of decoding: seconds without compilation, tokens by them."""

import dataclasses
import time

from mtp_jax.decode.generation import Generation
from mtp_jax.decode.programs import Programs


class Clock:
    """Seconds since the start, without compilation."""

    def __init__(self, programs: Programs):
        self._programs = programs

    def start(self) -> None:
        self._started = time.perf_counter()
        self._compiled = self._programs.compile_s

    def seconds(self) -> float:
        compiled_s = self._programs.compile_s - self._compiled  # for a cache that grew
        return time.perf_counter() - self._started - compiled_s


def with_speed(
    result: Generation, of_batch: list[Generation], seconds: float
) -> Generation:
    """A result with the speed of its batch."""
    made = sum(r.tokens_per_forward * r.forwards for r in of_batch)
    return dataclasses.replace(result, tokens_per_s=made / seconds)
