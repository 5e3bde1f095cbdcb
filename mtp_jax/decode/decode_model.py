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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cpu.backend import backend_for
from mtp_jax.model.block import Block
from mtp_jax.model.heads import kind_of
from mtp_jax.model.layers import Norms, Projects, embed, rms_norm, unembed
from mtp_jax.model.rope import rope_angles
from mtp_jax.parallel.sharding import spec

# Axes of a matrix that are summed over, the first ones in `model`; 1 where not named.
_INPUT_AXES = {"w_o": 2}


@dataclasses.dataclass(frozen=True)
class DecodeHead:
    """A head within a compiled program."""

    # Those that it has to run, first to last; of an anticausal model head 1 has all.
    bodies: tuple[Any, ...]
    norm_D: jax.Array | Norms
    w_unembedding_VD: jax.Array | Projects


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """A model within a compiled program."""

    cfg: ModelConfig
    trunk: tuple[Block, ...]
    heads: tuple[DecodeHead, ...]  # as many as are used
    w_embedding_VD: jax.Array
    w_markov_in_Vr: jax.Array | None = None  # of the bias by the token before
    w_markov_out_Vr: jax.Array | Projects | None = None
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
        return rope_angles(positions_BW, self.cfg)

    def norm(self, head: int) -> Callable[[jax.Array], jax.Array]:
        """The last norm of a head (0 is the next token)."""
        scale_D = self.heads[head].norm_D
        return lambda x_BWD: rms_norm(x_BWD, scale_D, self.cfg.norm_eps)

    def logits(self, hidden_BWD: jax.Array, head: int | range = 0) -> jax.Array:
        """Scores of the vocabulary, float32 [B, W, V], without the Markov bias.

        Those of ids to spare, which no token has, are -inf.

        Args:
          hidden_BWD: normed outputs of heads.
          head: of which head they all are, or for each of them, a range.
        """
        heads = [head] if isinstance(head, int) else list(head)
        if len(heads) > 1 and self.cfg.heads.unembedding == "own":
            each = [
                self.logits(hidden_BWD[:, w : w + 1], i) for w, i in enumerate(heads)
            ]
            return jnp.concatenate(each, axis=1)
        w_VD = self.heads[heads[0] if heads else 0].w_unembedding_VD
        logits_BWV = self._product(hidden_BWD, w_VD)
        if self.choices == self.cfg.vocab_size:
            return logits_BWV
        ids_11V = jnp.arange(self.cfg.vocab_size)[None, None]
        return jnp.where(ids_11V < self.choices, logits_BWV, -jnp.inf)

    def bias(self, previous_BP: jax.Array) -> jax.Array:
        """The Markov bias of the tokens after some others, float32 [B, P, V]."""
        assert self.w_markov_in_Vr is not None and self.w_markov_out_Vr is not None
        dtype = self.cfg.compute_dtype
        found_BPr = embed(self.w_markov_in_Vr, previous_BP, dtype)
        return self._product(found_BPr, self.w_markov_out_Vr)

    def _product(self, x_BWX: jax.Array, w_VX: jax.Array | Projects) -> jax.Array:
        if isinstance(w_VX, jax.Array):
            w_VX = jax.sharding.reshard(w_VX, spec("vocab", None))
        return unembed(x_BWX, w_VX, spec("batch", None, "vocab"))


