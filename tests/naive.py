"""The model and its loss as the papers write them: slow, and nothing shared with mtp_jax.

Every function takes `xp`, NumPy or jax.numpy, and keeps the precision of the parameters.
Axes: B batch, T time, D width, H query heads, G key-value heads, K head width, N heads.
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
    group = cfg.num_query_heads // cfg.num_kv_heads
    read_BTD = 0.0
    for h in range(cfg.num_query_heads):
        q_BTK, k_BTK, v_BTK = (
            q_BTHK[:, :, h],
            k_BTGK[:, :, h // group],
            v_BTGK[:, :, h // group],
        )
        score_BTT = xp.einsum("bqk,bsk->bqs", q_BTK, k_BTK) / np.sqrt(cfg.d_head)
        seen_BTT = np.tril(segments_BT[:, :, None] == segments_BT[:, None, :])
        score_BTT = xp.where(seen_BTT, score_BTT, -1e30)
        weight_BTT = xp.exp(score_BTT - xp.max(score_BTT, axis=-1, keepdims=True))
        weight_BTT = weight_BTT / xp.sum(weight_BTT, axis=-1, keepdims=True)
        read_BTD = read_BTD + (weight_BTT @ v_BTK) @ p["w_o"][h]
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
        cos_BT1, sin_BT1 = np.cos(angle_BT1), np.sin(angle_BT1)
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


def loss(cfg, params, batch, weights, z_loss=0.0, xp=np):
    """Weighted sum over the heads of the mean cross entropy, all logits at once.

    batch: tokens, segments and positions [B, S], NumPy arrays.
    """
    n = cfg.n_future_tokens
    target_NBT, valid_NBT = targets(batch["tokens"], batch["segments"], n)
    inputs = (batch[k][:, :-n] for k in ("tokens", "segments", "positions"))
    logits_NBTV = all_logits(cfg, params, *inputs, xp=xp)
    top_NBT1 = xp.max(logits_NBTV, axis=-1, keepdims=True)
    log_z_NBT1 = top_NBT1 + xp.log(
        xp.sum(xp.exp(logits_NBTV - top_NBT1), axis=-1, keepdims=True)
    )
    log_p_NBTV = logits_NBTV - log_z_NBT1
    log_p_NBT = xp.take_along_axis(log_p_NBTV, target_NBT[..., None], axis=-1)[..., 0]
    total = 0.0
    for i in range(n):
        per_target = -log_p_NBT[i] + z_loss * log_z_NBT1[i, ..., 0] ** 2
        count = max(int(valid_NBT[i].sum()), 1)
        total = (
            total + weights[i] * xp.sum(xp.where(valid_NBT[i], per_target, 0.0)) / count
        )
    return total


def entry(tree, i):
    """Entry i of a stack of parameters."""
    if isinstance(tree, dict):
        return {name: entry(value, i) for name, value in tree.items()}
    return tree[i]


def packed_rows(rng, rows, length, vocab_size, *, n_documents=3, padding=0):
    """Random rows of documents of random ends, the last `padding` tokens of odd rows empty.

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
