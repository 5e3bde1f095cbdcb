"""The model and its loss as the papers write them: slow, and sharing no code.

`xp` is NumPy or jax.numpy; the precision is that of the parameters. Axes: B batch,
T time, D width, F feed-forward width, H query heads, G key-value heads, K head width,
N heads, V vocabulary.
"""

import math

import numpy as np


def all_logits(cfg, params, tokens_BT, segments_BT, positions_BT, xp=np):
    """Logits of every head at every position, [N, B, T, V]."""
    x_BTD = params["w_embedding"][tokens_BT]
    windows = cfg.layer.windows or (0,)
    for i in range(cfg.num_layers - cfg.n_future_tokens):
        of_layer, window = entry(params["trunk"], i), windows[min(i, len(windows) - 1)]
        x_BTD = layer(cfg, of_layer, x_BTD, segments_BT, positions_BT, xp, window)
    name = "w_embedding" if cfg.tie_embeddings else "w_unembedding"
    logits = []
    for i in range(cfg.n_future_tokens):
        head = entry(params["heads"], i)
        y_BTD = layer(cfg, head, x_BTD, segments_BT, positions_BT, xp, windows[-1])
        logits.append(norm(cfg, y_BTD, params["norm"], xp) @ params[name].T)
    return xp.stack(logits)


def layer(cfg, p, x_BTD, segments_BT, positions_BT, xp, window=0):
    """Attention of grouped queries, then SwiGLU, in the form that config.layer says."""
    form = cfg.layer
    before = form.norms == "before"
    h_BTD = norm(cfg, x_BTD, p["norm_attention"], xp) if before else x_BTD
    q_BTHK, k_BTGK, v_BTGK = (
        xp.einsum("btd,dhk->bthk", h_BTD, p[f"w_{x}"])
        + (p[f"bias_{x}"][None, None] if form.qkv_bias else 0)
        for x in "qkv"
    )
    if form.qk_norm != "none":
        q_BTHK, k_BTGK = (
            norm_of_heads(cfg, x_BTHK, p[f"norm_{x}"], xp)
            for x, x_BTHK in (("q", q_BTHK), ("k", k_BTGK))
        )
    q_BTHK, k_BTGK = (rotate(cfg, x, positions_BT, xp) for x in (q_BTHK, k_BTGK))
    group = cfg.num_query_heads // cfg.num_kv_heads  # query heads of a key-value head
    k_BTHK, v_BTHK = (xp.repeat(x_BTGK, group, axis=2) for x_BTGK in (k_BTGK, v_BTGK))
    score_BHTT = xp.einsum("bqhk,bshk->bhqs", q_BTHK, k_BTHK) / cfg.d_head**0.5
    seen_BTT = xp.tril(segments_BT[:, :, None] == segments_BT[:, None, :])
    if window:
        t = np.arange(segments_BT.shape[1])
        seen_BTT = seen_BTT & (t[:, None] - t[None] < window)[None]
    score_BHTT = xp.where(seen_BTT[:, None], score_BHTT, -1e30)
    weight_BHTT = xp.exp(score_BHTT - xp.max(score_BHTT, axis=-1, keepdims=True))
    weight_BHTT = weight_BHTT / xp.sum(weight_BHTT, axis=-1, keepdims=True)
    read_BTD = xp.einsum("bhqs,bshk,hkd->bqd", weight_BHTT, v_BTHK, p["w_o"])
    read_BTD = read_BTD + (p["bias_o"][None, None] if form.out_bias else 0)
    read_BTD = read_BTD if before else norm(cfg, read_BTD, p["norm_attention"], xp)
    x_BTD = x_BTD + read_BTD
    h_BTD = norm(cfg, x_BTD, p["norm_mlp"], xp) if before else x_BTD
    out_BTD = feed_forward(p["mlp"], h_BTD, xp, form.mlp_bias)
    return x_BTD + (out_BTD if before else norm(cfg, out_BTD, p["norm_mlp"], xp))


def feed_forward(p, h_BTD, xp, has_bias):
    """SwiGLU."""
    gate_BTF, up_BTF = h_BTD @ p["w_gate"], h_BTD @ p["w_up"]
    if has_bias:
        gate_BTF, up_BTF = (
            gate_BTF + p["bias_gate"][None, None],
            up_BTF + p["bias_up"][None, None],
        )
    inner_BTF = gate_BTF / (1 + xp.exp(-gate_BTF)) * up_BTF
    return inner_BTF @ p["w_down"] + (p["bias_down"][None, None] if has_bias else 0)


def norm(cfg, x_BTD, scale_D, xp):
    """Root-mean-square norm."""
    mean_BT1 = xp.mean(x_BTD**2, axis=-1, keepdims=True)
    return x_BTD / xp.sqrt(mean_BT1 + cfg.norm_eps) * scale_D[None, None]


