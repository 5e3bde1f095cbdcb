"""A batch of texts on its way from the prompts to the last token.

Axes: B batch, P prompt, E tokens of a text at most.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from mtp_jax.decode.adaptive import DepthChooser, DepthSchedule
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import RandomKeys, Sampling, sampling_arrays
from mtp_jax.decode.decoders.state import Decoder, DecodeState, Drafter, Finishing
from mtp_jax.decode.programs import REPORTED, Begin, Programs, Prompts, slack
from mtp_jax.parallel.sharding import batch_shards, spec

_TRIALS = 6  # of every depth, to see how long a pass takes
_TRIAL_S = 0.01  # of a trial, if that is neither too few passes nor too many:
_FEWEST, _MOST = 4, 64
_LEAST = 64  # room for a text; it comes in doubles of this, so that programs are shared


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts of a batch on the host, as far as they are written."""

    tokens_BE: np.ndarray
    forward_BE: np.ndarray
    accepted_BE: np.ndarray
    deviated_BE: np.ndarray | None  # None: the decoder is exact
    length_B: np.ndarray
    done_B: np.ndarray
    start_B: np.ndarray  # lengths of the prompts
    unverified: bool = False  # the i-th token of a pass is head i's; else head i + 1's

    def new_tokens(self, b: int | np.integer) -> list[int]:
        """The tokens after the prompt of text b."""
        return self.tokens_BE[b, self.start_B[b] : self.length_B[b]].tolist()


class DecodeBatch:
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
        adaptive: bool | Sequence[int] = False,
    ):
        """Compiles what is not compiled yet, so that no compilation is measured.

        Args:
          programs: of the model.
          params: from `decode_model.unstack`, with the heads that are used.
          decoder: how to decode.
          rows: token ids of the prompts, int32, at least one of each.
          max_new_tokens: most tokens of a continuation.
          sampling: how next tokens are chosen.
          first: number of the first prompt; its draws depend on that and the seed.
          adaptive: use fewer heads where that is faster; or the depths of forward
            passes, see `DepthSchedule`. Exact decoders only, which all do the same
            with one head.
        """
        self._programs = programs
        self._params = params
        self._decoder = decoder
        self._depth = len(params["heads"])
        width = slack(programs.cfg, decoder, self._depth)
        longest = max(map(len, rows))
        # A finished text is still read with the others: its drafts need room, too.
        self._room = bucket_size(longest + max_new_tokens + width)
        self._slots = min(self._room, bucket_size(longest + 2 * width))
        self._prompts = _prompts(
            rows, max_new_tokens, sampling, first, params, rows_of(decoder)
        )
        self._state: DecodeState | None = None
        # Of the depth of these texts.
        self._chooser: DepthChooser | DepthSchedule | None = None
        self._learner: DepthChooser | None = None  # takes the measurements of them
        if adaptive and self._depth > 1 and not decoder.lossy:
            self._adapt(adaptive, max_new_tokens)
        alone = self._chooser is not None and self._chooser.leaves_heads()
        self._begin, (shapes, _) = self._begun(alone)
        if self._chooser is None:
            programs.advance(self._decoder, self._params, self._depth, shapes)
        if isinstance(decoder, Finishing):
            programs.finish(decoder, params, shapes)

    def _adapt(self, adaptive: bool | Sequence[int], max_new_tokens: int) -> None:
        """Prepares for depths that change."""
        if not isinstance(adaptive, bool):
            self._chooser = DepthSchedule([min(d, self._depth) for d in adaptive])
            return
        self._learner = self._programs.chooser(
            self._measure,
            self._decoder,
            self._params,
            self._prompts,
            self._room,
            self._slots,
        )
        if self._learner.stays_alone(max_new_tokens):
            self._decoder, self._depth = Plain(), 1
            self._params = {**self._params, "heads": self._params["heads"][:1]}
        else:
            self._chooser = self._learner

    def _begun(self, alone: bool) -> tuple[Begin, Any]:
        """The compiled program that begins these texts, and the shapes it gives."""
        return self._programs.begin(
            self._decoder, self._params, self._prompts, self._room, self._slots, alone
        )

    def begin(self) -> None:
        """Reads the prompts and commits the first token of each text."""
        self._state, confidence_M = self._begin(self._params, self._prompts)
        if self._chooser is not None:
            self._chooser.begin(
                None if confidence_M is None else on_host(confidence_M).tolist()
            )

    def advance(self, forwards: int) -> Texts:
        """Goes on for so many forward passes, or until all texts are done."""
        end = int(self._at().forward) + forwards
        while not on_host(self._at().done_B).all() and int(self._at().forward) < end:
            left = end - int(self._at().forward)
            if self._chooser is not None:
                self._stretch(self._chooser, left)
                continue
            passes, seconds = self._run(self._depth, left)
            if self._learner is not None and passes:
                self._learner.saw(1, np.zeros(1), passes, seconds)
        return self._fetch()

    def _stretch(self, chooser: DepthChooser | DepthSchedule, left: int) -> None:
        """Runs and measures a few forward passes at the depth that promises most."""
        depth = chooser.depth()
        before_N = self._acceptance_counts() if depth > 1 else 0
        self._use_heads(depth > 1)
        passes, seconds = self._run(depth, min(left, chooser.passes()))
        after = self._at()
        if passes:
            accepted_N = self._acceptance_counts() - before_N
            chooser.saw(depth, accepted_N, passes, seconds)
            if after.alone is not None:
                chooser.saw_entropy(float(after.alone.entropy))

    def _acceptance_counts(self) -> np.ndarray:
        """Counts of the passes that accepted 0, 1 ... drafts so far, int [N]."""
        return np.sum(on_host(self._at().passes_BN), axis=0)

    def _use_heads(self, wanted: bool) -> None:
        """Has the drafting heads catch up, or leaves them alone."""
        state = self._at()
        if wanted and state.alone is not None:
            program = self._programs.catch_up(
                cast(Drafter, self._decoder), self._params, state
            )
            rest = dataclasses.replace(state, alone=None)
            self._state = program(self._params, rest, state.alone)
        elif not wanted and state.alone is None:
            self._state = self._programs.leave_heads(self._decoder, state)(state)

    def _run(self, depth: int, forwards: int) -> tuple[int, float]:
        """Runs forward passes at a depth; the cache grows when it is full.

        Returns how many there were, and the seconds that they took, without compiling
        or growing.
        """
        state = self._at()
        program = self._programs.advance(self._decoder, self._params, depth, state)
        first = int(state.forward)
        began = time.perf_counter()
        state = self._state = program(self._params, state, np.int32(forwards))
        passes = int(state.forward) - first
        seconds = time.perf_counter() - began
        if passes < forwards and not on_host(state.done_B).all():
            slots = 2 * state.cache.slots
            self._state = self._programs.grow(self._decoder, state, slots)(state)
        return passes, seconds

    def _measure(self) -> dict[int, float]:
        """Measures seconds of a forward pass at every depth that can be chosen."""
        n = self._depth
        depths = sorted({1, n, *(2**i for i in range(1, n.bit_length()) if 2**i < n)})
        self._begin, _ = self._begun(alone=False)
        self._state, _ = self._begin(self._params, self._prompts)
        self._use_heads(False)
        self._use_heads(True)  # compiled as well
        costs = {depth: self._pass_s(depth) for depth in reversed(depths)}
        self._state = None
        return costs

    def _pass_s(self, depth: int) -> float:
        """Measures seconds of a forward pass at a depth."""
        took_s, forwards = [], 1
        for _ in range(_TRIALS):
            if on_host(self._at().done_B).all():
                self._state, _ = self._begin(self._params, self._prompts)
            self._use_heads(depth > 1)
            passes, took = self._run(depth, forwards)
            if passes:  # there are none where the cache was full
                took_s.append(took / passes)
                # Starting takes time, too, which is not to count for short passes.
                forwards = min(max(_FEWEST, int(_TRIAL_S / min(took_s))), _MOST)
        # In the others something was in the way. Texts of one token have no passes.
        return min(took_s, default=1.0)

    def _at(self) -> DecodeState:
        """The present state."""
        assert self._state is not None, "begin comes first"
        return self._state

    def end(self, rows: Iterable[int]) -> None:
        """Ends the texts of some prompts, by their numbers, where they are."""
        state = self._at()
        done_B = on_host(state.done_B).copy()
        k = rows_of(self._decoder)
        done_B[[row * k + i for row in rows for i in range(k)]] = True
        done_B = jax.device_put(done_B, state.done_B.sharding)
        self._state = dataclasses.replace(state, done_B=done_B)

    def _fetch(self) -> Texts:
        """Brings the texts to the host."""
        state, decoder = self._at(), self._decoder
        if isinstance(decoder, Finishing):
            finish = self._programs.finish(decoder, self._params, state)
            reported = finish(self._params, state)
        else:
            reported = {name: getattr(state, name) for name in REPORTED}
        arrays: dict[str, Any] = {
            name: None if x is None else on_host(x) for name, x in reported.items()
        }
        start_B = on_host(self._prompts.length_B)[:: rows_of(decoder)]
        unverified = getattr(decoder, "unverified", False)
        return Texts(**arrays, start_B=start_B, unverified=unverified)


