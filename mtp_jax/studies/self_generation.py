"""A model on its own text: what it says there and after true text, one head or four.

In training every token follows true ones; in writing, the model's own, as if an exam
were corrected after each answer in class and never at home. An article on the paper
says that heads for later tokens narrow this gap. The source here is a hidden Markov
chain, whose law of the next token is known after any text at all, so that what a model
says can be compared with it after true text and after text of its own. Expected: the
gap is there, is small, does not grow along the text (arXiv:1905.10617 finds as much of
larger models), and four heads do not change it.

Axes: H hidden states, V tokens, R rows, T tokens of a row.
"""

import numpy as np

from mtp_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.studies.in_memory import Rows, fit, padded
from mtp_jax.studies.study import (
    Claim,
    Figures,
    Size,
    Study,
    Trial,
    difference,
    figure_of,
)

STATES, TOKENS, LENGTH = 6, 12, 48
_SOURCE = 27
# Heads, and layers more on the way to head 1.
_ARMS = {"n=1": (1, 0), "n=1, deeper": (1, 3), "n=4": (4, 0)}
_LAYERS = 3  # on the way to head 1
# Width, rows of a step, steps, rows of a test.
_SIZES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (16, 4, 3, 16),
    "quick": (32, 32, 400, 256),
    "full": (48, 32, 3000, 1024),
}


def source(seed: int = _SOURCE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First law [H], transitions [H, H] and tokens [H, V] of a hidden Markov chain.

    No token is ever impossible, so that every text has a law of what comes next.
    """
    rng = np.random.default_rng(seed)

    def rows(count: int, size: int) -> np.ndarray:
        return 0.98 * rng.dirichlet(np.full(size, 0.3), count) + 0.02 / size

    return rows(1, STATES)[0], rows(STATES, STATES), rows(STATES, TOKENS)


def text(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Rows of the source, int64 [R, T]."""
    first_H, step_HH, said_HV = source()
    states_R = _drawn(rng.random(count), np.tile(first_H, (count, 1)))
    tokens_RT = np.zeros((count, length), np.int64)
    for t in range(length):
        tokens_RT[:, t] = _drawn(rng.random(count), said_HV[states_R])
        states_R = _drawn(rng.random(count), step_HH[states_R])
    return tokens_RT


def _drawn(u_R: np.ndarray, law_RV: np.ndarray) -> np.ndarray:
    """An index drawn from each law, by a uniform number each, int64 [R]."""
    ends_RV = np.cumsum(law_RV, axis=1)
    above_R = (u_R[:, None] * ends_RV[:, -1:] >= ends_RV).sum(axis=1)
    return np.minimum(above_R, law_RV.shape[1] - 1)


def laws(tokens_RT: np.ndarray) -> np.ndarray:
    """The source's law of the token after each, float64 [R, T, V].

    By the forward algorithm, over hidden states given the text so far.
    """
    first_H, step_HH, said_HV = source()
    belief_RH = np.tile(first_H, (len(tokens_RT), 1))
    found = []
    for tokens_R in tokens_RT.T:
        belief_RH = belief_RH * said_HV[:, tokens_R].T
        belief_RH = (belief_RH / belief_RH.sum(axis=1, keepdims=True)) @ step_HH
        found.append(belief_RH @ said_HV)
    return np.stack(found, axis=1)


def config_of(trial: Trial) -> Config:
    """Three layers on the way to head 1, whatever n is, and one for each other head."""
    n, deeper = _ARMS[trial.arm]
    width, _, steps, _ = _SIZES[trial.size]
    steps = trial.steps or steps
    return Config(
        model=ModelConfig(
            vocab_size=TOKENS,
            d_model=width,
            num_layers=_LAYERS + deeper + n - 1,
            n_future_tokens=n,
            num_query_heads=4,
            num_kv_heads=4,
            d_head=width // 4,
            d_ff=2 * width,
        ),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=min(50, steps), weight_decay=0.0),
        train=TrainConfig(steps=steps),
    )