def unstack(cfg: ModelConfig, params: Any) -> Any:
    """Parameters in the form that `build` takes, of those that `model_builder` makes.

    `trunk` and `heads` become lists, so that the model with fewer heads has a shorter
    list. On one CPU all of them but what is looked up are stored as the backend reads
    them, and the unembedding is there even if it is tied, unless that would only be a
    copy of the embedding. Needs the mesh to be set.
    """
    backend = backend_for(cfg.compute_dtype)
    n, heads = cfg.n_future_tokens, cfg.heads

    def relaid(path, w):
        name = path[-1].key
        w = w.astype(cfg.compute_dtype)
        if name.startswith("norm") and backend is not None:
            return backend.scale(w)
        if not name.startswith("w_"):
            return w
        inputs = _INPUT_AXES.get(name, 1)
        first, last = tuple(range(inputs)), tuple(range(-inputs, 0))
        w = jnp.moveaxis(w, first, last)
        return w if backend is None else backend.matrix(w, inputs)

    def table(w_VX):
        w_VX = w_VX.astype(cfg.compute_dtype)
        return w_VX if backend is None else backend.matrix(w_VX, 1)

    def layer(stacked, i):
        return jax.tree.map_with_path(lambda path, w: relaid(path, w[i]), stacked)

    def relaid_norm(scale_D):
        scale_D = scale_D.astype(cfg.compute_dtype)
        return scale_D if backend is None else backend.scale(scale_D)

    @jax.jit
    def whole(params):
        looked_up = ("w_embedding", "w_markov_in")
        rest = {name: params[name].astype(cfg.compute_dtype) for name in looked_up
                if name in params}  # fmt: skip
        made: list[dict[str, Any]] = [{} for _ in range(n)]
        for name in ("norm", "w_unembedding"):
            convert = table if name == "w_unembedding" else relaid_norm
            if getattr(heads, name.removeprefix("w_")) == "own" and name in params:
                for i, head in enumerate(made):
                    head[name] = convert(params[name][i])
            elif name in params:
                rest[name] = convert(params[name])
        if "w_unembedding" not in params and backend is not None and backend.copies:
            rest["w_unembedding"] = table(params["w_embedding"])
        if "w_markov_out" in params:
            rest["w_markov_out"] = table(params["w_markov_out"])
        trunk = [layer(params["trunk"], i) for i in range(cfg.num_trunk_layers)]
        bodies = [layer(params["heads"], i) for i in range(heads.bodies(n))]
        return {**rest, "trunk": trunk, "heads": made}, bodies

    # Shared weights are in several heads, and once on the devices.
    made, bodies = whole(params)
    for head, of_head in zip(made["heads"], _dealt(cfg, bodies), strict=True):
        head["bodies"] = of_head
    return made


def _dealt(cfg: ModelConfig, bodies: list[Any]) -> list[list[Any]]:
    """The bodies that each head has to run, first to last."""
    n, heads = cfg.n_future_tokens, cfg.heads
    of_each = bodies * heads.runs(n) if heads.shared else bodies
    if heads.wiring.reads == "after":
        return [of_each[::-1], *[[] for _ in range(n - 1)]]
    return [*[[] for _ in range(n - heads.runs(n))], *[[body] for body in of_each]]


def build(cfg: ModelConfig, params: Any, ids: int | None = None) -> DecodeModel:
    """The model of parameters from `unstack`, with the heads that are among them.

    There are tokens for its first `ids` ids, or for all of them. A loop that reads it
    builds it within: what enters the loop are then the weights as they are stored, and
    not copies of them with their axes moved back.
    """
    backend = backend_for(cfg.compute_dtype)

    def graphdef_of(make):
        return nnx.graphdef(jax.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))))

    block = graphdef_of(lambda rngs: Block(cfg, rngs=rngs))
    body = graphdef_of(lambda rngs: kind_of(cfg).make(cfg, rngs))

    def original(path, w):
        name = path[-1].key
        if not name.startswith("w_") or not isinstance(w, jax.Array):
            return w
        inputs = _INPUT_AXES.get(name, 1)
        return jnp.moveaxis(w, tuple(range(-inputs, 0)), tuple(range(inputs)))

    def is_stored(w):
        return not isinstance(w, dict)

    def module(graphdef, stored):
        # Moving axes back is no work: it only undoes `unstack` for the reader.
        whole = jax.tree.map_with_path(original, stored, is_leaf=is_stored)
        return nnx.merge(graphdef, whole)

    def head(stored):
        return DecodeHead(
            tuple(module(body, x) for x in stored["bodies"]),
            stored["norm"] if "norm" in stored else params["norm"],
            stored.get("w_unembedding", w_unembedding),
        )

    w_unembedding = params.get("w_unembedding")
    if w_unembedding is None and cfg.tie_embeddings:
        w_unembedding = params["w_embedding"]
        if backend is not None:
            w_unembedding = backend.matrix(w_unembedding, 1)
    return DecodeModel(
        cfg=cfg,
        trunk=tuple(module(block, layer) for layer in params["trunk"]),
        heads=tuple(head(stored) for stored in params["heads"]),
        w_embedding_VD=params["w_embedding"],
        w_markov_in_Vr=params.get("w_markov_in"),
        w_markov_out_Vr=params.get("w_markov_out"),
        tables=params.get("tables"),
        ids=None if ids is None else min(ids, cfg.vocab_size),
    )
