"""The compiled programs of decoding: reading the prompts, and writing on.

Axes: B batch, P prompt, E tokens of a text at most, S slots, N heads, D model width, W
tokens of a chunk of prompt, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.decode.adaptive import (
    CATCH_UP,
    DepthChooser,
    begin_alone,
    catch_up,
    leave_heads,
    step_alone,
)
from mtp_jax.decode.cache import (
    Cache,
    at_slot,
    chain,
    decode_trunk,
    grow,
    make_cache,
)
from mtp_jax.decode.decode_model import build
from mtp_jax.decode.decoders.sampling import RandomKeys, SamplingArrays
from mtp_jax.decode.decoders.state import (
    Decoder,
    DecodeState,
    Drafter,
    Finishing,
    PromptEnd,
)
from mtp_jax.decode.head_passes import extend, read_first, source_width
from mtp_jax.parallel.sharding import spec

_PROMPT_CHUNK = (
    256  # tokens of a prompt read at once: bounds the memory of long prompts
)

# Arrays of a state that leave the devices.
REPORTED = (
    "tokens_BE",
    "forward_BE",
    "accepted_BE",
    "deviated_BE",
    "length_B",
    "done_B",
)

# begin(params, prompts) -> (state, confidence_M): how likely the first drafts are by
# their own heads, a mean over the texts; None where the heads are left alone.
Begin = Callable[..., tuple[DecodeState, jax.Array | None]]
# advance(params, state, forward passes) -> state; the old state is given up. It ends
# early where all texts are done or one has no slots left.
Advance = Callable[..., DecodeState]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded at the end."""

    tokens_BP: jax.Array  # int32
    length_B: jax.Array  # int32, at least 1
    limit_B: jax.Array  # of the whole text, int32
    done_B: jax.Array  # true for a row that only fills up the batch
    sampling: SamplingArrays
    keys: RandomKeys


class Programs:
    """The programs compiled for a model, kept so that equal shapes share them."""

    def __init__(
        self, cfg: ModelConfig, eos_id: int | tuple[int, ...], ids: int | None = None
    ):
        """Compiles nothing yet; any of `eos_id` ends a text, `ids` as for `build`."""
        self.cfg = cfg
        self._end_ids = (eos_id,) if isinstance(eos_id, int) else eos_id
        self._ids = ids
        self._compiled: dict[Any, Any] = {}
        self.compile_s = 0.0  # seconds that it took so far

    def begin(
        self,
        decoder: Decoder,
        params: Any,
        prompts: Prompts,
        room: int,
        slots: int,
        alone: bool = False,
    ) -> tuple[Begin, Any]:
        """The program that reads such prompts, and the shapes of its results.

        Args:
          decoder: the decoder that commits the first token.
          params: from `decode_model.unstack`, with the heads that the decoder runs.
          prompts: of the shapes to compile for.
          room: E, the most tokens of a text.
          slots: S, of the cache; at least P.
          alone: leave the drafting heads alone from the start; see `adaptive`.
        """

        def compiled():
            begin = _begin(
                self.cfg, decoder, self._end_ids, room, slots, alone, self._ids
            )
            lowered = begin.lower(params, prompts)
            return lowered.compile(), jax.tree.map(_abstract, lowered.out_info)

        key = ("begin", decoder, room, slots, alone, *_kind(params), *_kind(prompts))
        return self._get(key, compiled)

    def catch_up(self, decoder: Drafter, params: Any, state: Any) -> Advance:
        """The program (params, state, alone) -> state that has the heads catch up."""

        def compiled():
            @jax.jit(donate_argnames="state")
            def caught_up(params, state, alone):
                return catch_up(self.cfg, params, state, alone, decoder, self._ids)

            rest = dataclasses.replace(state, alone=None)
            abstract = jax.tree.map(_abstract, (params, rest, state.alone))
            return caught_up.lower(*abstract).compile()

        key = ("catch up", decoder, *_kind(params), *_kind(state))
        return self._get(key, compiled)

    def advance(self, decoder: Decoder, params: Any, depth: int, state: Any) -> Advance:
        """The program that writes on from such a state with `depth` heads in use."""

        def compiled():
            forwards = jax.ShapeDtypeStruct((), jnp.int32)
            advance = _advance(self.cfg, decoder, depth, self._ids)
            abstract = jax.tree.map(_abstract, state)
            return advance.lower(params, abstract, forwards).compile()

        key = ("advance", decoder, depth, *_kind(params), *_kind(state))
        return self._get(key, compiled)

    def leave_heads(
        self, decoder: Decoder, state: DecodeState
    ) -> Callable[[DecodeState], DecodeState]:
        """The program that has such a state leave its drafting heads alone."""

        def compiled():
            width = source_width(self.cfg, state.passes_BN.shape[1])
            left = jax.jit(functools.partial(leave_heads, width=width))
            return left.lower(jax.tree.map(_abstract, state)).compile()

        return self._get(("leave heads", decoder, *_kind(state)), compiled)

    def grow(
        self, decoder: Decoder, state: DecodeState, slots: int
    ) -> Callable[[DecodeState], DecodeState]:
        """The program that gives the cache of such a state so many slots."""

        def compiled():
            @jax.jit
            def grown(state):
                return dataclasses.replace(state, cache=grow(state.cache, slots))

            return grown.lower(jax.tree.map(_abstract, state)).compile()

        return self._get(("grow", decoder, slots, *_kind(state)), compiled)

    def chooser(
        self,
        measure: Callable[[], dict[int, float]],
        decoder: Decoder,
        params: Any,
        prompts: Prompts,
        room: int,
        slots: int,
    ) -> DepthChooser:
        """The depth chooser of such batches, whose costs `measure` finds once."""
        key = ("chooser", decoder, room, slots, *_kind(params), *_kind(prompts))
        return self._get(key, lambda: DepthChooser(measure()))

    def finish(self, decoder: Finishing, params: Any, state: Any) -> Callable[..., Any]:
        """The program (params, state) -> the arrays REPORTED of the state, by name."""

        def compiled():
            @jax.jit
            def finish(params, state):
                model = build(self.cfg, params, self._ids)
                state = decoder.finish(model, state)
                return {name: getattr(state, name) for name in REPORTED}

            return finish.lower(params, jax.tree.map(_abstract, state)).compile()

        key = ("finish", decoder, *_kind(params), *_kind(state))
        return self._get(key, compiled)

    def _get(self, key: Any, compiled: Callable[[], Any]) -> Any:
        """The program of a key, compiled if it is not there, its time counted."""
        if key not in self._compiled:
            began = time.perf_counter()
            self._compiled[key] = compiled()
            self.compile_s += time.perf_counter() - began
        return self._compiled[key]