def rows_of(decoder: Decoder) -> int:
    """The rows of the batch that a prompt takes: the beams of a search, else one."""
    return getattr(decoder, "rows", 1)


def bucket_size(tokens: int, least: int = _LEAST) -> int:
    """The first of least, 2 least, 4 least ... that holds `tokens`; a power of two."""
    return max(least, 1 << (tokens - 1).bit_length())


def _prompts(
    rows: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    first: int,
    params: Any,
    rows_per_prompt: int = 1,
) -> Prompts:
    """Prompts as arrays on the mesh, with rows of padding to fill it up.

    Each is there `rows_per_prompt` times, one after another and on the same device.
    """
    shards = batch_shards(jax.sharding.get_mesh())
    b = -(-len(rows) // shards) * shards * rows_per_prompt
    rows = [row for row in rows for _ in range(rows_per_prompt)]
    tokens_BP = np.zeros((b, bucket_size(max(map(len, rows)), least=8)), np.int32)
    length_B = np.ones(b, np.int32)
    for i, row in enumerate(rows):
        tokens_BP[i, : len(row)] = row
        length_B[i] = len(row)
    fold_in = functools.partial(jax.random.fold_in, jax.random.key(sampling.seed))
    keys_B = jax.vmap(fold_in)(np.arange(first, first + b, dtype=np.uint32))
    return Prompts(
        tokens_BP=put(tokens_BP),
        length_B=put(length_B),
        limit_B=put(length_B + np.int32(max_new_tokens)),
        done_B=put(np.arange(b) >= len(rows)),
        sampling=sampling_arrays(sampling, params["w_embedding"].shape[0]),
        keys=RandomKeys(
            put(np.asarray(jax.random.key_data(keys_B))),
            at_B=put(np.zeros(b, np.int32)),
            drawn_B=put(np.zeros(b, np.int32)),
        ),
    )


def put(x: np.ndarray) -> jax.Array:
    """Puts an array [B, ...] onto the mesh that is set, split by row."""
    axes = ("batch", *[None] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec(*axes)))


def on_host(x: jax.Array) -> np.ndarray:
    """An array on the host, whole, of all processes."""
    if x.is_fully_addressable:  # gathering would compile a program first
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
