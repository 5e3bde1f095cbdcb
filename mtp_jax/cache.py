"""Keys and values of what was read so far, and the forward pass that uses them.

Axes: L layers (the trunk's, then one a head), B batch, S slots, W new tokens of each
sequence, N heads, D model width, H query heads, G key-value heads, K head width.

Slot s holds the token at position s. A rejected draft leaves its slot behind, and the
token that is committed there instead overwrites it before anything reads it.

A forward pass is `run_trunk`, then each head by one of the two other functions: head 1
at every new token if drafts are to be verified, a drafting head at one token only.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.attention import cached_attention
from mtp_jax.config import ModelConfig
from mtp_jax.model import Block, LanguageModel
from mtp_jax.sharding import spec

_STORE = spec(None, "batch", "heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, in the compute dtype.

    Slots come after heads, so that what a query head reads is one matrix.
    """

    k_LBGSK: jax.Array
    v_LBGSK: jax.Array


def make_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, slots, cfg.d_head)

    def zeros():
        return jnp.zeros(shape, cfg.compute_dtype, out_sharding=_STORE)

    return Cache(zeros(), zeros())


def run_trunk(
    model: LanguageModel, tokens_BW: jax.Array, positions_BW: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The trunk's output for W more tokens of each sequence, [B, W, D], and the cache.

    Args:
      model: the model.
      tokens_BW: token ids, of prompts and drafts alike.
      positions_BW: where they stand; a position without a slot is not written.
      cache: holds every earlier position of each sequence.
    """
    angles_BWk = model.angles(positions_BW)

    # The cache is a carry, not a scanned input: so its slots are written in place.
    def one_layer(carry, block_and_layer):
        x_BWD, cache = carry
        block, layer = block_and_layer
        attend = _write_and_read(cache, layer, positions_BW)
        return block(x_BWD, angles_BWk, attend), None

    start = (model.embed(tokens_BW), cache)
    layers = jnp.arange(model.cfg.num_trunk_layers)
    return jax.lax.scan(one_layer, start, (model.trunk, layers))[0]


def run_head(
    model: LanguageModel,
    i: int,
    trunk_BWD: jax.Array,
    positions_BW: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The output of head i (0 is the next token) at every new token, and the cache."""
    attend = _write_and_read(cache, model.cfg.num_trunk_layers + i, positions_BW)
    return _head(model, i)(trunk_BWD, model.angles(positions_BW), attend)


def run_heads_at(
    model: LanguageModel,
    heads: range,
    trunk_BWD: jax.Array,
    positions_BW: jax.Array,
    slot_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The output of some heads at one of the new tokens of each sequence.

    For the other tokens they make keys and values only.

    Args:
      model: the model.
      heads: which; 0 is the next token.
      trunk_BWD: the trunk's output for the new tokens.
      positions_BW: where the new tokens stand.
      slot_B: which of them is asked for, 0 to W - 1; anything else gives nonsense.
      cache: as `run_trunk` left it.

    Returns:
      [N, B, D], N being the number of `heads`, and the cache.
    """
    angles_BWk = model.angles(positions_BW)
    position_B1 = at_slot(positions_BW, slot_B)[:, None]
    angles_B1k = model.angles(position_B1)
    trunk_B1D = at_slot(trunk_BWD, slot_B)[:, None]

    def one_head(cache, i):
        block, layer = _head(model, i), model.cfg.num_trunk_layers + i

        def write(q_BWHK, k_BWGK, v_BWGK):
            return q_BWHK, _write(cache, k_BWGK, v_BWGK, positions_BW, layer)

        def read(q_B1HK, k_B1GK, v_B1GK):
            del k_B1GK, v_B1GK  # in the cache already
            return _read(q_B1HK, written, position_B1, layer), None

        # What nobody uses of this, all but keys and values, is never computed.
        _, written = block(trunk_BWD, angles_BWk, write)
        head_B1D, _ = block(trunk_B1D, angles_B1k, read)
        return written, head_B1D[:, 0]

    cache, heads_NBD = jax.lax.scan(one_head, cache, jnp.array(heads, jnp.int32))
    return heads_NBD, cache


def at_slot(x_BWX: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The entry of each sequence at its slot, [B, ...] of [B, W, ...].

    By comparison, not by a gather or a product: exact, and split as its input is. Zero
    where the slot is not one of the W.
    """
    is_slot_BW = jnp.arange(x_BWX.shape[1])[None] == slot_B[:, None]
    is_slot_BWX = jnp.expand_dims(is_slot_BW, tuple(range(2, x_BWX.ndim)))
    return jnp.sum(jnp.where(is_slot_BWX, x_BWX, 0), axis=1, dtype=x_BWX.dtype)


def _head(model: LanguageModel, i: int | jax.Array) -> Block:
    return jax.tree.map(lambda w: w[i], model.heads)


def _write_and_read(cache: Cache, layer: int | jax.Array, positions_BW: jax.Array):
    """Attention through the cache, which keeps the cache."""

    def attend(q_BWHK, k_BWGK, v_BWGK):
        written = _write(cache, k_BWGK, v_BWGK, positions_BW, layer)
        return _read(q_BWHK, written, positions_BW, layer), written

    return attend


def _read(q_BWHK, cache, positions_BW, layer):
    # attention.py has slots before heads; swapping them twice costs nothing.
    k_BSGK = jnp.swapaxes(cache.k_LBGSK[layer], 1, 2)
    v_BSGK = jnp.swapaxes(cache.v_LBGSK[layer], 1, 2)
    return cached_attention(q_BWHK, k_BSGK, v_BSGK, positions_BW)


def _write(cache, k_BWGK, v_BWGK, positions_BW, layer):
    """The cache with new entries of a layer in the slots of their positions."""

    def local(store_LBGSK, new_BWGK, positions_BW, layer):
        rows_B1 = jnp.arange(new_BWGK.shape[0])[:, None]
        slots_BWGK = store_LBGSK.at[layer, rows_B1, :, positions_BW]
        return slots_BWGK.set(new_BWGK, mode="drop")

    by_head = spec("batch", None, "heads", None)
    write = jax.shard_map(
        local,
        in_specs=(_STORE, by_head, spec("batch", None), spec()),
        out_specs=_STORE,
    )
    layer = jnp.asarray(layer)
    return Cache(
        write(cache.k_LBGSK, k_BWGK, positions_BW, layer),
        write(cache.v_LBGSK, v_BWGK, positions_BW, layer),
    )