def slack(cfg: ModelConfig, decoder: Decoder, heads: int) -> int:
    """The most slots that a forward pass writes after those of committed tokens."""
    return max(decoder.width(heads), CATCH_UP) + cfg.heads.lookback(heads)


def _kind(tree: Any) -> tuple[Any, ...]:
    """The parts of a key for a tree: structure, shapes, types and shardings."""
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *((x.shape, x.dtype, x.sharding) for x in leaves))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _begin(
    cfg: ModelConfig,
    decoder: Decoder,
    end_ids: tuple[int, ...],
    room: int,
    slots: int,
    alone: bool,
    ids: int | None = None,
) -> Any:
    @jax.jit
    def begin(params, prompts):
        model = build(cfg, params, ids)
        b, p = prompts.tokens_BP.shape
        cache = make_cache(cfg, len(model.heads), b, slots)
        head_B1D, source_B1X, cache, source_BPX = _read_prompt(
            cfg, params, prompts, cache, alone
        )
        tokens_BE = jnp.pad(prompts.tokens_BP, ((0, 0), (0, room - p)))
        zeros_BE = jnp.zeros_like(tokens_BE)
        state = DecodeState(
            tokens_BE=tokens_BE,
            forward_BE=zeros_BE,
            accepted_BE=zeros_BE,
            deviated_BE=zeros_BE if decoder.lossy else None,
            length_B=prompts.length_B,
            limit_B=prompts.limit_B,
            done_B=prompts.done_B,
            forward=jnp.zeros((), jnp.int32),
            passes_BN=jnp.zeros(
                (b, len(model.heads)), jnp.int32, out_sharding=spec("batch", None)
            ),
            seen_BV=_seen(cfg, prompts) if prompts.sampling.penalized else None,
            cache=cache,
            carry=None,
            sampling=prompts.sampling,
            keys=prompts.keys,
            alone=None,
            end_ids=end_ids,
        )
        if source_BPX is not None:
            source_BEX = jnp.pad(source_BPX, ((0, 0), (0, room - p), (0, 0)))
            drafter = cast(Drafter, decoder)
            return begin_alone(model, state, head_B1D, source_BEX, drafter), None
        end = PromptEnd(head_B1D, source_B1X, prompts.length_B)
        state = decoder.begin(model, state, end)
        return state, end.confidence(prompts.done_B)

    return begin


