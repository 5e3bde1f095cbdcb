"""Where new heads begin.

A copy of the last layer says head 1's token again where a later one is asked for, and
its loss is above that of the frequencies of tokens; a map by ridge regression is below
them (docs/growing.md has figures).

Axes: N heads, D model width, V vocabulary, r rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import HeadStart, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.growth.counts import Counts, bias_of
from mtp_jax.growth.gains import best_gains
from mtp_jax.growth.ridge import check_maps, fit_maps
from mtp_jax.growth.stacks import with_last
from mtp_jax.growth.text import FitText
from mtp_jax.growth.token_map import bias_of_map, fit_token_map
from mtp_jax.model.language_model import abstract_params, model_builder
from mtp_jax.model.regrow import regrown
from mtp_jax.parallel.processes import of_first

Tree = Any
_FITTED = ("unigram", "counts", "ridge")


def reads_text(before: ModelConfig, after: ModelConfig, start: HeadStart) -> bool:
    """True if a start of the heads that a model lacks is fitted to text."""
    return start in _FITTED and after.n_future_tokens > before.n_future_tokens


def check_start(before: ModelConfig, after: ModelConfig, start: HeadStart) -> None:
    """Refuses a start that heads of a model cannot have.

    Raises:
      UserError: it needs a gain a head, a bias or maps, and the heads have none.
    """
    n, heads = after.n_future_tokens, after.heads
    if n <= before.n_future_tokens or heads.wiring.reads == "after":
        return  # anticausal heads are layers that are there
    if start in _FITTED and heads.norm != "own":
        raise UserError(
            f"a start by {start} needs a gain a head, the scale of its last norm; set "
            "config.heads.norm=own, or choose random or copy."
        )
    if start in ("unigram", "counts") and not heads.markov_rank:
        raise UserError(
            f"a start by {start} is the bias by the token before, and "
            "config.heads.markov_rank is 0; set it above 0, or choose another start."
        )
    if start in ("unigram", "counts") and before.n_future_tokens > 1:
        raise UserError(
            f"a start by {start} would change the bias of the heads that are there; "
            "choose another start."
        )
    if start == "ridge":
        check_maps(after)


def started(
    before: ModelConfig,
    after: ModelConfig,
    params: Tree,
    start: HeadStart,
    text: FitText | None,
    seed: int,
) -> Tree:
    """Parameters of a model `after`, of those of a model `before`; the mesh is set.

    Args:
      before: the model that is there.
      after: from `regrown_config` of it.
      params: of `before`, on the mesh.
      start: of the heads that it lacks.
      text: that starts are fitted to; None for those that read none (`reads_text`).
      seed: of what is drawn.

    Raises:
      UserError: what `check_start` raises.
    """
    check_start(before, after, start)
    n, n_before = after.n_future_tokens, before.n_future_tokens
    fresh = _fresh(before, after, params, seed)
    layout = jax.tree.map(lambda x: x.sharding, fresh)
    grow = jax.jit(lambda p, f: regrown(before, after, p, f), out_shardings=layout)
    grown = grow(params, fresh)
    grown = jax.tree.map(lambda x, like: x.astype(like.dtype), grown, fresh)
    if n <= n_before or start == "random":
        return grown
    if after.heads.wiring.reads == "after":  # layers that are there
        if start == "copy" or after.heads.norm != "own":
            return grown
    else:
        grown = _copied(after, grown, n_before)
        if start == "copy":
            return grown
        assert text is not None
        if start == "ridge":
            return _by_ridge(after, grown, text, n_before)
        counts = Counts.of(text)
        grown = _with_counts(after, grown, counts, pairs=start == "counts")
        if start == "unigram":
            return _with_gains(grown, n_before, np.zeros(n - n_before))
    assert text is not None
    found = best_gains(after, grown, text, n_before)
    return _with_gains(grown, n_before, found.of_heads)


def _fresh(before: ModelConfig, after: ModelConfig, params: Tree, seed: int) -> Tree:
    """New parameters of a model; its norms and unembeddings are copies of head 1's."""
    init, _ = model_builder(after)
    layout = jax.tree.map(lambda x: x.sharding, abstract_params(after))

    def make(key: jax.Array, params: Tree) -> Tree:
        found = init(key)
        for name, owner in (("norm", "norm"), ("w_unembedding", "unembedding")):
            if name in found and getattr(after.heads, owner) == "own":
                own = getattr(before.heads, owner) == "own"
                of_first = params[name][0] if own else params[name]
                found[name] = jnp.stack([of_first] * after.n_future_tokens)
        return found

    return jax.jit(make, out_shardings=layout)(jax.random.key(seed), params)


