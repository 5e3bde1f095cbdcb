"""The forward pass of a model straight from its file, in NumPy: what an import is
compared with.

It knows nothing of our parameters: weights are outputs by inputs, as the files have
them, and queries and keys turn in the order of the file.

Axes: T positions of one text, D model width, H query heads, G key-value heads, K head
width, V vocabulary.
"""

from collections.abc import Callable

import numpy as np

from mtp_jax.interop.formats import Foreign
from mtp_jax.model.rope import frequencies

_Read = Callable[[str], np.ndarray | None]


def reference_logits(foreign: Foreign, ids_T: np.ndarray) -> np.ndarray:
    """Logits of each head at every position of a text, float32 [N, T, V].

    Layers are read one after another, so that memory holds one of them, and tables.
    Heads that read the token before the one that they predict read 0 after the text.
    """
    cfg, names, source = foreign.model, foreign.names, foreign.source

    def wide(name: str) -> np.ndarray:
        return np.asarray(source.read(name), np.float32)

    x_TD = wide(names.embedding)[ids_T]
    for i, window in enumerate(cfg.trunk_windows):
        x_TD = _layer(foreign, _reader(foreign, names.layers.format(i)), x_TD, window)
    trunk_TD, found, last = x_TD, [], ""
    for i in range(cfg.n_future_tokens):
        norm_D = wide(names.norm_of(cfg, i))
        x_TD = x_TD if cfg.heads.wiring.reads == "before" else trunk_TD
        x_TD = _head(foreign, i, x_TD, norm_D, wide)
        if names.unembedding_of(cfg, i) != last:
            last = names.unembedding_of(cfg, i)
            out_VD = wide(last)
        normed = cfg.heads.kind == "residual"
        logits_TV = (x_TD if normed else _norm(x_TD, norm_D, cfg.norm_eps)) @ out_VD.T
        if cfg.heads.markov_rank and i > 0:
            assert names.heads is not None and names.heads.markov is not None
            before_T = np.append(ids_T[i:], np.zeros(min(i, len(ids_T)), int))
            enter_VR, leave_VR = (wide(name) for name in names.heads.markov)
            logits_TV += enter_VR[before_T] @ leave_VR.T
        found.append(logits_TV)
    return np.stack(found)


def _head(
    foreign: Foreign,
    head: int,
    x_TD: np.ndarray,
    norm_D: np.ndarray,
    wide: Callable[[str], np.ndarray],
) -> np.ndarray:
    """The stream of a head, 0 for head 1, of what it reads; normed if residual."""
    cfg, of = foreign.model, foreign.names.heads
    if cfg.heads.wiring.layered:
        for j in range(cfg.heads.layers):
            prefix = foreign.names.layer_prefix(cfg, head, j)
            x_TD = _layer(foreign, _reader(foreign, prefix), x_TD, cfg.heads_window)
        return x_TD
    residual = cfg.heads.kind == "residual"
    x_TD = _norm(x_TD, norm_D, cfg.norm_eps) if residual else x_TD
    if head == 0:
        return x_TD
    assert of is not None
    if not residual:
        return x_TD @ wide((of.map or "").format(head - 1)).T
    for j in range(cfg.heads.layers):
        prefix = (of.blocks or "").format(head - 1, j)
        x_TD = x_TD + _silu(x_TD @ wide(f"{prefix}weight").T + wide(f"{prefix}bias"))
    return x_TD


def _reader(foreign: Foreign, prefix: str) -> _Read:
    """Weights of a layer by our names, as the file has them; None where it has none."""
    cfg, layer, source = foreign.model, foreign.names.layer, foreign.source
    k = cfg.d_head
    queries, keys = cfg.num_query_heads * k, cfg.num_kv_heads * k
    parts = {  # of a tensor that holds several, in their order
        "w_q": (0, queries),
        "w_k": (queries, queries + keys),
        "w_v": (queries + keys, queries + 2 * keys),
        "mlp/w_gate": (0, cfg.d_ff),
        "mlp/w_up": (cfg.d_ff, 2 * cfg.d_ff),
    }

    def read(ours: str) -> np.ndarray | None:
        name = prefix + layer.get(ours, "")
        if name not in source.shapes or not layer.get(ours):
            return None
        whole = np.asarray(source.read(name), np.float32)
        several = list(layer.values()).count(layer[ours]) > 1
        return whole[slice(*parts[ours])] if several else whole

    return read


