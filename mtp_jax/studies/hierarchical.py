"""Heads over words and sentences: offsets that are not numbers of letters.

A text of letters has words, and sentences of three words on one topic, which nobody is
told. A network reads letters; its further heads are asked for the next letters, or for
the word that is being written and the one after, or for the first word of the next
sentence. The law of each of these given the text so far is known exactly, so every head
is judged by its distance to the best that it could say. Expected: heads over words and
sentences come close to their laws, which no head over letters can express, as words
differ in length; what they teach the trunk brings head 1 little.

Axes: K topics, W words, C characters, R rows, T characters of a row, N heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax.studies import progressions
from mtp_jax.studies.study import (
    Claim,
    Figures,
    Size,
    Study,
    Trial,
    difference,
    figure_of,
)

TOPICS, WORDS, LETTERS, IN_SENTENCE, LENGTH = 6, 24, 8, 3, 64
SPACE, STOP = LETTERS, LETTERS + 1
CHARACTERS = LETTERS + 2
_HIDDEN, _BATCH, _SET = 96, 64, 20_000
# Steps, training rows, rows of a test.
_SIZES: dict[Size, tuple[int, int, int]] = {
    "tiny": (5, 50, 8),
    "quick": (1000, 5000, 200),
    "full": (8000, _SET, 500),
}
# What each further head is asked for.
_ARMS: dict[str, tuple[str, ...]] = {
    "letter": (),
    "letters": ("letter 2", "letter 3"),
    "words": ("word", "next word"),
    "words and sentences": ("word", "next sentence"),
}


@functools.cache
def language() -> tuple[tuple[tuple[int, ...], ...], np.ndarray, np.ndarray]:
    """Spellings of words, laws of words by topic [K, W], and of topics [K, K]."""
    rng = np.random.default_rng(31)
    words: list[tuple[int, ...]] = []
    while len(words) < WORDS:
        size = int(rng.integers(2, 5))
        word = tuple(int(x) for x in rng.integers(0, LETTERS, size))
        words += [word] if word not in words else []
    of_topic_KW = rng.dirichlet(np.full(WORDS, 0.15), TOPICS) * 0.98 + 0.02 / WORDS
    next_KK = rng.dirichlet(np.full(TOPICS, 0.3), TOPICS)
    return tuple(words), of_topic_KW, next_KK


Text = dict[str, np.ndarray]


def text(rng: np.random.Generator, count: int) -> Text:
    """Rows of text, and what is asked for after each of their characters.

    Returns:
      `letter`, int64 [R, T + 1]; the character after position t is at t + 1. And, of
      the character after each position, [R, T]: `letter 2` and `letter 3`, the next
      ones; `word`, the word that it belongs to, `next word`, and `next sentence`, the
      first word of the next sentence. The end of a word belongs to it.
    """
    words, of_topic_KW, next_KK = language()
    # Enough sentences for a row of the shortest words, and what comes after it.
    sentences = LENGTH // (3 * IN_SENTENCE) + 3
    asked = ("letter 2", "letter 3", "word", "next word", "next sentence")
    found: Text = {"letter": np.zeros((count, LENGTH + 1), np.int64)}
    found |= {name: np.zeros((count, LENGTH), np.int64) for name in asked}
    for row in range(count):
        topic, said = int(rng.integers(TOPICS)), []
        for _ in range(sentences):
            said += rng.choice(WORDS, IN_SENTENCE, p=of_topic_KW[topic]).tolist()
            topic = int(rng.choice(TOPICS, p=next_KK[topic]))
        letters: list[int] = []
        at: list[int] = []  # the number of the word of each character
        for number, word in enumerate(said):
            last = number % IN_SENTENCE == IN_SENTENCE - 1
            letters += [*words[word], STOP if last else SPACE]
            at += [number] * (len(words[word]) + 1)
        number_T = np.array(at[1 : LENGTH + 1])
        found["letter"][row] = letters[: LENGTH + 1]
        found["letter 2"][row] = letters[2 : LENGTH + 2]
        found["letter 3"][row] = letters[3 : LENGTH + 3]
        found["word"][row] = np.array(said)[number_T]
        found["next word"][row] = np.array(said)[number_T + 1]
        following = (number_T // IN_SENTENCE + 1) * IN_SENTENCE
        found["next sentence"][row] = np.array(said)[following]
    return found


def laws(letters_T: np.ndarray) -> Text:
    """Exact laws after each character of a row: of the next one, and of words.

    Returns:
      `letter`, float64 [T, C]; `word`, `next word`, `next sentence`, [T, W].
    """
    words, of_topic_KW, next_KK = language()
    belief_K = np.full(TOPICS, 1 / TOPICS)  # of the topic, given whole words
    begun: tuple[int, ...] = ()  # letters of the word that is not whole
    number, found = 0, []
    for letter in letters_T.tolist():
        if letter < LETTERS:
            begun = (*begun, letter)
        else:
            belief_K = belief_K * of_topic_KW[:, words.index(begun)]
            belief_K = belief_K / belief_K.sum()
            belief_K = belief_K @ next_KK if letter == STOP else belief_K
            begun, number = (), number + 1
        fits_W = np.array([word[: len(begun)] == begun for word in words])
        joint_KW = belief_K[:, None] * of_topic_KW * fits_W
        joint_KW /= joint_KW.sum()
        last = number % IN_SENTENCE == IN_SENTENCE - 1
        of_letter = np.zeros(CHARACTERS)
        for word, p in zip(words, joint_KW.sum(axis=0), strict=True):
            rest = word[len(begun) : len(begun) + 1] or (STOP if last else SPACE,)
            of_letter[rest[0]] += p if word[: len(begun)] == begun else 0.0
        then_K = joint_KW.sum(axis=1) @ next_KK
        same = joint_KW.sum(axis=1) @ of_topic_KW
        found.append(
            {
                "letter": of_letter,
                "word": joint_KW.sum(axis=0),
                "next word": then_K @ of_topic_KW if last else same,
                "next sentence": then_K @ of_topic_KW,
            }
        )
    return {name: np.stack([law[name] for law in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnames="steps")
def train(
    key: jax.Array, letters_RT: jax.Array, targets_NRT: jax.Array, steps: int
) -> Any:
    """Parameters of the network of `progressions`, with a linear head for each target.

    Adam, rate .005 falling to 0 as a cosine; the sum of the heads' mean losses.
    """
    of_params, of_batches = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    params = progressions.network(of_params, len(targets_NRT), _HIDDEN)

    def loss_fn(params, rows_R):
        log_q = progressions.log_probabilities(params, letters_RT[rows_R])
        targets = targets_NRT[:, rows_R, :, None]
        picked = jnp.take_along_axis(log_q, targets, axis=-1)
        return -jnp.sum(jnp.mean(picked, axis=(1, 2, 3)))

    def step(carry, key):
        params, state = carry
        rows_R = jax.random.randint(key, (_BATCH,), 0, len(letters_RT))
        grads = jax.grad(loss_fn)(params, rows_R)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    return jax.lax.scan(step, start, jax.random.split(of_batches, steps))[0][0]


def measure(trial: Trial) -> Figures:
    """How far each head is above the least loss that it can have."""
    steps, rows, tests = _SIZES[trial.size]
    made = text(np.random.default_rng(trial.seed), rows)
    asked = ("letter", *_ARMS[trial.arm])
    targets = [made["letter"][:, 1:], *(made[name] for name in asked[1:])]
    params = train(
        jax.random.key(trial.seed),
        jnp.asarray(made["letter"][:, :-1]),
        jnp.asarray(np.stack(targets)),
        trial.steps or steps,
    )
    # Every seed is asked the same, in numbers that no seed of training gives.
    letters_RT = text(np.random.default_rng(2**31), tests)["letter"][:, :-1]
    log_q = np.asarray(progressions.log_probabilities(params, jnp.asarray(letters_RT)))
    exact = [laws(letters_T) for letters_T in letters_RT]
    figures: Figures = {}
    for number, name in enumerate(asked):
        if name in exact[0]:
            p_RTC = np.stack([law[name] for law in exact])
            log_RTC = log_q[number, ..., : p_RTC.shape[-1]].astype(np.float64)
            figures[f"gap, {name}"] = _gap(p_RTC, log_RTC)
    return figures


def _gap(p: np.ndarray, log_q: np.ndarray) -> float:
    """Mean relative entropy of laws p to laws q, in nats."""
    log_p = np.log(np.where(p > 0, p, 1.0))
    return float(np.mean(np.sum(p * (log_p - log_q), axis=-1)))


def _less(arm: str, base: str) -> Callable[[Any], float]:
    return difference(arm, base, "gap, letter")


_WITHIN = 0.05  # nats
STUDY = Study(
    about="Mean relative entropy of the exact law of what a head is asked for to what "
    "it says, nats: head 1's, of the next character; of the word that is being "
    "written; of the next one; of the first of the next sentence.",
    arms=lambda size: tuple(_ARMS),
    measure=measure,
    shown=("gap, letter", "gap, word", "gap, next word", "gap, next sentence"),
    base="letter",
    seeds=lambda size: 1 if size == "tiny" else 3 if size == "quick" else 5,
    claims=(
        *(
            Claim(
                says=f"further heads for {arm} bring head 1 closer to its law",
                of=_less(arm, "letter"),
                side="below",
            )
            for arm in ("letters", "words", "words and sentences")
        ),
        Claim(
            says="heads for words bring it closer than heads for letters",
            of=_less("words", "letters"),
            side="below",
        ),
        Claim(
            says="a head for the next sentence brings it closer than one for the next "
            "word",
            of=_less("words and sentences", "words"),
            side="below",
        ),
        Claim(
            says="the head for the next word comes within .05 nat of its law",
            of=figure_of("words", "gap, next word"),
            side="below",
            than=_WITHIN,
        ),
        Claim(
            says="the head for the next sentence comes within .05 nat of its law",
            of=figure_of("words and sentences", "gap, next sentence"),
            side="below",
            than=_WITHIN,
        ),
    ),
)