def measure(trial: Trial) -> Figures:
    """How far head 1 is from the source's law, after true text and after its own."""
    n, _ = _ARMS[trial.arm]
    _, count, _, tests = _SIZES[trial.size]

    def make_rows(rng: np.random.Generator) -> Rows:
        return padded(text(rng, count, LENGTH), n)

    model = fit(config_of(trial), make_rows, trial.seed)
    rng = np.random.default_rng([2**31, trial.seed])
    true_RT = text(rng, tests, LENGTH)

    def said(tokens_RT: np.ndarray) -> np.ndarray:
        logits = np.asarray(head_outputs(model, tokens_RT).logits_NBTV[0], np.float64)
        return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))

    own_RT = written(said, true_RT[:, :1], rng.random((tests, LENGTH)))
    forced_T = divergence(laws(true_RT), said(true_RT)).mean(axis=0)
    free_T = divergence(laws(own_RT), said(own_RT)).mean(axis=0)
    forced, free = float(forced_T.mean()), float(free_T.mean())
    gap_T, quarter = free_T - forced_T, LENGTH // 4
    return {
        "forced": forced,
        "free": free,
        "exposure": free - forced,
        "share": free / forced - 1,
        "growing": float(gap_T[-quarter:].mean() - gap_T[:quarter].mean()),
        "text": float(divergence(said(own_RT), laws(own_RT)).mean()),
        "forced_by_position": forced_T.tolist(),
        "free_by_position": free_T.tolist(),
    }


def written(said, first_R1: np.ndarray, u_RT: np.ndarray) -> np.ndarray:
    """Rows that begin with tokens of the source and are gone on with by a model.

    Args:
      said: from rows [R, T] to the law of the token after each, [R, T, V].
      first_R1: first tokens.
      u_RT: a number in [0, 1) for each token, which draws it; arms share them.
    """
    tokens_RT = np.zeros(u_RT.shape, np.int64)
    tokens_RT[:, :1] = first_R1
    for t in range(1, u_RT.shape[1]):
        tokens_RT[:, t] = _drawn(u_RT[:, t], said(tokens_RT)[:, t - 1])
    return tokens_RT


def divergence(p_RTV: np.ndarray, q_RTV: np.ndarray) -> np.ndarray:
    """Relative entropy of laws p to laws q, in nats, [R, T]."""
    return np.sum(p_RTV * (np.log(p_RTV) - np.log(q_RTV)), axis=-1)


STUDY = Study(
    about="Relative entropy of the source's law of the next token to head 1's, nats a "
    "token: `forced`, after the source's text; `free`, after the model's own, sampled; "
    "`exposure`, the second less the first, and `share`, as a share of the first; "
    "`growing`, exposure in the last quarter of a text less that in the first; "
    "`text`: of the model's law of texts to the source's, nats a token.",
    arms=lambda size: tuple(_ARMS),
    measure=measure,
    shown=("exposure", "share", "growing", "forced", "free", "text"),
    base="n=1",
    seeds=lambda size: 5 if size == "full" else 1,
    claims=(
        Claim(
            says="one head is further from the source after its own text",
            of=figure_of("n=1", "exposure"),
            side="above",
        ),
        Claim(
            says="and further still as the text goes on",
            of=figure_of("n=1", "growing"),
            side="above",
        ),
        Claim(
            says="four heads narrow the gap, on an equal way to head 1",
            of=difference("n=4", "n=1", "exposure"),
            side="below",
        ),
        Claim(
            says="four heads narrow the gap, with equal parameters",
            of=difference("n=4", "n=1, deeper", "exposure"),
            side="below",
        ),
        Claim(
            says="four heads narrow the gap as a share of what is wrong after true "
            "text",
            of=difference("n=4", "n=1", "share"),
            side="below",
        ),
        Claim(
            says="four heads write text that is closer to the source's",
            of=difference("n=4", "n=1", "text"),
            side="below",
        ),
    ),
)
