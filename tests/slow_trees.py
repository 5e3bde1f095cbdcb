"""Decoders of trees that read every path from the beginning, for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from models import all_logits
from test_decode import case, init, on_mesh, one_device

from mtp_jax.model.language_model import model_builder


def logits_by_training(cfg, params):
    """f(rows) -> logits of every head after each of at most 32 rows, [N, B, V]."""
    with jax.set_mesh(one_device()):
        _, model_of = model_builder(cfg)

    @jax.jit
    def run(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        return all_logits(model_of(params), tokens_BT, 0 * tokens_BT, positions_BT)

    def call(rows):
        tokens_BT = np.zeros((32, 40), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
        with jax.set_mesh(one_device()):
            logits_NBTV = np.asarray(run(params, on_mesh(tokens_BT)))
        last = np.array([len(row) - 1 for row in rows])
        return logits_NBTV[:, np.arange(len(rows)), last]

    return call


@functools.cache
def logits_of_case(n, layers):
    c = case(n, layers)
    return logits_by_training(c.cfg, init(c.cfg, one_device()))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def slow_typical(temperature, epsilon=0.09, delta=0.3):
    def accepted(logits_V, token):
        p = softmax(logits_V / temperature)
        entropy = -np.sum(p * np.log(p))
        return p[token] > min(epsilon, delta * np.exp(-entropy)), np.log(p[token])

    return accepted


def slow_exact(logits_V, token):
    return token == logits_V.argmax(), 0.0


def slow_tree_decoder(logits_of, prompt, paths, accepted, made):
    """Tokens, how many of them each pass commits, and which are not head 1's choice.

    Every path of the tree is a row of its own, read from the beginning.
    """
    paths = [(), *map(tuple, paths)]
    text, counts, deviated = [0, *map(int, prompt)], [1], [False]
    heads_NV = logits_of([text])[:, 0]
    text.append(int(heads_NV[0].argmax()))
    while sum(counts) < made:
        # The heads read all but the last token.
        order = np.argsort(-heads_NV[1:], axis=-1, kind="stable")
        drafts = {p: [int(order[i, r]) for i, r in enumerate(p)] for p in paths}
        rows = {p: text + drafts[p] for p in paths}
        logits_BV = logits_of(list(rows.values()))[0]
        after = dict(zip(rows, logits_BV, strict=True))
        best, best_score = (), (0, 0.0)  # nothing but the root
        for p in paths:
            steps = [accepted(after[p[:i]], drafts[p][i]) for i in range(len(p))]
            score = (len(p), sum(s for _, s in steps))
            if all(ok for ok, _ in steps) and score > best_score:
                best, best_score = p, score
        tokens = drafts[best]
        said = [int(after[best[:i]].argmax()) for i in range(len(best) + 1)]
        deviated += [t != s for t, s in zip(tokens, said, strict=False)] + [False]
        text += [*tokens, said[-1]]
        counts.append(len(tokens) + 1)
        heads_NV = logits_of([text[:-1]])[:, 0]
    return text[1 + len(prompt) :], counts, deviated


def cut_passes(counts, made):
    """Passes that make the first `made` tokens, and the share of drafts by depth."""
    ends = np.cumsum(counts)
    passes = int(np.searchsorted(ends, made)) + 1
    return passes, np.array(counts[1:passes]) - 1