def _layer(foreign: Foreign, read: _Read, x_TD: np.ndarray, window: int) -> np.ndarray:
    cfg = foreign.model
    after = cfg.layer.norms == "after"

    def linear(x: np.ndarray, matrix: str, bias: str) -> np.ndarray:
        w, b = read(matrix), read(bias)
        assert w is not None, matrix
        return x @ w.T if b is None else x @ w.T + b

    def normed(x: np.ndarray, name: str, here: bool) -> np.ndarray:
        scale = read(name)
        assert scale is not None, name
        return _norm(x, scale, cfg.norm_eps) if here else x

    h_TD = normed(x_TD, "norm_attention", not after)
    q, k, v = (linear(h_TD, f"w_{x}", f"bias_{x}") for x in "qkv")
    q_THK = _turned(foreign, q, read("norm_q"), cfg.num_query_heads)
    k_TGK = _turned(foreign, k, read("norm_k"), cfg.num_kv_heads)
    v_TGK = v.reshape(len(x_TD), cfg.num_kv_heads, -1)
    read_TX = _attention(q_THK, k_TGK, v_TGK, window).reshape(len(x_TD), -1)
    out_TD = linear(read_TX, "w_o", "bias_o")
    x_TD = x_TD + normed(out_TD, "norm_attention", after)
    h_TD = normed(x_TD, "norm_mlp", not after)
    gate = linear(h_TD, "mlp/w_gate", "mlp/bias_gate")
    up = linear(h_TD, "mlp/w_up", "mlp/bias_up")
    inner = _silu(gate) * up
    out_TD = linear(inner, "mlp/w_down", "mlp/bias_down")
    return x_TD + normed(out_TD, "norm_mlp", after)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -80, None)))


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * scale


def _turned(
    foreign: Foreign, x_TX: np.ndarray, scale: np.ndarray | None, heads: int
) -> np.ndarray:
    """Queries or keys after their norm and their turn, [T, heads, K]."""
    cfg = foreign.model
    if scale is not None and cfg.layer.qk_norm == "whole":
        x_TX = _norm(x_TX, scale, cfg.norm_eps)
    x_THK = x_TX.reshape(len(x_TX), heads, cfg.d_head)
    if scale is not None and cfg.layer.qk_norm == "head":
        x_THK = _norm(x_THK, scale, cfg.norm_eps)
    frequency_k = frequencies(cfg.rope, cfg.d_head, cfg.rope_theta)
    turn_Tk = np.exp(1j * np.arange(len(x_TX))[:, None] * frequency_k)
    turn_Tk = turn_Tk * cfg.rope.on_queries_and_keys
    half = cfg.d_head // 2
    if foreign.names.interleaved:
        complex_THk = x_THK[..., 0::2] + 1j * x_THK[..., 1::2]
    else:
        complex_THk = x_THK[..., :half] + 1j * x_THK[..., half:]
    turned_THk = complex_THk * turn_Tk[:, None]
    # Scores are sums over pairs, so the order of pairs no longer matters.
    both = np.concatenate([turned_THk.real, turned_THk.imag], axis=-1)
    return both.astype(np.float32)


def _attention(
    q_THK: np.ndarray, k_TGK: np.ndarray, v_TGK: np.ndarray, window: int
) -> np.ndarray:
    t, h, width = q_THK.shape
    group = h // k_TGK.shape[1]
    apart_TT = np.arange(t)[:, None] - np.arange(t)[None]
    seen_TT = (apart_TT >= 0) & (apart_TT < (window or t))
    out_THK = np.empty((t, h, v_TGK.shape[2]), np.float32)
    for i in range(h):
        score_TT = q_THK[:, i] @ k_TGK[:, i // group].T / np.sqrt(width)
        score_TT = np.where(seen_TT, score_TT, -np.inf)
        weight_TT = np.exp(score_TT - score_TT.max(-1, keepdims=True))
        weight_TT /= weight_TT.sum(-1, keepdims=True)
        out_THK[:, i] = weight_TT @ v_TGK[:, i // group]
    return out_THK
