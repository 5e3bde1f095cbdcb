"""The KV cache, and the decoding forward pass over it.

Axes: B batch, S slots, W new tokens of each sequence, N heads, D model width, H query
heads, G key-value heads, K head width, P tokens of a path.

A forward pass is `decode_trunk`, then the heads, which are in `head_passes`. Slot s
holds the token at position s. A rejected draft leaves its slot behind, and the token
that is committed there instead overwrites it before anything reads it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cached_attention import cached_attention
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.parallel.sharding import spec

_STORE = spec("batch", "heads", None, None)
_TRUNK = spec("batch", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, the trunk's and then the heads'.

    In the compute dtype. Slots come after heads, so that what a query head reads is one
    matrix.
    """

    k_BGSK: tuple[jax.Array, ...]
    v_BGSK: tuple[jax.Array, ...]
    # The trunk's output at every slot, for heads that read slots again; or None.
    trunk_BSD: jax.Array | None = None

    @property
    def slots(self) -> int:
        return self.k_BGSK[0].shape[2]


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens of a forward pass: a chain, or a tree whose nodes follow their parents.

    The w-th goes into slot start + w. It sees what is in the slots before `start`, and
    of its own kind itself and its ancestors.
    """

    tokens_BW: jax.Array  # int32
    positions_BW: jax.Array  # int32
    start_B: jax.Array  # slot of the first, and its position, int32
    # ancestors_WW[w, u]: w is u or comes after it; None: a chain, where all before do
    ancestors_WW: np.ndarray | None = None


def chain(tokens_BW: jax.Array, start_B: jax.Array) -> NewTokens:
    """Tokens one after another, from the position `start` on."""
    positions_BW = start_B[:, None] + jnp.arange(tokens_BW.shape[1])[None]
    return NewTokens(tokens_BW, positions_BW, start_B)


def make_cache(cfg: ModelConfig, heads: int, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences.

    For the trunk and the first `heads` heads.
    """
    shape = (batch, cfg.num_kv_heads, slots, cfg.d_head)
    layers = cfg.num_trunk_layers + cfg.heads.caches(cfg.n_future_tokens, heads)
    trunk_BSD = None
    if cfg.heads.lookback(heads):
        like = (batch, slots, cfg.d_model)
        trunk_BSD = jnp.zeros(like, cfg.compute_dtype, out_sharding=_TRUNK)

    def zeros():
        return tuple(
            jnp.zeros(shape, cfg.compute_dtype, out_sharding=_STORE)
            for _ in range(layers)
        )

    return Cache(zeros(), zeros(), trunk_BSD)


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with its entries and more slots."""
    more = (0, slots - cache.slots)

    def grown(x):  # slots are the last axis but one
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), more, (0, 0)])

    return jax.tree.map(grown, cache)


def decode_trunk(
    model: DecodeModel, new: NewTokens, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The trunk's output for the new tokens, [B, W, D], and the cache with them."""
    angles_BWk = model.angles(new.positions_BW)
    x_BWD = model.embed(new.tokens_BW)
    for layer, block in enumerate(model.trunk):
        window = model.cfg.trunk_windows[layer]
        attend = write_and_read(cache, layer, new, window)
        x_BWD, cache = block(x_BWD, angles_BWk, attend)
    if cache.trunk_BSD is not None:
        trunk_BSD = store(cache.trunk_BSD, x_BWD, new.start_B)
        cache = dataclasses.replace(cache, trunk_BSD=trunk_BSD)
    return x_BWD, cache


def keep_path(
    cache: Cache, layers: int, start_B: jax.Array, path_BP: jax.Array
) -> Cache:
    """Moves the entries of a path through a tree to where a chain has them.

    Args:
      cache: after a forward pass over a tree.
      layers: which have read it, the first ones.
      start_B: slot of the tree's first node.
      path_BP: nodes, from the first on; the p-th goes into slot start + p. Nodes after
        the end of a path may be any.
    """

    def local(stores, start_B, path_BP):
        def one(store_XSK, start, path_P):
            # The slots of a path rise, so reading all before writing is enough.
            # Clipped as the write is: a finished text may stand at the cache's end.
            axis = store_XSK.ndim - 2
            kept = jnp.take(store_XSK, start + path_P, axis=axis, mode="clip")
            at = (*[0] * axis, start, 0)
            return lax.dynamic_update_slice(store_XSK, kept, at)

        return jax.vmap(one)(stores, start_B, path_BP)

    def move(store, layout):
        in_specs = (layout, spec("batch"), spec("batch", None))
        moved = jax.shard_map(local, in_specs=in_specs, out_specs=layout)
        return moved(store, start_B, path_BP)

    def of_layers(stores):
        return (*(move(x, _STORE) for x in stores[:layers]), *stores[layers:])

    trunk_BSD = cache.trunk_BSD
    if trunk_BSD is not None:
        trunk_BSD = move(trunk_BSD, _TRUNK)
    return Cache(of_layers(cache.k_BGSK), of_layers(cache.v_BGSK), trunk_BSD)


