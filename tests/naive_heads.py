"""Heads of every kind as their papers write them: slow, and sharing no code.

`xp` is NumPy or jax.numpy; the precision is that of the parameters. Axes: B batch,
T time, D width, N heads, V vocabulary.
"""

import naive
import numpy as np


def all_logits(cfg, params, rows, before_NBT, xp=np):
    """Logits of every head at every position, [N, B, T, V].

    rows: tokens, segments and positions, [B, T] each. before_NBT: the token before the
    one that each head predicts.
    """
    tokens_BT, *where = rows
    n, heads = cfg.n_future_tokens, cfg.heads

    def body(i):  # of the i-th head, from 0
        if i < 0:
            return None
        return naive.entry(params["heads"], 0 if heads.shared else i)

    def layers(p, x_BTD):
        each = (
            [p] if heads.layers == 1 else [p[f"layer_{k}"] for k in range(heads.layers)]
        )
        for layer in each:
            x_BTD = naive.layer(cfg, layer, x_BTD, *where, xp)
        return x_BTD

    def norm(i, x_BTD):
        scale = params["norm"][i] if heads.norm == "own" else params["norm"]
        return naive.norm(cfg, x_BTD, scale, xp)

    z_BTD = params["w_embedding"][tokens_BT]
    trunk = params["trunk"]["w_q"].shape[0]
    for i in range(trunk):
        z_BTD = naive.layer(cfg, naive.entry(params["trunk"], i), z_BTD, *where, xp)
    out = [None] * n
    if heads.kind == "parallel":
        out = [norm(i, layers(body(i), z_BTD)) for i in range(n)]
    elif heads.kind == "linear":
        out = [norm(0, z_BTD)]
        out += [norm(i, z_BTD @ body(i - 1)["w_map"]) for i in range(1, n)]
    elif heads.kind == "residual":
        for i in range(n):
            r = norm(i, z_BTD)
            for k in range(heads.layers if i else 0):
                p = body(i - 1)
                a = r @ p[f"w_{k}"] + p[f"bias_{k}"]
                r = r + a / (1 + xp.exp(-a))
            out[i] = r
    elif heads.kind in ("causal", "anticausal"):
        x_BTD = z_BTD
        order = range(n) if heads.kind == "causal" else reversed(range(n))
        for i in order:
            x_BTD = layers(body(i), x_BTD)
            out[i] = norm(i, x_BTD)
    else:
        h_BTD = z_BTD
        for i in range(n):
            if i:
                p = body(i - 1)
                pair = [
                    naive.norm(cfg, h_BTD, p["norm_hidden"], xp),
                    naive.norm(
                        cfg, params["w_embedding"][before_NBT[i]], p["norm_token"], xp
                    ),
                ]
                pair = pair[::-1] if heads.concat == "embedding_first" else pair
                h_BTD = layers(p["layers"], xp.concatenate(pair, -1) @ p["w_join"])
            out[i] = norm(i, h_BTD)
            h_BTD = out[i] if heads.hidden == "after" else h_BTD
    logits = []
    for i in range(n):
        table = params["w_embedding" if cfg.tie_embeddings else "w_unembedding"]
        table = table[i] if heads.unembedding == "own" else table
        logits.append(out[i] @ table.T)
        if heads.markov_rank and i:
            bias_BTr = params["w_markov_in"][before_NBT[i]]
            logits[i] = logits[i] + bias_BTr @ params["w_markov_out"].T
    return xp.stack(logits)


def loss(cfg, params, rows, target_NBT, valid_NBT, weights, z_loss=0.0, xp=np):
    """Weighted sum over the heads of the mean cross entropy of all their logits."""
    before_NBT = xp.concatenate([target_NBT[:1], target_NBT[:-1]])
    logits_NBTV = all_logits(cfg, params, rows, before_NBT, xp)
    top_NBT1 = xp.max(logits_NBTV, axis=-1, keepdims=True)
    log_z_NBT1 = top_NBT1 + xp.log(
        xp.sum(xp.exp(logits_NBTV - top_NBT1), axis=-1, keepdims=True)
    )
    log_p_NBTV = logits_NBTV - log_z_NBT1
    log_p_NBT = xp.take_along_axis(log_p_NBTV, target_NBT[..., None], axis=-1)[..., 0]
    total = 0.0
    for i, weight in enumerate(weights):
        of_head_BT = -log_p_NBT[i] + z_loss * log_z_NBT1[i, ..., 0] ** 2
        of_head_BT = xp.where(valid_NBT[i], of_head_BT, 0.0)
        total = total + weight * xp.sum(of_head_BT) / xp.sum(valid_NBT[i])
    return total
