"""The heads of a model over new tokens in decoding, whatever their kind.

`read_first` runs what is on the way to head 1, and gives what the other heads read,
their source; `extend` has these take notice of tokens that are in the text already; and
`drafting` has them predict.

Axes: B batch, W new tokens of each sequence, E tokens of a text at most, D model width,
X width of the source.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cache import (
    Cache,
    NewTokens,
    at_slot,
    chain,
    read_cache,
    write_and_read,
    write_cache,
)
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.model.block import Block
from mtp_jax.model.heads import kind_of
from mtp_jax.parallel.sharding import spec


@dataclasses.dataclass
class LayerPass:
    """Runs layers of heads over new tokens, one after another, through the cache."""

    model: DecodeModel
    new: NewTokens
    cache: Cache
    layer: int  # in which the next one keeps its keys and values
    # Where the output of the last layers is wanted, [B]; None: at all new tokens.
    slot_B: jax.Array | None = None
    left: int = 0  # layers to come, the last of which gives one output

    def __call__(self, block: Block, x_BWD: jax.Array) -> jax.Array:
        """x_BWD after the layer: [B, W, D], or [B, 1, D] after the last."""
        self.left -= 1
        if self.left == 0 and self.slot_B is not None:
            x_BWD = self._at_slot(block, x_BWD, self.slot_B)
        else:
            window = self.model.cfg.heads_window
            attend = write_and_read(self.cache, self.layer, self.new, window)
            angles_BWk = self.model.angles(self.new.positions_BW)
            x_BWD, self.cache = block(x_BWD, angles_BWk, attend)
        self.layer += 1
        return x_BWD

    def _at_slot(self, block, x_BWD, slot_B):
        """The output at one of the new tokens; of the others, keys and values only."""
        new, layer = self.new, self.layer
        asked = chain(at_slot(new.tokens_BW, slot_B)[:, None], new.start_B + slot_B)

        def write(q_BWHK, k_BWGK, v_BWGK):
            return q_BWHK, write_cache(self.cache, layer, k_BWGK, v_BWGK, new)

        # What nobody uses of this, all but keys and values, is never computed.
        _, self.cache = block(x_BWD, self.model.angles(new.positions_BW), write)

        def read(q_B1HK, k_B1GK, v_B1GK):
            del k_B1GK, v_B1GK  # in the cache already
            window = self.model.cfg.heads_window
            return read_cache(q_B1HK, self.cache, layer, asked, window), None

        x_B1D = at_slot(x_BWD, slot_B)[:, None]
        return block(x_B1D, self.model.angles(asked.positions_BW), read)[0]


def source_width(cfg: ModelConfig, heads: int) -> int:
    """X, of a model of which so many heads are used."""
    streams = max(heads - 1, 1) if cfg.heads.wiring.reads == "after" else 1
    return streams * cfg.d_model


def read_first(
    model: DecodeModel,
    trunk_BWD: jax.Array,
    new: NewTokens,
    cache: Cache,
    slot_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Runs head 1 and what it reads over new tokens.

    Args:
      model: the model.
      trunk_BWD: the trunk's output.
      new: the tokens, a chain or a tree.
      cache: as `decode_trunk` left it.
      slot_B: head 1 is asked at this one of them only; a chain. None: at all.

    Returns:
      Normed output of head 1, [B, W, D] or [B, 1, D]; the source of the other heads,
      [B, W, X]; and the cache.
    """
    cfg, kind, wiring = model.cfg, kind_of(model.cfg), model.cfg.heads.wiring
    layers, bodies = cfg.heads.layers, model.heads[0].bodies
    through = LayerPass(model, new, cache, len(model.trunk))
    streams = [trunk_BWD]
    for number, body in enumerate(bodies or (None,), start=1):
        # The stream of head 1 is read at all new tokens by the second of a chain.
        is_last = number == max(len(bodies), 1) and wiring.reads != "before"
        through.slot_B = slot_B if is_last else None
        through.left = layers
        x_BWD, norm = streams[-1], model.norm(0)
        streams.append(kind.run(cfg, body, norm, x_BWD, None, through))
    head_BWD = kind.finish(cfg, model.norm(0), streams[-1])
    if slot_B is not None and head_BWD.shape[1] == new.tokens_BW.shape[1]:
        head_BWD = at_slot(head_BWD, slot_B)[:, None]
    source_BWX = trunk_BWD
    if wiring.reads == "before" and not wiring.reads_tokens:
        source_BWX = streams[-1]
    elif wiring.reads == "after" and len(model.heads) > 1:
        used = streams[-2 : -1 - len(model.heads) : -1]  # of heads 2, 3 ...
        source_BWX = jnp.concatenate(used, axis=-1)
    return head_BWD, source_BWX, through.cache


