"""The model as decoding reads it: layers one by one, every matrix an array of its own.

A forward pass of decoding has few tokens, so what it costs is reading the weights. A
scan over stacked layers would copy each layer's weights before it reads them; here the
layers are a list, cast to the compute dtype once, and every matrix has its inputs last,
so that what makes one output lies together. On one CPU it is stored as the `backend`
there reads it.

Axes: B batch, W new tokens of each sequence, D model width, V vocabulary, k half of the
width of an attention head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cpu.backend import backend_for
from mtp_jax.model.block import Block
from mtp_jax.model.layers import Norms, Projects, embed, rms_norm, rope_angles, unembed
from mtp_jax.parallel.sharding import spec

# Axes of a matrix that are summed over, the first ones in `model`; 1 where not named.
_INPUT_AXES = {"w_o": 2}


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """A model within a compiled program."""

    cfg: ModelConfig
    trunk: tuple[Block, ...]
    heads: tuple[Block, ...]  # as many as are used
    norm_D: jax.Array | Norms
    w_embedding_VD: jax.Array
    w_unembedding_VD: jax.Array | Projects
    tables: Any = None  # of a decoder that reads a file, see `state.ReadsTables`
    ids: int | None = None  # ids that there are tokens for, the first ones; None: all

    @property
    def choices(self) -> int:
        """The number of ids that may be chosen: those that there are tokens for."""
        return self.cfg.vocab_size if self.ids is None else self.ids

    def embed(self, tokens_BW: jax.Array) -> jax.Array:
        """Token embeddings, [B, W, D]."""
        return embed(self.w_embedding_VD, tokens_BW, self.cfg.compute_dtype)

    def angles(self, positions_BW: jax.Array) -> jax.Array:
        """Rotary angles of the positions, float32 [B, W, k]."""
        return rope_angles(positions_BW, self.cfg.d_head, self.cfg.rope_theta)

    def logits(self, heads_BWD: jax.Array) -> jax.Array:
        """Scores of the vocabulary from heads' outputs, float32 [B, W, V].

        Those of ids to spare, which no token has, are -inf.
        """
        normed_BWD = rms_norm(heads_BWD, self.norm_D, self.cfg.norm_eps)
        w_VD = self.w_unembedding_VD
        if isinstance(w_VD, jax.Array):
            w_VD = jax.sharding.reshard(w_VD, spec("vocab", None))
        logits_BWV = unembed(normed_BWD, w_VD, spec("batch", None, "vocab"))
        if self.choices == self.cfg.vocab_size:
            return logits_BWV
        ids_11V = jnp.arange(self.cfg.vocab_size)[None, None]
        return jnp.where(ids_11V < self.choices, logits_BWV, -jnp.inf)


def unstack(cfg: ModelConfig, params: Any) -> Any:
    """Parameters in the form that `build` takes, of those that `model_builder` makes.

    `trunk` and `heads` become lists of layers, so that the model with fewer heads has a
    shorter list. On one CPU all of them but the embedding are stored as the backend
    reads them, and the unembedding is there even if it is tied, unless that would only
    be a copy of the embedding. Needs the mesh to be set.
    """
    backend = backend_for(cfg.compute_dtype)

    def relaid(path, w):
        name = path[-1].key
        w = w.astype(cfg.compute_dtype)
        if not name.startswith("w_"):
            return w if backend is None else backend.scale(w)
        inputs = _INPUT_AXES.get(name, 1)
        first, last = tuple(range(inputs)), tuple(range(-inputs, 0))
        w = jnp.moveaxis(w, first, last)
        return w if backend is None else backend.matrix(w, inputs)

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
        if backend is not None:
            rest["norm"] = backend.scale(rest["norm"])
            if backend.copies or "w_unembedding" in rest:
                w_VD = rest.get("w_unembedding", rest["w_embedding"])
                rest["w_unembedding"] = backend.matrix(w_VD, 1)
        return {**rest, "trunk": trunk, "heads": heads}

    return whole(params)


def build(cfg: ModelConfig, params: Any, ids: int | None = None) -> DecodeModel:
    """The model of parameters from `unstack`, with the heads that are among them.

    There are tokens for its first `ids` ids, or for all of them. A loop that reads it
    builds it within: what enters the loop are then the weights as they are stored, and
    not copies of them with their axes moved back.
    """
    backend = backend_for(cfg.compute_dtype)
    graphdef = nnx.graphdef(
        jax.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(jax.random.key(0))))
    )

    def original(path, w):
        name = path[-1].key
        if not name.startswith("w_") or not isinstance(w, jax.Array):
            return w
        inputs = _INPUT_AXES.get(name, 1)
        return jnp.moveaxis(w, tuple(range(-inputs, 0)), tuple(range(inputs)))

    def is_stored(w):
        return not isinstance(w, dict)

    def block(layer):
        # Moving axes back is no work: it only undoes `unstack` for the reader.
        whole = jax.tree.map_with_path(original, layer, is_leaf=is_stored)
        return nnx.merge(graphdef, whole)

    w_unembedding = params.get("w_unembedding")
    if w_unembedding is None:
        w_unembedding = params["w_embedding"]
        if backend is not None:
            w_unembedding = backend.matrix(w_unembedding, 1)
    return DecodeModel(
        cfg=cfg,
        trunk=tuple(block(layer) for layer in params["trunk"]),
        heads=tuple(block(layer) for layer in params["heads"]),
        norm_D=params["norm"],
        w_embedding_VD=params["w_embedding"],
        w_unembedding_VD=w_unembedding,
        tables=params.get("tables"),
        ids=None if ids is None else min(ids, cfg.vocab_size),
    )
