"""Keys and values of what was read so far, and the one forward pass that uses them.

Axes: L layers (the trunk's, then one a head), B batch, S slots, W new tokens of each
sequence, N heads, D model width, H query heads, G key-value heads, K head width.

Slot s holds the token at position s. A rejected draft leaves its slot behind, and the
token that is committed there instead overwrites it before anything reads it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.attention import cached_attention
from mtp_jax.config import ModelConfig
from mtp_jax.model import LanguageModel
from mtp_jax.sharding import spec

_STORE = spec(None, "batch", None, "heads", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, in the compute dtype."""

    k_LBSGK: jax.Array
    v_LBSGK: jax.Array


def make_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` positions for each of `batch` sequences."""
    shape = (cfg.num_layers, batch, slots, cfg.num_kv_heads, cfg.d_head)

    def zeros():
        return jnp.zeros(shape, cfg.compute_dtype, out_sharding=_STORE)

    return Cache(zeros(), zeros())


def forward(
    model: LanguageModel, tokens_BW: jax.Array, positions_BW: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads W more tokens of each sequence; prompts and drafts alike.

    Args:
      model: all of its heads run.
      tokens_BW: token ids.
      positions_BW: where they stand; a position without a slot is not written.
      cache: holds every earlier position of each sequence.

    Returns:
      The output of each head, [N, B, W, D], and the cache with the new tokens.
    """
    angles_BWk = model.angles(positions_BW)

    def run(block, layer, x_BWD, cache):
        def attend(q_BWHK, k_BWGK, v_BWGK):
            k_LBSGK = _write(cache.k_LBSGK, k_BWGK, positions_BW, layer)
            v_LBSGK = _write(cache.v_LBSGK, v_BWGK, positions_BW, layer)
            read_BWHK = cached_attention(
                q_BWHK, k_LBSGK[layer], v_LBSGK[layer], positions_BW
            )
            return read_BWHK, Cache(k_LBSGK, v_LBSGK)

        return block(x_BWD, angles_BWk, attend)

    # The cache is a carry, not a scanned input: so its slots are written in place.
    def trunk_layer(carry, block_and_layer):
        return run(*block_and_layer, *carry), None

    def head(cache, block_and_layer):
        head_BWD, cache = run(*block_and_layer, trunk_BWD, cache)
        return cache, head_BWD

    layers = jnp.arange(model.cfg.num_layers)
    trunk_layers, heads = jnp.split(layers, [model.cfg.num_trunk_layers])
    start = (model.embed(tokens_BW), cache)
    carry, _ = jax.lax.scan(trunk_layer, start, (model.trunk, trunk_layers))
    trunk_BWD, cache = carry
    cache, heads_NBWD = jax.lax.scan(head, cache, (model.heads, heads))
    return heads_NBWD, cache


def _write(
    store_LBSGK: jax.Array,
    new_BWGK: jax.Array,
    positions_BW: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """The store with the new entries of a layer in the slots of their positions."""

    def local(store_LBSGK, new_BWGK, positions_BW, layer):
        rows_B1 = jnp.arange(new_BWGK.shape[0])[:, None]
        slots = store_LBSGK.at[layer, rows_B1, positions_BW]
        return slots.set(new_BWGK, mode="drop")

    by_head = spec("batch", None, "heads", None)
    specs = (_STORE, by_head, spec("batch", None), spec())
    return jax.shard_map(local, in_specs=specs, out_specs=_STORE)(
        store_LBSGK, new_BWGK, positions_BW, layer
    )