def head_layer(model: DecodeModel, head: int) -> int:
    """The first layer of the cache that a drafting head (1 is head 2) writes to."""
    heads = model.cfg.heads
    one_cache = heads.draft_cache == "shared"
    before = 0 if one_cache else heads.caches(model.cfg.n_future_tokens, head)
    return len(model.trunk) + before


def run_drafting_head(
    model: DecodeModel,
    head: int,
    x_BWD: jax.Array,
    token_BWD: jax.Array | None,
    new: NewTokens,
    cache: Cache,
    slot_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """The stream of a drafting head (1 is head 2), [B, W, D] or [B, 1, D].

    Args:
      model: the model.
      head: which.
      x_BWD: what it reads.
      token_BWD: embeddings of the tokens before those that it predicts, or None.
      new: the new tokens, a chain.
      cache: the cache.
      slot_B: the one of them at which the stream is asked for; None: at all.
    """
    cfg, [body] = model.cfg, model.heads[head].bodies
    if slot_B is not None and not cfg.heads.wiring.layered:
        x_BWD, slot_B = at_slot(x_BWD, slot_B)[:, None], None
    through = LayerPass(
        model, new, cache, head_layer(model, head), slot_B, cfg.heads.layers
    )
    norm = model.norm(head)
    stream_BWD = kind_of(cfg).run(cfg, body, norm, x_BWD, token_BWD, through)
    return stream_BWD, through.cache


def first_stream(model: DecodeModel, trunk_BWD: jax.Array) -> jax.Array:
    """The stream that head 2 reads where head 1 has no body, [B, W, D]."""
    cfg = model.cfg
    return kind_of(cfg).run(cfg, None, model.norm(0), trunk_BWD, None, None)


def extend(
    model: DecodeModel,
    source_BWX: jax.Array,
    new: NewTokens,
    text_BE: jax.Array,
    cache: Cache,
) -> Cache:
    """Has the drafting heads read new tokens, without asking what they predict.

    Args:
      model: the model.
      source_BWX: from `read_first`.
      new: the tokens, a chain.
      text_BE: the texts that they are of, int32. What stands beyond their ends is read
        as if it were text; `drafting` reads those slots again.
      cache: the cache.
    """
    wiring = model.cfg.heads.wiring
    if not wiring.layered or wiring.reads == "after":
        return cache
    x_BWX = first_stream(model, source_BWX) if wiring.reads_tokens else source_BWX
    heads = range(1, len(model.heads))
    if model.cfg.heads.draft_cache == "shared":
        heads = heads[:1]  # the others read drafts only
    for head in heads:
        token_BWD = None
        if wiring.reads_tokens:
            w, at_B = x_BWX.shape[1], new.start_B + head
            token_BWD = model.embed(text_at(text_BE, at_B, w))
        stream_BWX, cache = run_drafting_head(model, head, x_BWX, token_BWD, new, cache)
        x_BWX = x_BWX if wiring.reads == "trunk" else stream_BWX
    return cache


def at_all(
    model: DecodeModel,
    source_BWX: jax.Array,
    new: NewTokens,
    cache: Cache,
    text_BE: jax.Array | None = None,
) -> tuple[list[jax.Array], Cache]:
    """Normed outputs of the drafting heads at all new tokens, [B, W, D] each.

    The tokens may be a tree where no head reads tokens; else text_BE is the texts that
    they are of, int32.
    """
    cfg, wiring = model.cfg, model.cfg.heads.wiring
    outputs, d, reads = [], cfg.d_model, wiring.reads
    x_BWX = first_stream(model, source_BWX) if wiring.reads_tokens else source_BWX
    for i in range(1, len(model.heads)):
        if reads == "after":
            stream_BWD = source_BWX[..., (i - 1) * d : i * d]
        else:
            token_BWD = None
            if wiring.reads_tokens:
                assert text_BE is not None
                w = x_BWX.shape[1]
                token_BWD = model.embed(text_at(text_BE, new.start_B + i, w))
            stream_BWD, cache = run_drafting_head(
                model, i, x_BWX, token_BWD, new, cache
            )
            x_BWX = x_BWX if reads == "trunk" else stream_BWD
        outputs.append(kind_of(cfg).finish(cfg, model.norm(i), stream_BWD))
    return outputs, cache


def text_at(text_BE: jax.Array, at_B: jax.Array, width: int) -> jax.Array:
    """Tokens of texts from a position on, int32 [B, W]; the last, beyond the end."""

    def local(text_BE, at_B):
        places_BW = at_B[:, None] + jnp.arange(width)[None]
        return jnp.take_along_axis(text_BE, places_BW, axis=1, mode="clip")

    rows = spec("batch", None)
    cut = jax.shard_map(local, in_specs=(rows, spec("batch")), out_specs=rows)
    return cut(text_BE, at_B)
