"""The KV cache, and the decoding forward pass over it.

Axes: B batch, S slots, W new tokens of each sequence, N heads, D model width, H query
heads, G key-value heads, K head width, P tokens of a path.

A forward pass is `decode_trunk`, then each head by one of the two other functions:
head 1 at every new token if drafts are to be verified, a drafting head at one only.
Slot s holds the token at position s. A rejected draft leaves its slot behind, and the
token that is committed there instead overwrites it before anything reads it.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, the trunk's and then the heads'.

    In the compute dtype. Slots come after heads, so that what a query head reads is one
    matrix.
    """

    k_BGSK: tuple[jax.Array, ...]
    v_BGSK: tuple[jax.Array, ...]

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


def make_cache(cfg: ModelConfig, layers: int, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences."""
    shape = (batch, cfg.num_kv_heads, slots, cfg.d_head)

    def zeros():
        return tuple(
            jnp.zeros(shape, cfg.compute_dtype, out_sharding=_STORE)
            for _ in range(layers)
        )

    return Cache(zeros(), zeros())


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with its entries and more slots."""
    more = [(0, 0), (0, 0), (0, slots - cache.slots), (0, 0)]
    return jax.tree.map(lambda x_BGSK: jnp.pad(x_BGSK, more), cache)


def decode_trunk(
    model: DecodeModel, new: NewTokens, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The trunk's output for the new tokens, [B, W, D], and the cache with them."""
    angles_BWk = model.angles(new.positions_BW)
    x_BWD = model.embed(new.tokens_BW)
    for layer, block in enumerate(model.trunk):
        x_BWD, cache = block(x_BWD, angles_BWk, _write_and_read(cache, layer, new))
    return x_BWD, cache


def decode_head(
    model: DecodeModel, i: int, trunk_BWD: jax.Array, new: NewTokens, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The output of head i (0 is the next token) at every new token, and the cache."""
    attend = _write_and_read(cache, len(model.trunk) + i, new)
    return model.heads[i](trunk_BWD, model.angles(new.positions_BW), attend)


def decode_heads_at(
    model: DecodeModel,
    heads: range,
    trunk_BWD: jax.Array,
    new: NewTokens,
    slot_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The output of some heads at one of the new tokens of each sequence.

    For the other tokens they make keys and values only.

    Args:
      model: the model.
      heads: which; 0 is the next token.
      trunk_BWD: the trunk's output for the new tokens.
      new: the new tokens, a chain.
      slot_B: which of them is asked for, 0 to W - 1; anything else gives nonsense.
      cache: as `decode_trunk` left it.

    Returns:
      [B, N, D], N being the number of `heads`, and the cache.
    """
    angles_BWk = model.angles(new.positions_BW)
    asked = chain(at_slot(new.tokens_BW, slot_B)[:, None], new.start_B + slot_B)
    angles_B1k = model.angles(asked.positions_BW)
    trunk_B1D = at_slot(trunk_BWD, slot_B)[:, None]
    outputs = []
    for i in heads:
        layer = len(model.trunk) + i

        def write(q_BWHK, k_BWGK, v_BWGK, layer=layer, cache=cache):
            return q_BWHK, _write(cache, layer, k_BWGK, v_BWGK, new)

        # What nobody uses of this, all but keys and values, is never computed.
        _, cache = model.heads[i](trunk_BWD, angles_BWk, write)

        def read(q_B1HK, k_B1GK, v_B1GK, layer=layer, cache=cache):
            del k_B1GK, v_B1GK  # in the cache already
            return _read(q_B1HK, cache, layer, asked), None

        outputs.append(model.heads[i](trunk_B1D, angles_B1k, read)[0])
    if not outputs:
        return trunk_B1D[:, :0], cache
    return jnp.concatenate(outputs, axis=1), cache


def keep_path(cache: Cache, start_B: jax.Array, path_BP: jax.Array) -> Cache:
    """Moves the entries of a path through a tree to where a chain has them.

    Args:
      cache: after a forward pass over a tree.
      start_B: slot of the tree's first node.
      path_BP: nodes, from the first on; the p-th goes into slot start + p. Nodes after
        the end of a path may be any.
    """

    def local(store_BGSK, start_B, path_BP):
        def one(store_GSK, start, path_P):
            # The slots of a path rise, so reading all before writing is enough.
            # Clipped as the write is: a finished text may stand at the cache's end.
            kept_GPK = jnp.take(store_GSK, start + path_P, axis=1, mode="clip")
            return lax.dynamic_update_slice(store_GSK, kept_GPK, (0, start, 0))

        return jax.vmap(one)(store_BGSK, start_B, path_BP)

    in_specs = (_STORE, spec("batch"), spec("batch", None))
    move = jax.shard_map(local, in_specs=in_specs, out_specs=_STORE)
    return jax.tree.map(lambda x_BGSK: move(x_BGSK, start_B, path_BP), cache)


def at_slot(x_BWX: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The entry of each sequence at its slot, [B, ...] of [B, W, ...].

    By comparison, not by a gather or a product: exact, and split as its input is. Zero
    where the slot is not one of the W.
    """
    is_slot_BW = jnp.arange(x_BWX.shape[1])[None] == slot_B[:, None]
    is_slot_BWX = jnp.expand_dims(is_slot_BW, tuple(range(2, x_BWX.ndim)))
    return jnp.sum(jnp.where(is_slot_BWX, x_BWX, 0), axis=1, dtype=x_BWX.dtype)


def _write_and_read(cache: Cache, layer: int, new: NewTokens):
    """Attention through the cache, which keeps the cache."""

    def attend(q_BWHK, k_BWGK, v_BWGK):
        written = _write(cache, layer, k_BWGK, v_BWGK, new)
        return _read(q_BWHK, written, layer, new), written

    return attend


def _read(q_BWHK, cache, layer, new):
    k_BGSK, v_BGSK = cache.k_BGSK[layer], cache.v_BGSK[layer]
    return cached_attention(q_BWHK, k_BGSK, v_BGSK, new.start_B, new.ancestors_WW)


def _write(cache, layer, k_BWGK, v_BWGK, new):
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

    return Cache(with_layer(cache.k_BGSK, k_BWGK), with_layer(cache.v_BGSK, v_BWGK))
