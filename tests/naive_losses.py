"""Losses of heads by all their logits at once, as papers write them.

`xp` is NumPy or jax.numpy; the precision is that of the logits. Axes: N heads, B batch,
T time, V vocabulary.
"""

import numpy as np


def softmax(logits, xp):
    e = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def soft(kind, student, teacher, xp=np, constant=lambda x: x):
    """The loss of a kind between logits [..., V], [...]."""
    q, p = softmax(student, xp), softmax(teacher, xp)
    alpha = xp.sum(xp.minimum(p, q), axis=-1)
    kl = xp.sum(p * xp.log(p / q), axis=-1)
    if kind == "kl":
        return kl
    if kind == "rkl":
        return xp.sum(q * xp.log(q / p), axis=-1)
    if kind == "tv":
        return xp.sum(xp.abs(p - q), axis=-1) / 2
    if kind == "nla":
        return -xp.log(alpha)
    share = constant(xp.exp(-3.0 * alpha))
    return share * kl + (1 - share) * xp.sum(xp.abs(p - q), axis=-1) / 2


def end_to_end(alphas, xp=np):
    """The share of n - 1 drafts that a pass does not take, of alphas [N - 1, ...]."""
    product, total = 1.0, 0.0
    for alpha in alphas:
        product = product * alpha
        total = total + product
    return 1 - total / len(alphas)


def total(
    loss, logits_NBTV, teacher_NBTV, target_NBT, valid_NBT, weights, xp, constant
):
    """The loss of a batch. teacher_NBTV: head 1's logits where head i predicts."""
    n, _, t = target_NBT.shape
    found = 0.0
    heard = np.arange(t)[None, None] <= t - 1 - np.arange(n)[:, None, None]
    alphas = [
        xp.sum(
            xp.minimum(softmax(logits_NBTV[i], xp), softmax(teacher_NBTV[i], xp)), -1
        )
        for i in range(1, n)
        if weights[i]
    ]
    joint = 0.0
    for i in range(n):
        logits_BTV = logits_NBTV[i]
        top_BT = xp.max(logits_BTV, axis=-1)
        log_z_BT = top_BT + xp.log(
            xp.sum(xp.exp(logits_BTV - top_BT[..., None]), axis=-1)
        )
        log_p_BTV = logits_BTV - log_z_BT[..., None]
        hit_BT = xp.take_along_axis(log_p_BTV, target_NBT[i][..., None], -1)[..., 0]
        e = loss.label_smoothing
        hard_BT = -(1 - e) * hit_BT - e * xp.mean(log_p_BTV, axis=-1)
        z = loss.head_z_loss[i] if loss.head_z_loss else loss.z_loss
        mix = 0.0 if i == 0 or loss.kind == "hard" else loss.soft_mix
        there_BT = valid_NBT[i] & heard[i]
        if loss.kind == "e2e":
            there_BT = valid_NBT[-1] & heard[-1]
        whole_BT = (1 - mix) + mix * there_BT
        of_head_BT = (1 - mix) * hard_BT + whole_BT * z * log_z_BT**2
        weight_BT = weights[i] * valid_NBT[i] / valid_NBT[i].sum()
        if mix and loss.kind == "e2e":
            joint = joint + weight_BT * mix * there_BT
        elif mix:
            soft_BT = soft(loss.kind, logits_BTV, teacher_NBTV[i], xp, constant)
            of_head_BT = of_head_BT + mix * xp.where(there_BT, soft_BT, 0.0)
        found = found + xp.sum(weight_BT * of_head_BT)
    if loss.kind == "e2e":
        found = found + xp.sum(joint * end_to_end(alphas, xp))
    return found
