"""The language model: one trunk, n heads of some kind, norms and tables.

Axes: B batch, T time, D model width, H query heads, G key-value heads, K head width,
V vocabulary.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import Attention, ModelConfig, Remat, ScanLayers
from mtp_jax.model.attention import RowContext, attend_within
from mtp_jax.model.block import Attend, Block
from mtp_jax.model.heads import kind_of
from mtp_jax.model.heads.walk import Parts, Weights
from mtp_jax.model.layers import embed, stack, unstack, weight
from mtp_jax.model.rope import rope_angles
from mtp_jax.parallel.sharding import abstract_tree, on_one_cpu

# Of the Markov bias, whose entries begin with a deviation of 0.02.
_BIAS_FAN_IN = 2500

_FEW_LAYERS = 8  # which a CPU's program has one by one


class LanguageModel(nnx.Module):
    """Parallel multi-token prediction (arXiv:2404.19737, section 2).

    P(x_{t+i} | x_<=t) = softmax(unembedding(norm(head_i(trunk(x_<=t))))), i = 1..n,
    for parallel heads; the other kinds are in `heads`. The trunk has num_layers without
    the layers of the heads, so the number of parameters does not depend on n but for
    what is no layer, and n = 1 is an ordinary transformer.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg

        n, heads = cfg.n_future_tokens, cfg.heads

        def table(width: int, fan_in: int, *stacked: int) -> nnx.Param:
            shape = (*stacked, cfg.vocab_size, width)
            axes = (*[None] * len(stacked), "vocab", "embed")
            return weight(rngs, shape, axes, fan_in=fan_in, dtype=cfg.param_dtype)

        d = cfg.d_model
        self.w_embedding = table(d, d)
        if not cfg.tie_embeddings:
            self.w_unembedding = table(
                d, d, *([n] if heads.unembedding == "own" else [])
            )

        def block(rngs):
            return Block(cfg, rngs=rngs)

        self.trunk = stack(block, cfg.num_trunk_layers, rngs=rngs)
        if bodies := heads.bodies(n):
            self.heads = stack(lambda r: kind_of(cfg).make(cfg, r), bodies, rngs=rngs)
        scales = (n, d) if heads.norm == "own" else (d,)
        self.norm = nnx.Param(jnp.ones(scales, cfg.param_dtype))
        if heads.markov_rank and n > 1:
            self.w_markov_in = table(heads.markov_rank, _BIAS_FAN_IN)
            self.w_markov_out = table(heads.markov_rank, _BIAS_FAN_IN)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Token embeddings in the compute dtype, [B, T, D]."""
        return embed(self.w_embedding[...], tokens_BT, self.cfg.compute_dtype)

    def angles(self, positions_BT: jax.Array) -> jax.Array:
        """Rotary angles of the positions, float32 [B, T, K/2]."""
        return rope_angles(positions_BT, self.cfg)

    def unembedding_param(self) -> jax.Array:
        """The output matrix as it is stored, [V, D], or one a head, [N, V, D]."""
        tied = self.cfg.tie_embeddings
        return (self.w_embedding if tied else self.w_unembedding)[...]

    def parts(self, trunk_BTD: jax.Array) -> Parts:
        """The arrays that the heads' outputs depend on."""
        heads, n = self.cfg.heads, self.cfg.n_future_tokens
        own: dict[str, Any] = {}
        common: dict[str, Any] = {}
        if heads.bodies(n):
            if heads.shared:
                common["body"] = jax.tree.map(lambda w: w[0], self.heads)
            else:
                own["body"] = self.heads
        (own if heads.norm == "own" else common)["norm"] = self.norm[...]
        by_head = own if heads.unembedding == "own" else common
        by_head["unembedding"] = self.unembedding_param()
        if heads.wiring.reads_tokens and n > 1:
            common["embedding"] = self.w_embedding[...]
        if heads.markov_rank and n > 1:
            common["markov_in"] = self.w_markov_in[...]
            common["markov_out"] = self.w_markov_out[...]
        return Parts(trunk_BTD, Weights(**own), Weights(**common))