def norm_of_heads(cfg, x_BTHK, scale, xp):
    """The norm of queries or keys: of each head, or of all of them as one vector."""
    if cfg.layer.qk_norm == "head":
        mean = xp.mean(x_BTHK**2, axis=3, keepdims=True)
    else:
        mean = xp.mean(xp.mean(x_BTHK**2, axis=3, keepdims=True), axis=2, keepdims=True)
    return (
        x_BTHK
        / xp.sqrt(mean + cfg.norm_eps)
        * scale.reshape((1,) * (4 - scale.ndim) + scale.shape)
    )


def rotate(cfg, x_BTHK, positions_BT, xp):
    """Rotary positions: dimension j turns with dimension j + K/2."""
    half = cfg.d_head // 2
    factor = attention_factor(cfg.rope)
    out = [None] * cfg.d_head
    for j in range(half):
        angle_BT1 = positions_BT[:, :, None] * frequency(cfg, j)
        cos_BT1, sin_BT1 = xp.cos(angle_BT1) * factor, xp.sin(angle_BT1) * factor
        a_BTH, b_BTH = x_BTHK[..., j], x_BTHK[..., j + half]
        out[j] = a_BTH * cos_BT1 - b_BTH * sin_BT1
        out[j + half] = b_BTH * cos_BT1 + a_BTH * sin_BT1
    return xp.stack(out, axis=-1)


def frequency(cfg, j):
    """Radians from one position to the next of pair j, case by case."""
    rope = cfg.rope
    plain = cfg.rope_theta ** (-2 * j / cfg.d_head)
    if rope.scaling == "none":
        return plain
    slow = plain / rope.factor
    if rope.scaling == "linear":
        return slow
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < rope.original_context / rope.high_freq_factor:
            return plain
        if wavelength > rope.original_context / rope.low_freq_factor:
            return slow
        smooth = rope.original_context / wavelength - rope.low_freq_factor
        smooth /= rope.high_freq_factor - rope.low_freq_factor
        return (1 - smooth) * slow + smooth * plain

    def at(turns):  # the pair that turns so often within the original context
        base = math.log(rope.original_context / (2 * math.pi * turns))
        return cfg.d_head * base / (2 * math.log(cfg.rope_theta))

    first, last = at(rope.beta_fast), at(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, cfg.d_head - 1)
    share = (j - first) / ((last - first) or 0.001)
    share = min(max(share, 0.0), 1.0)
    return share * slow + (1 - share) * plain


def attention_factor(rope):
    """What yarn multiplies queries and keys with."""
    if rope.scaling != "yarn":
        return 1.0
    return rope.attention_factor or 1 + 0.1 * math.log(rope.factor)


def targets(tokens_BS, segments_BS, n):
    """Target and validity of head i at position t, one at a time, [N, B, T] each."""
    b, s = tokens_BS.shape
    target_NBT = np.zeros((n, b, s - n), np.int32)
    valid_NBT = np.zeros((n, b, s - n), bool)
    for i in range(n):
        for row in range(b):
            for t in range(s - n):
                target_NBT[i, row, t] = tokens_BS[row, t + i + 1]
                here, there = segments_BS[row, t], segments_BS[row, t + i + 1]
                valid_NBT[i, row, t] = here != 0 and here == there
    return target_NBT, valid_NBT


def loss(cfg, params, inputs, target_NBT, valid_NBT, weights, z_loss=0.0, xp=np):
    """Weighted sum over the heads of the mean cross entropy, from all logits at once.

    inputs: tokens, segments and positions, [B, T] each.
    """
    logits_NBTV = all_logits(cfg, params, *inputs, xp=xp)
    top_NBT1 = xp.max(logits_NBTV, axis=-1, keepdims=True)
    sum_NBT1 = xp.sum(xp.exp(logits_NBTV - top_NBT1), axis=-1, keepdims=True)
    log_z_NBT1 = top_NBT1 + xp.log(sum_NBT1)
    log_p_NBTV = logits_NBTV - log_z_NBT1
    log_p_NBT = xp.take_along_axis(log_p_NBTV, target_NBT[..., None], axis=-1)[..., 0]
    total = 0.0
    for i, weight in enumerate(weights):
        loss_BT = -log_p_NBT[i] + z_loss * log_z_NBT1[i, ..., 0] ** 2
        loss_BT = xp.where(valid_NBT[i], loss_BT, 0.0)
        total = total + weight * xp.sum(loss_BT) / xp.sum(valid_NBT[i])
    return total


def entry(tree, i):
    """Entry i of a stack of parameters."""
    if isinstance(tree, dict):
        return {name: entry(value, i) for name, value in tree.items()}
    return tree[i]


def packed_rows(rng, rows, length, vocab_size, *, n_documents=3, padding=0):
    """Random rows of documents that end at random; odd rows end in padding.

    Returns tokens, segments and positions, int32 [rows, length].
    """
    batch = {
        "tokens": rng.integers(1, vocab_size, (rows, length)).astype(np.int32),
        "segments": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
    }
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(1, length), n_documents - 1, replace=False))
        start = 0
        for number, end in enumerate([*ends, length], start=1):
            batch["segments"][row, start:end] = number
            batch["positions"][row, start:end] = np.arange(end - start)
            start = end
        if padding and row % 2:
            for x_BS in batch.values():
                x_BS[row, -padding:] = 0
    return batch