def _advance(
    cfg: ModelConfig, decoder: Decoder, depth: int, ids: int | None = None
) -> Any:
    @jax.jit(donate_argnames="state")
    def advance(params, state, forwards):
        width = slack(cfg, decoder, len(params["heads"]))
        end = state.forward + forwards

        def step(state):
            model = build(cfg, params, ids)  # in the loop
            if state.alone is not None:
                return step_alone(model, state)
            return decoder.step(model, state, depth)

        def goes_on(state):
            fits_B = state.length_B - 1 + width <= state.cache.slots
            return (
                (state.forward < end)
                & ~jnp.all(state.done_B)
                & jnp.all(state.done_B | fits_B)
            )

        return jax.lax.while_loop(goes_on, step, state)

    return advance


def _seen(cfg: ModelConfig, prompts: Prompts) -> jax.Array:
    """Marks the tokens that each prompt has, bool [B, V]."""
    tokens_BP = prompts.tokens_BP

    def local(tokens_BP, length_B):
        inside_BP = jnp.arange(tokens_BP.shape[1])[None] < length_B[:, None]
        rows_B1 = jnp.arange(tokens_BP.shape[0])[:, None]
        none_BV = jnp.zeros((tokens_BP.shape[0], cfg.vocab_size), bool)
        return none_BV.at[rows_B1, tokens_BP].max(inside_BP)

    in_specs = (spec("batch", None), spec("batch"))
    seen = jax.shard_map(local, in_specs=in_specs, out_specs=spec("batch", None))
    return seen(tokens_BP, prompts.length_B)


def _read_prompt(
    cfg: ModelConfig, params: Any, prompts: Prompts, cache: Cache, alone: bool
) -> tuple[jax.Array, jax.Array, Cache, jax.Array | None]:
    """Reads the prompts, with the drafting heads unless head 1 is `alone`.

    Chunk by chunk, as many as the longest prompt has: alive for every token of a prompt
    are the cache, and the source of the drafting heads if they are left.

    Returns:
      The normed output of head 1 at the end of each prompt, [B, 1, D], and the source
      of the others there, [B, 1, X]; the cache; the source everywhere, [B, P, X], or
      None.
    """
    b, p = prompts.tokens_BP.shape
    w, x = min(p, _PROMPT_CHUNK), source_width(cfg, len(params["heads"]))
    rows = spec("batch", None, None)

    def chunk(i, carry):
        model = build(cfg, params)  # in the loop
        head_B1D, source_B1X, cache, source_BPX = carry
        start = i * w
        tokens_BW = jax.lax.dynamic_slice_in_dim(prompts.tokens_BP, start, w, axis=1)
        new = chain(tokens_BW, start + jnp.zeros_like(prompts.length_B))
        trunk_BWD, cache = decode_trunk(model, new, cache)
        slot_B = prompts.length_B - 1 - start
        here_B1D, source_BWX, cache = read_first(model, trunk_BWD, new, cache, slot_B)
        is_here_B11 = ((slot_B >= 0) & (slot_B < w))[:, None, None]
        head_B1D = jnp.where(is_here_B11, here_B1D, head_B1D)
        at_B1X = at_slot(source_BWX, slot_B)[:, None]
        source_B1X = jnp.where(is_here_B11, at_B1X, source_B1X)
        if source_BPX is not None:
            source_BPX = jax.lax.dynamic_update_slice_in_dim(
                source_BPX, source_BWX, start, axis=1
            )
        else:
            cache = extend(model, source_BWX, new, prompts.tokens_BP, cache)
        return head_B1D, source_B1X, cache, source_BPX

    def nothing(tokens, width):
        return jnp.zeros((b, tokens, width), cfg.compute_dtype, out_sharding=rows)

    chunks = -(-jnp.max(prompts.length_B) // w)
    kept_BPX = nothing(p, x) if alone else None
    start = (nothing(1, cfg.d_model), nothing(1, x), cache, kept_BPX)
    return jax.lax.fori_loop(0, chunks, chunk, start)
