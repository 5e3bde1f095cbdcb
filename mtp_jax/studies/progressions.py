"""Sequences of even steps, and a recurrent network that learns to predict them.

A sequence starts at a token below half the vocabulary and goes on by 1 or 2, so the
second token is a matter of chance and all others are certain: there are V different
ones. Axes: R sequences, T = 20 tokens, N heads, D hidden width, E width of an
embedding, V vocabulary, K steps of training.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, LENGTH, BATCH = 50, 20, 32
RATE = 0.02  # of Adam, at the start
_CLOSELY = 100  # steps after each of which head 1 is looked at; later each fifth
_EMBEDDING, HIDDEN = 32, 64


def sequences(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sequences drawn at random, int32 [R, T]."""
    start_R = rng.integers(0, VOCABULARY // 2, count)
    step_R = rng.integers(1, 3, count)
    tokens = (start_R[:, None] + step_R[:, None] * np.arange(LENGTH)) % VOCABULARY
    return tokens.astype(np.int32)


def all_sequences() -> np.ndarray:
    """Every sequence that there is, each as probable as the others, int32 [V, T]."""
    start, step = np.meshgrid(np.arange(VOCABULARY // 2), [1, 2], indexing="ij")
    tokens = (
        start.reshape(-1, 1) + step.reshape(-1, 1) * np.arange(LENGTH)
    ) % VOCABULARY
    return tokens.astype(np.int32)


def least_loss(i: int) -> float:
    """The least mean loss of head i, in nats: ln 2 at its first target, else none."""
    return math.log(2) / (LENGTH - i)


def best_accuracy(i: int) -> float:
    """The best mean accuracy of head i: half at its first target, else all."""
    return (LENGTH - i - 0.5) / (LENGTH - i)


def network(key: jax.Array, heads: int, hidden: int = HIDDEN) -> dict[str, jax.Array]:
    """Parameters of a tanh network with a linear head for each of the next tokens."""
    of_embed, of_input, of_state, of_heads = jax.random.split(key, 4)

    def normal(key, shape, size):
        return size * jax.random.normal(key, shape)

    return {
        "w_embed": normal(of_embed, (VOCABULARY, _EMBEDDING), 1.0),
        "w_input": normal(of_input, (_EMBEDDING, hidden), _EMBEDDING**-0.5),
        "w_state": normal(of_state, (hidden, hidden), 0.5 * hidden**-0.5),
        "bias": jnp.zeros(hidden),
        "w_heads": normal(of_heads, (heads, hidden, VOCABULARY), 0.01),
        "bias_heads": jnp.zeros((heads, VOCABULARY)),
    }


_OF_HEADS = ("w_heads", "bias_heads")


def states(params: Any, tokens_RT: jax.Array) -> jax.Array:
    """Hidden states of the network after each token, float32 [T, R, D]."""
    driven_TRD = jnp.swapaxes(params["w_embed"][tokens_RT] @ params["w_input"], 0, 1)

    def step(state_RD, driven_RD):
        made = jnp.tanh(driven_RD + state_RD @ params["w_state"] + params["bias"][None])
        return made, made

    return jax.lax.scan(step, jnp.zeros_like(driven_TRD[0]), driven_TRD)[1]


def log_probabilities(params: Any, tokens_RT: jax.Array) -> jax.Array:
    """Log probabilities of every head after each token, float32 [N, R, T, V]."""
    state_TRD = states(params, tokens_RT)
    logits = jnp.einsum("trd,ndv->nrtv", state_TRD, params["w_heads"])
    logits += params["bias_heads"][:, None, None]
    return jax.nn.log_softmax(logits, axis=-1)


def head_losses(log_q_NRTV: jax.Array, tokens_RT: jax.Array) -> jax.Array:
    """Mean loss of each head over its targets, of which head i has T - i, [N]."""
    losses = []
    for i in range(1, len(log_q_NRTV) + 1):
        picked = jnp.take_along_axis(
            log_q_NRTV[i - 1, :, : LENGTH - i], tokens_RT[:, i:, None], axis=-1
        )
        losses.append(-jnp.mean(picked))
    return jnp.stack(losses)


@functools.partial(jax.jit, static_argnames=("heads", "steps", "hidden", "mix"))
def train(
    key: jax.Array,
    tokens_RT: jax.Array,
    count: jax.Array,
    *,
    heads: int,
    steps: int,
    hidden: int = HIDDEN,
    dropped: float = 0.0,
    mix: float = 0.0,
    teacher: Any = None,
) -> tuple[Any, jax.Array, jax.Array]:
    """Trains with Adam, a rate of .02 that falls to 0 as a cosine, on batches of 32.

    Args:
      key: of parameters and batches.
      tokens_RT: the training set.
      count: of these, the first so many.
      heads: N.
      steps: K.
      hidden: D.
      dropped: share of the tokens read that are replaced by random ones.
      mix: share of the loss of head 1 that is the teacher's law instead of the token.
      teacher: parameters of a trained network.

    Returns:
      Parameters; head 1's loss on all sequences and its accuracy after each step, [K];
      after the first hundred each fifth counts, and the last, and the others as before.
    """
    of_params, of_batches = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    params = network(of_params, heads, hidden)
    every = jnp.asarray(all_sequences())

    def loss_fn(params, tokens, read):
        log_q = log_probabilities(params, read)
        losses_N = head_losses(log_q, tokens)
        if mix:
            p = jnp.exp(log_probabilities(teacher, read)[0, :, :-1])
            soft = -jnp.mean(jnp.sum(p * log_q[0, :, :-1], axis=-1))
            losses_N = losses_N.at[0].set((1 - mix) * losses_N[0] + mix * soft)
        return jnp.sum(losses_N)

    def figures(params):
        first = params | {name: params[name][:1] for name in _OF_HEADS}
        log_q = log_probabilities(first, every)
        right = jnp.argmax(log_q[0, :, :-1], axis=-1) == every[:, 1:]
        return head_losses(log_q, every)[0], jnp.mean(right)

    def step(carry, inputs):
        params, state, before = carry
        number, key = inputs
        of_rows, of_drops, of_tokens = jax.random.split(key, 3)
        rows = jax.random.randint(of_rows, (BATCH,), 0, count)
        tokens = tokens_RT[rows]
        others = jax.random.randint(of_tokens, tokens.shape, 0, VOCABULARY)
        drops = jax.random.bernoulli(of_drops, dropped, tokens.shape)
        read = jnp.where(drops, others, tokens)
        grads = jax.grad(loss_fn)(params, tokens, read)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        looks = (number < _CLOSELY) | (number % 5 == 0) | (number == steps - 1)
        found = jax.lax.cond(looks, figures, lambda _: before, params)
        return (params, state, found), found

    start = (params, optimizer.init(params), (jnp.zeros(()), jnp.zeros(())))
    inputs = (jnp.arange(steps), jax.random.split(of_batches, steps))
    (params, _, _), (loss_K, accuracy_K) = jax.lax.scan(step, start, inputs)
    return params, loss_K, accuracy_K


def right_by_position(
    log_q_NRTV: np.ndarray, tokens_RT: np.ndarray
) -> list[list[float]]:
    """Accuracy of each head at every position that has a target; a list a head."""
    predicted_NRT = np.argmax(log_q_NRTV, axis=-1)
    return [
        np.mean(
            predicted_NRT[i - 1, :, : LENGTH - i] == tokens_RT[:, i:], axis=0
        ).tolist()
        for i in range(1, len(predicted_NRT) + 1)
    ]


def tokens_a_pass(log_q_NRTV: np.ndarray) -> float:
    """Tokens a forward pass of greedy drafting, on true text, drafts never cut short.

    1 and the drafts that are what head 1 will predict, up to the first that is not.
    """
    predicted_NRT = np.argmax(log_q_NRTV, axis=-1)
    n, _, t = predicted_NRT.shape
    whole = t - n + 1
    agree = np.ones_like(predicted_NRT[0, :, :whole], dtype=bool)
    total = np.ones_like(agree, dtype=float)
    for i in range(1, n):
        agree &= predicted_NRT[i, :, :whole] == predicted_NRT[0, :, i : i + whole]
        total += agree
    return float(total.mean())
