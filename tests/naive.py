"""The model and its loss as the papers write them: slow, and sharing no code.

`xp` is NumPy or jax.numpy; the precision is that of the parameters. Axes: B batch,
T time, D width, F feed-forward width, H query heads, G key-value heads, K head width,
N heads, V vocabulary.
"""

import numpy as np


def all_logits(cfg, params, tokens_BT, segments_BT, positions_BT, xp=np):
    """Logits of every head at every position, [N, B, T, V]."""
    x_BTD = params["w_embedding"][tokens_BT]
    for i in range(cfg.num_layers - cfg.n_future_tokens):
        x_BTD = layer(
            cfg, entry(params["trunk"], i), x_BTD, segments_BT, positions_BT, xp
        )
    name = "w_embedding" if cfg.tie_embeddings else "w_unembedding"
    logits = []
    for i in range(cfg.n_future_tokens):
        head = entry(params["heads"], i)
        y_BTD = layer(cfg, head, x_BTD, segments_BT, positions_BT, xp)
        logits.append(norm(cfg, y_BTD, params["norm"], xp) @ params[name].T)
    return xp.stack(logits)


def layer(cfg, p, x_BTD, segments_BT, positions_BT, xp):
    """A pre-norm layer: grouped-query attention with rotary positions, then SwiGLU."""
    h_BTD = norm(cfg, x_BTD, p["norm_attention"], xp)
    q_BTHK = rotate(cfg, xp.einsum("btd,dhk->bthk", h_BTD, p["w_q"]), positions_BT, xp)
    k_BTGK = rotate(cfg, xp.einsum("btd,dhk->bthk", h_BTD, p["w_k"]), positions_BT, xp)
    v_BTGK = xp.einsum("btd,dhk->bthk", h_BTD, p["w_v"])
    group = cfg.num_query_heads // cfg.num_kv_heads  # query heads of a key-value head
    k_BTHK, v_BTHK = (xp.repeat(x_BTGK, group, axis=2) for x_BTGK in (k_BTGK, v_BTGK))
    score_BHTT = xp.einsum("bqhk,bshk->bhqs", q_BTHK, k_BTHK) / cfg.d_head**0.5
    seen_BTT = xp.tril(segments_BT[:, :, None] == segments_BT[:, None, :])
    score_BHTT = xp.where(seen_BTT[:, None], score_BHTT, -1e30)
    weight_BHTT = xp.exp(score_BHTT - xp.max(score_BHTT, axis=-1, keepdims=True))
    weight_BHTT = weight_BHTT / xp.sum(weight_BHTT, axis=-1, keepdims=True)
    read_BTD = xp.einsum("bhqs,bshk,hkd->bqd", weight_BHTT, v_BTHK, p["w_o"])
    x_BTD = x_BTD + read_BTD
    h_BTD = norm(cfg, x_BTD, p["norm_mlp"], xp)
    gate_BTF = h_BTD @ p["mlp"]["w_gate"]
    inner_BTF = gate_BTF / (1 + xp.exp(-gate_BTF)) * (h_BTD @ p["mlp"]["w_up"])
    return x_BTD + inner_BTF @ p["mlp"]["w_down"]


def norm(cfg, x_BTD, scale_D, xp):
    """Root-mean-square norm."""
    mean_BT1 = xp.mean(x_BTD**2, axis=-1, keepdims=True)
    return x_BTD / xp.sqrt(mean_BT1 + cfg.norm_eps) * scale_D[None, None]


def rotate(cfg, x_BTHK, positions_BT, xp):
    """Rotary positions: dimension j turns with dimension j + K/2."""
    half = cfg.d_head // 2
    out = [None] * cfg.d_head
    for j in range(half):
        angle_BT1 = positions_BT[:, :, None] * cfg.rope_theta ** (-2 * j / cfg.d_head)
        cos_BT1, sin_BT1 = xp.cos(angle_BT1), xp.sin(angle_BT1)
        a_BTH, b_BTH = x_BTHK[..., j], x_BTHK[..., j + half]
        out[j] = a_BTH * cos_BT1 - b_BTH * sin_BT1
        out[j + half] = b_BTH * cos_BT1 + a_BTH * sin_BT1
    return xp.stack(out, axis=-1)


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
