"""The model as decoding reads it: layers one by one, every matrix an array of its own.

A forward pass of decoding has few tokens, so what it costs is reading the weights. A
scan over stacked layers would copy each layer's weights before it reads them; here the
layers are a list, cast to the compute dtype once, and every matrix has its inputs last,
so that what makes one output lies together. Where the kernels of `native` serve, it is
in `panels` instead.

Axes: B batch, W new tokens of each sequence, D model width, V vocabulary, k half of the
width of an attention head.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cpu import native
from mtp_jax.decode.cpu.packed import PackedScale, PackedWeight, pack
from mtp_jax.model.block import Block
from mtp_jax.model.layers import embed, product, rms_norm, rope_angles
from mtp_jax.parallel.sharding import on_one_cpu, spec

# Axes of a matrix that are summed over, the first ones in `model`; 1 where not named.
_INPUT_AXES = {"w_o": 2}


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """A model within a compiled program."""

    cfg: ModelConfig
    trunk: tuple[Block, ...]
    heads: tuple[Block, ...]  # as many as are used
    norm_D: jax.Array | PackedScale
    w_embedding_VD: jax.Array
    w_unembedding: jax.Array | PackedWeight  # [V, D]
    tables: Any = None  # what the decoder reads besides; see `state.Reading`

    def embed(self, tokens_BW: jax.Array) -> jax.Array:
        """Token embeddings, [B, W, D]."""
        return embed(self.w_embedding_VD, tokens_BW, self.cfg.compute_dtype)

    def angles(self, positions_BW: jax.Array) -> jax.Array:
        """Rotary angles of the positions, float32 [B, W, k]."""
        return rope_angles(positions_BW, self.cfg.d_head, self.cfg.rope_theta)

    def logits(self, heads_BWD: jax.Array) -> jax.Array:
        """Scores of the vocabulary from heads' outputs, float32 [B, W, V]."""
        normed_BWD = rms_norm(heads_BWD, self.norm_D, self.cfg.norm_eps)
        out = spec("batch", None, "vocab")
        if isinstance(self.w_unembedding, PackedWeight):
            return self.w_unembedding.project(normed_BWD, out)
        w_VD = jax.sharding.reshard(self.w_unembedding, spec("vocab", None))
        return product("bwd,vd->bwv", normed_BWD, w_VD, out, jnp.float32)


def unstack(cfg: ModelConfig, params: Any) -> Any:
    """Parameters as `build` takes them, of those that `model_builder` makes.

    `trunk` and `heads` become lists of layers, so that the model with fewer heads has a
    shorter list. Where `native` serves, all of them but the embedding are as its
    kernels take them, and the unembedding is there even if it is tied. Needs the mesh
    to be set.
    """
    is_native = on_one_cpu() and native.serves(cfg.compute_dtype)

    def relaid(path, w):
        name = path[-1].key
        w = w.astype(cfg.compute_dtype)
        if not name.startswith("w_"):
            return PackedScale(w) if is_native else w
        inputs = range(_INPUT_AXES.get(name, 1))
        w = jnp.moveaxis(w, tuple(inputs), tuple(i - len(inputs) for i in inputs))
        if not is_native:
            return w
        outputs = w.shape[: w.ndim - len(inputs)]
        return pack(w.reshape(math.prod(outputs), -1), outputs)

    def layers(stacked, count):
        def layer(i):
            return jax.tree.map_with_path(lambda path, w: relaid(path, w[i]), stacked)

        return [layer(i) for i in range(count)]

    @jax.jit
    def whole(params):
        rest = {name: params[name].astype(cfg.compute_dtype) for name in params
                if name not in ("trunk", "heads")}  # fmt: skip
        trunk = layers(params["trunk"], cfg.num_trunk_layers)
        heads = layers(params["heads"], cfg.n_future_tokens)
        if is_native:
            rest["norm"] = PackedScale(rest["norm"])
            w_VD = rest.get("w_unembedding", rest["w_embedding"])
            rest["w_unembedding"] = pack(w_VD, (cfg.vocab_size,))
        return {**rest, "trunk": trunk, "heads": heads}

    return whole(params)


def build(cfg: ModelConfig, params: Any) -> DecodeModel:
    """The model of parameters from `unstack`, with the heads that are among them.

    A loop that reads it builds it within: what enters the loop are then the weights as
    they are stored, and not copies of them with their axes moved back.
    """
    graphdef = nnx.graphdef(
        jax.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(jax.random.key(0))))
    )

    def original(path, w):
        name = path[-1].key
        if not name.startswith("w_") or _is_native(w):
            return w
        inputs = range(_INPUT_AXES.get(name, 1))
        return jnp.moveaxis(w, tuple(i - len(inputs) for i in inputs), tuple(inputs))

    def blocks(layers):
        # Moving axes back is no work: it only undoes `unstack` for the reader.
        back = functools.partial(jax.tree.map_with_path, original, is_leaf=_is_native)
        return tuple(nnx.merge(graphdef, back(layer)) for layer in layers)

    return DecodeModel(
        cfg=cfg,
        trunk=blocks(params["trunk"]),
        heads=blocks(params["heads"]),
        norm_D=params["norm"],
        w_embedding_VD=params["w_embedding"],
        w_unembedding=params.get("w_unembedding", params["w_embedding"]),
        tables=params.get("tables"),
    )


def _is_native(w: Any) -> bool:
    return isinstance(w, PackedWeight | PackedScale)
