"""Tasks in which given texts are scored: choices, and bits per byte."""

import math

import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.eval.collect import Line
from mtp_jax.eval.score import (
    context_and_continuation,
    score_continuations,
    score_text,
)
from mtp_jax.eval.task_data import TaskData
from mtp_jax.eval.tasks.kinds import Choice


def score_choices(model: Restored, data: TaskData, start: int, end: int) -> list[Line]:
    """Log-probabilities of the choices of examples, and whether the best is right.

    A context that is too long is cut from the left; `truncated` tells it.
    """
    tokenizer, most = model.tokenizer, model.config.data.seq_len
    pairs = []
    for example in data.examples[start:end]:
        for context, continuation in zip(
            example.contexts, example.continuations, strict=True
        ):
            ids = context_and_continuation(
                tokenizer.encode,
                tokenizer.bos_id,
                context,
                continuation,
                tokenizer.prompt_begin,
            )
            pairs.append((ids[0], ids[1][-most:]))
    scores = score_continuations(model, pairs, batch_size=data.settings.batch_size)
    lines: list[Line] = []
    at = 0
    for number in range(start, end):
        example = data.examples[number]
        n = len(example.continuations)
        long = [len(a) + len(b) > most + 1 for a, b in pairs[at : at + n]]
        of_choices = scores[at : at + n]
        at += n
        log_probs = [s.log_prob for s in of_choices]
        lines.append(
            {
                "item": number,
                "log_probs": log_probs,
                "greedy": [s.greedy for s in of_choices],
                "truncated": any(long),
                "scores": choice_scores(example, log_probs),
            }
        )
    return lines


def choice_scores(example: Choice, log_probs: list[float]) -> dict[str, float]:
    """1 or 0 for `acc`, by log-probability, and `acc_norm`, by that a character."""
    totals = np.array(log_probs)
    by_length = totals / np.maximum(np.array(example.lengths), 1)
    return {
        "acc": float(np.argmax(totals) == example.gold),
        "acc_norm": float(np.argmax(by_length) == example.gold),
    }


def score_texts(model: Restored, data: TaskData, start: int, end: int) -> list[Line]:
    """Bits per byte of texts, in rolling windows as long as the model reads.

    The weight of a text is its bytes, so that the mean is that of all texts together.
    """
    lines: list[Line] = []
    for number in range(start, end):
        text = data.examples[number]
        ids = model.tokenizer.encode(text)
        nats = 0.0
        if len(ids):
            scores = score_text(model, ids, batch_size=data.settings.batch_size)
            nats = -scores.log_prob
        lines.append(
            {
                "item": number,
                "nats": nats,
                "tokens": len(ids),
                "weight": (size := len(text.encode())),
                "scores": {"bits_per_byte": nats / math.log(2) / max(size, 1)},
            }
        )
    return lines
