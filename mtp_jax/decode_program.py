"""The two compiled halves of decoding: reading the prompts, and writing on.

Axes: B batch, P prompt, S slots, N heads, D model width, W tokens of a piece of prompt.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.cache import Cache, make_cache, run_heads_at, run_trunk
from mtp_jax.config import ModelConfig
from mtp_jax.decoders.state import Decoder, DecodeState
from mtp_jax.model import LanguageModel
from mtp_jax.sharding import spec
from mtp_jax.train_step import model_builder

_PIECE = 256  # tokens of a prompt read at once: bounds the memory of long prompts


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled for one decoder, number of heads and shape."""

    # (params, tokens_BP, length_B, limit_B, done_B) -> state
    begin: Callable[..., DecodeState]
    # (params, state, forward passes at most) -> state; the old state is given up
    advance: Callable[..., DecodeState]


def compile_program(
    cfg: ModelConfig,
    params: Any,
    decoder: Decoder,
    eos_id: int,
    slots: int,
    batch: list[jax.Array],
) -> Program:
    """Compiles ahead of time, so that no compilation is ever measured.

    Args:
      cfg: of the model, which has only the heads that the decoder runs.
      params: its parameters, in the compute dtype.
      decoder: whose steps are to be compiled.
      eos_id: end of text.
      slots: S, room for prompt and new tokens.
      batch: tokens_BP, length_B, limit_B and done_B of the shapes to compile for.
    """
    _, build = model_builder(cfg)

    @jax.jit
    def begin(params, tokens_BP, length_B, limit_B, done_B):
        model = build(params)
        b, p = tokens_BP.shape
        cache = make_cache(cfg, b, slots)
        heads_NBD, cache = _read_prompt(model, tokens_BP, length_B, cache)
        tokens_BS = jnp.pad(tokens_BP, ((0, 0), (0, slots - p)))
        zeros_BS = jnp.zeros_like(tokens_BS)
        state = DecodeState(
            tokens_BS=tokens_BS,
            forward_BS=zeros_BS,
            agreed_BS=zeros_BS,
            length_B=length_B,
            limit_B=limit_B,
            done_B=done_B,
            forward=jnp.zeros((), jnp.int32),
            cache=cache,
            carry=None,
            eos_id=eos_id,
        )
        return decoder.begin(model, state, heads_NBD)

    @jax.jit(donate_argnames="state")
    def advance(params, state, forwards):
        step = functools.partial(decoder.step, build(params))
        end = state.forward + forwards

        def unfinished(state):
            return (state.forward < end) & ~jnp.all(state.done_B)

        return jax.lax.while_loop(unfinished, step, state)

    first = begin.lower(params, *batch)
    state = jax.tree.map(_abstract, first.out_info)
    loop = advance.lower(params, state, jax.ShapeDtypeStruct((), jnp.int32))
    return Program(first.compile(), loop.compile())


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _read_prompt(
    model: LanguageModel, tokens_BP: jax.Array, length_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """What the heads say at the end of each prompt, [N, B, D], and the cache.

    Piece by piece: what is alive for every token of a prompt is the cache alone.
    """
    b, p = tokens_BP.shape
    w = min(p, _PIECE)
    n, d, dtype = model.cfg.n_future_tokens, model.cfg.d_model, model.cfg.compute_dtype

    def piece(carry, start):
        heads_NBD, cache = carry
        tokens_BW = jax.lax.dynamic_slice_in_dim(tokens_BP, start, w, axis=1)
        positions_BW = start + jnp.arange(w)[None] + jnp.zeros_like(tokens_BW)
        trunk_BWD, cache = run_trunk(model, tokens_BW, positions_BW, cache)
        slot_B = length_B - 1 - start
        here_NBD, cache = run_heads_at(
            model, range(n), trunk_BWD, positions_BW, slot_B, cache
        )
        is_here_1B1 = ((slot_B >= 0) & (slot_B < w))[None, :, None]
        return (jnp.where(is_here_1B1, here_NBD, heads_NBD), cache), None

    nothing_NBD = jnp.zeros((n, b, d), dtype, out_sharding=spec(None, "batch", None))
    starts = jnp.arange(0, p, w)
    (heads_NBD, cache), _ = jax.lax.scan(piece, (nothing_NBD, cache), starts)
    return heads_NBD, cache