def store(to_BSD: jax.Array, x_BWD: jax.Array, at_B: jax.Array) -> jax.Array:
    """Writes entries of each row, the first at its position."""

    def local(to_BSD, x_BWD, at_B):
        def one(to_SD, x_WD, at):
            return lax.dynamic_update_slice(to_SD, x_WD, (at, 0))

        return jax.vmap(one)(to_BSD, x_BWD, at_B)

    in_specs = (_TRUNK, _TRUNK, spec("batch"))
    stored = jax.shard_map(local, in_specs=in_specs, out_specs=_TRUNK)
    return stored(to_BSD, x_BWD, at_B)


def part(x_BSD: jax.Array, at_B: jax.Array, width: int) -> jax.Array:
    """The `width` entries of each row from its position on, [B, W, D]."""

    def local(x_BSD, at_B):
        def one(x_SD, at):
            return lax.dynamic_slice_in_dim(x_SD, at, width)

        return jax.vmap(one)(x_BSD, at_B)

    cut = jax.shard_map(local, in_specs=(_TRUNK, spec("batch")), out_specs=_TRUNK)
    return cut(x_BSD, at_B)


def at_slot(x_BWX: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The entry of each sequence at its slot, [B, ...] of [B, W, ...].

    By comparison, not by a gather or a product: exact, and split as its input is. Zero
    where the slot is not one of the W.
    """
    is_slot_BW = jnp.arange(x_BWX.shape[1])[None] == slot_B[:, None]
    is_slot_BWX = jnp.expand_dims(is_slot_BW, tuple(range(2, x_BWX.ndim)))
    return jnp.sum(jnp.where(is_slot_BWX, x_BWX, 0), axis=1, dtype=x_BWX.dtype)


def write_and_read(cache: Cache, layer: int, new: NewTokens, window: int):
    """Attention through the cache, which keeps the cache."""

    def attend(q_BWHK, k_BWGK, v_BWGK):
        written = write_cache(cache, layer, k_BWGK, v_BWGK, new)
        return read_cache(q_BWHK, written, layer, new, window), written

    return attend


def read_cache(
    q_BWHK: jax.Array, cache: Cache, layer: int, new: NewTokens, window: int
) -> jax.Array:
    """New tokens read a layer of the cache, [B, W, H, K].

    `window` is as for `cached_attention`.
    """
    stores = cache.k_BGSK[layer], cache.v_BGSK[layer]
    return cached_attention(q_BWHK, *stores, new.start_B, new.ancestors_WW, window)


def write_cache(
    cache: Cache, layer: int, k_BWGK: jax.Array, v_BWGK: jax.Array, new: NewTokens
) -> Cache:
    """The cache with the entries of the new tokens in a layer."""

    def local(store_BGSK, new_BWGK, start_B):
        if new_BWGK.shape[1] == 1:
            # XLA would write a single slot twice, into a copy of the whole cache. The
            # slot after it is one that nobody reads before it is written.
            new_BWGK = jnp.pad(new_BWGK, ((0, 0), (0, 1), (0, 0), (0, 0)))

        def one(store_GSK, new_WGK, start):
            new_GWK = jnp.swapaxes(new_WGK, 0, 1)
            return lax.dynamic_update_slice(store_GSK, new_GWK, (0, start, 0))

        return jax.vmap(one)(store_BGSK, new_BWGK, start_B)

    in_specs = (_STORE, spec("batch", None, "heads", None), spec("batch"))
    write = jax.shard_map(local, in_specs=in_specs, out_specs=_STORE)

    def with_layer(stores, new_BWGK):
        written = write(stores[layer], new_BWGK, new.start_B)
        return (*stores[:layer], written, *stores[layer + 1 :])

    k_BGSK = with_layer(cache.k_BGSK, k_BWGK)
    v_BGSK = with_layer(cache.v_BGSK, v_BWGK)
    return Cache(k_BGSK, v_BGSK, cache.trunk_BSD)