def _copied(cfg: ModelConfig, params: Tree, first: int) -> Tree:
    """Parameters whose heads from `first` on, counted from 0, say what head 1 says."""
    heads = cfg.heads
    if heads.shared or "heads" not in params:
        return params
    at = first if heads.wiring.first else first - 1
    if heads.wiring.first:
        bodies = jax.tree.map(lambda x: with_last(x, at, x[0]), params["heads"])
    elif heads.kind == "linear":
        eye = jnp.eye(cfg.d_model, dtype=cfg.param_dtype)
        bodies = {"w_map": with_last(params["heads"]["w_map"], at, eye)}
    elif heads.kind == "serial":
        bodies = _copied_modules(cfg, params, at)
    else:
        bodies = params["heads"]  # residual ones begin so
    layout = jax.tree.map(lambda x: x.sharding, params["heads"])
    return {**params, "heads": jax.device_put(bodies, layout)}


def _copied_modules(cfg: ModelConfig, params: Tree, at: int) -> Tree:
    """Serial modules that pass their stream on to copies of the last layers."""
    bodies, k, d = params["heads"], cfg.heads.layers, cfg.d_model
    side = slice(d, None) if cfg.heads.concat == "embedding_first" else slice(None, d)
    join = np.zeros((2 * d, d), np.float32)
    join[side] = np.eye(d)
    last = [jax.tree.map(lambda x, i=i: x[i - k], params["trunk"]) for i in range(k)]
    of_head = last[0] if k == 1 else {f"layer_{i}": x for i, x in enumerate(last)}
    layers = jax.tree.map(
        lambda x, new: with_last(x, at, new), bodies["layers"], of_head
    )
    w_join = with_last(bodies["w_join"], at, jnp.asarray(join))
    return {**bodies, "w_join": w_join, "layers": layers}


def _by_ridge(cfg: ModelConfig, params: Tree, text: FitText, first: int) -> Tree:
    """Parameters whose heads from `first` on begin with maps, and a bias if it is new.

    Pairs of a small vocabulary all occur in the text, and their counts know most; of a
    large one the embeddings do. The bias is the one of less loss on text that neither
    was fitted to.
    """
    if not cfg.heads.markov_rank or first > 1:
        params = fit_maps(cfg, params, text, first)
        return _with_gains(params, first, best_gains(cfg, params, text, first).of_heads)
    fit, apart = text.parted()
    counts = Counts.of(fit)
    counted = _with_counts(cfg, params, counts, pairs=True)
    tried = [fit_maps(cfg, counted, fit, first)]
    if not cfg.heads.wiring.reads_tokens:  # else the maps have that embedding
        token_map_DD = fit_token_map(cfg, params, fit, first)
        both = bias_of_map(cfg, params, token_map_DD, counts.token_V)
        biased = _with_bias(params, *both)
        tried.append(fit_maps(cfg, biased, fit, first, token_map_DD))
    found = [best_gains(cfg, each, apart, first, of_bias=True) for each in tried]
    gains, params = min(zip(found, tried, strict=True), key=lambda pair: pair[0].loss)
    w_out = params["w_markov_out"]
    params = _with_gains(params, first, gains.of_heads)
    return params | {"w_markov_out": (gains.of_bias * w_out).astype(w_out.dtype)}


def _with_counts(cfg: ModelConfig, params: Tree, counts: Counts, pairs: bool) -> Tree:
    """Parameters with the bias by the token before from counts of a text."""
    both = of_first(bias_of(counts, cfg.heads.markov_rank, pairs))
    return _with_bias(params, *both)


def _with_bias(params: Tree, w_in: Any, w_out: Any) -> Tree:
    """Parameters with a bias by the token before."""
    new = {"w_markov_in": w_in, "w_markov_out": w_out}
    return params | {
        name: jax.device_put(w.astype(params[name].dtype), params[name].sharding)
        for name, w in new.items()
    }


def _with_gains(params: Tree, first: int, gains: np.ndarray) -> Tree:
    """Parameters whose heads from `first` on have the norm of head 1, times a gain."""
    norm_ND = params["norm"]
    first_D = norm_ND[0]
    rows = [norm_ND[:first], *(float(gain) * first_D[None] for gain in gains)]
    new = jnp.concatenate([x.astype(norm_ND.dtype) for x in rows])
    return {**params, "norm": jax.device_put(new, norm_ND.sharding)}