def run_trunk(
    model: LanguageModel,
    x_BTD: jax.Array,
    rows: RowContext,
    kernel: Attention,
    remat: Remat = "full",
    scan_layers: ScanLayers = "yes",
) -> jax.Array:
    """Trunk output [B, T, D] of embeddings x_BTD, for training and evaluation.

    `remat` says what the forward pass keeps of a layer for the backward pass, which
    computes the rest again:
      none: everything the backward pass reads.
      dots: the layer's input, and the products with its weights.
      full: the layer's input.
      offload: the layer's input, in the memory of the host; on the devices, nothing.
    """
    scan = _scans(scan_layers, model.cfg.num_trunk_layers)
    runs = _runs(model.cfg.trunk_windows)
    layers = [] if scan else unstack(model.trunk)
    at = 0
    for window, count in runs:
        layer = _layer(rows, attend_within(rows, kernel, window), remat, scan)
        if not scan:
            for block in layers[at : at + count]:
                x_BTD, _ = layer(x_BTD, block)
        elif len(runs) == 1:
            x_BTD, _ = jax.lax.scan(layer, x_BTD, model.trunk)
        else:
            end = at + count
            part = jax.tree.map(lambda w, a=at, b=end: w[a:b], model.trunk)
            x_BTD, _ = jax.lax.scan(layer, x_BTD, part)
        at += count
    return x_BTD


def _layer(rows: RowContext, attend: Attend, remat: Remat, scan: bool) -> Callable:
    """A layer of the trunk as a function of x_BTD and its block."""

    def layer(x_BTD, block):
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        return block(x_BTD, rows.angles_BTk, attend)

    policies = jax.checkpoint_policies
    policy = {
        "none": policies.everything_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    # prevent_cse keeps the compiler from undoing it; inside a scan it cannot anyway.
    again = remat != "none"
    return jax.checkpoint(layer, policy=policy, prevent_cse=again and not scan)


def _runs(windows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Windows of layers one after another, each with how many layers have it."""
    return [(w, len(list(same))) for w, same in itertools.groupby(windows)]


def _scans(scan_layers: ScanLayers, count: int) -> bool:
    """Returns True for a loop over so many layers, on the devices of the mesh in force.

    On one CPU few layers are written out: the loop's stacks take time, and many layers
    would take long to compile.
    """
    if scan_layers != "auto":
        return scan_layers == "yes"
    if on_one_cpu():
        return count > _FEW_LAYERS
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or device.platform not in ("gpu", "cuda")


def keep_heads(
    cfg: ModelConfig, params: Any, n: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that keeps the trunk and the first n heads, and its parameters.

    Args:
      cfg: of the model.
      params: as `model_builder` makes them.
      n: how many heads, at least one.

    Raises:
      UserError: heads of this kind need those after them.
    """
    kept = cfg.keep_heads(n)
    params = dict(params)
    stacks = {"heads": kept.heads.bodies(n)}
    if cfg.heads.norm == "own":
        stacks["norm"] = n
    if cfg.heads.unembedding == "own":
        stacks["w_unembedding"] = n
    for name, count in stacks.items():
        if name in params:
            first = jax.tree.map(lambda w, count=count: w[:count], params.pop(name))
            if count:
                params[name] = first
    if n == 1:
        params = {k: v for k, v in params.items() if not k.startswith("w_markov")}
    return kept, params


def model_builder(
    cfg: ModelConfig,
) -> tuple[Callable[[jax.Array], Any], Callable[[Any], LanguageModel]]:
    """`init(key) -> params`, a nested dict, and `build(params) -> model`.

    Needs the mesh to be set.
    """

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(cfg, rngs=nnx.Rngs(params=key))

    # The key is made while tracing: where devices are not there, no array can be made.
    graphdef = nnx.graphdef(jax.eval_shape(lambda: make(jax.random.key(0))))
    return (
        lambda key: nnx.to_pure_dict(nnx.state(make(key))),
        lambda params: nnx.merge(graphdef, params),
    )


def abstract_params(cfg: ModelConfig) -> Any:
    """Shapes, dtypes and shardings of a model's parameters on the mesh that is set."""
    init, _ = model_builder(cfg)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return abstract_tree(shapes, jax.sharding.get_mesh())
