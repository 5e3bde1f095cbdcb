"""Polynomial arithmetic, in and out of the domain of training (arXiv:2404.19737, 4.2).

The paper's ring, F7[X]/(X^5) with up to 5 operations, takes hours of a GPU; its small
sibling here is F5[X]/(X^2) with up to 3. Its 1,900 expressions of one operation are all
in the training data; of two there are over a million. The loss is of all tokens, of the
operands too, which are noise. Expected (figure 8 of the paper): more heads are better
at every number of operations, and pauses before the answer change nothing of that.
"""

import math

import numpy as np

from mtp_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.studies.in_memory import Rows, fit
from mtp_jax.studies.rings import Ring, longest, packed
from mtp_jax.studies.study import Claim, Figures, Size, Study, Trial, difference

# Ring, most operations in training and in tests, heads, pauses.
_SMALL, _LARGE = Ring(5, 2), Ring(7, 5)
_ARMS: dict[str, tuple[Ring, int, int, int, int]] = {
    "n=1": (_SMALL, 3, 6, 1, 0),
    "n=2": (_SMALL, 3, 6, 2, 0),
    "n=4": (_SMALL, 3, 6, 4, 0),
    "n=1, 5 pauses": (_SMALL, 3, 6, 1, 5),
    "n=4, 5 pauses": (_SMALL, 3, 6, 4, 5),
    "F7, n=1": (_LARGE, 5, 10, 1, 0),
    "F7, n=2": (_LARGE, 5, 10, 2, 0),
    "F7, n=4": (_LARGE, 5, 10, 4, 0),
}
_QUICK = ("n=1", "n=2", "n=4")
_MORE = ("F7, n=1", "F7, n=2", "F7, n=4")
# Width, rows of a step, steps, tests of each number of operations.
_SIZES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (16, 4, 3, 20),
    "quick": (48, 32, 800, 300),
    "full": (96, 128, 1250, 2000),
}
_ROW = 128  # tokens


def config_of(trial: Trial) -> Config:
    """Six layers, heads among them."""
    ring, _, _, n, _ = _ARMS[trial.arm]
    width, _, steps, _ = _SIZES[trial.size]
    steps = trial.steps or steps
    return Config(
        model=ModelConfig(
            vocab_size=ring.vocabulary,
            d_model=width,
            num_layers=6,
            n_future_tokens=n,
            num_query_heads=4,
            num_kv_heads=4,
            d_head=width // 4,
            d_ff=8 * width // 3 // 8 * 8,
        ),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=min(100, steps)),
        train=TrainConfig(steps=steps),
    )


def measure(trial: Trial) -> Figures:
    """Share of problems answered exactly, greedily, by number of operations."""
    ring, most, farthest, n, pauses = _ARMS[trial.arm]
    _, rows, _, tests = _SIZES[trial.size]

    def make_rows(rng: np.random.Generator) -> Rows:
        tokens, segments = packed(ring, rng, rows, _ROW, most, pauses)
        pad = ((0, 0), (0, n))
        return Rows(np.pad(tokens, pad), np.pad(segments, pad))

    model = fit(config_of(trial), make_rows, trial.seed)
    length = longest(ring, farthest, pauses)
    exact, digits = [], []
    for operations in range(1, farthest + 1):
        # Every seed is asked the same, in numbers that no seed of training gives.
        rng = np.random.default_rng([2**31, operations])
        problems = [ring.problem(rng, operations, pauses) for _ in range(tests)]
        right = _right(model, ring, problems, length)
        exact.append(float(right.all(axis=1).mean()))
        digits.append(float(right.mean()))
    return {
        "at_most": exact[most - 1],
        "in_domain": float(np.mean(exact[:most])),
        "beyond": float(np.mean(exact[most:])),
        "digits": float(np.mean(digits)),
        "exact": exact,
    }


def _right(model, ring: Ring, problems: list[list[int]], length: int) -> np.ndarray:
    """Which coefficients of each answer head 1 finds most likely, bool [R, degree].

    Given the right ones before: greedy decoding is exact where all of them are.
    """
    size = 100
    tokens = np.full((math.ceil(len(problems) / size) * size, length), ring.padding)
    segments = np.zeros_like(tokens)
    for row, problem in enumerate(problems):
        tokens[row, : len(problem)] = problem
        segments[row, : len(problem)] = 1
    predicted = []
    for i in range(0, len(tokens), size):
        rows = (tokens[i : i + size], segments[i : i + size])
        logits = np.asarray(head_outputs(model, *rows).logits_NBTV)
        predicted.append(np.argmax(logits[0], axis=-1))
    guess = np.concatenate(predicted)
    right = []
    for row, problem in enumerate(problems):
        first = len(problem) - 1 - ring.degree  # of the answer
        answer = slice(first, first + ring.degree)
        before = slice(first - 1, first - 1 + ring.degree)
        right.append(guess[row, before] == tokens[row, answer])
    return np.array(right)


STUDY = Study(
    about="Share of exact answers: `at_most`, with as many operations as training "
    "has at most; `in_domain`, the mean up to there; `beyond`, the mean of "
    "more; `digits`, of single coefficients, anywhere.",
    arms=lambda size: (
        _QUICK if size == "quick" else tuple(arm for arm in _ARMS if arm not in _MORE)
    ),
    more_arms=_MORE,
    measure=measure,
    shown=("at_most", "in_domain", "beyond", "digits"),
    base="n=1",
    seeds=lambda size: 5 if size == "full" else 1,
    claims=(
        *(
            Claim(
                says=f"{arm} answers more than n=1, {where}",
                of=difference(arm, "n=1", figure),
                side="above",
            )
            for figure, where in (
                ("at_most", "with as many operations as in training at most"),
                ("beyond", "with more than in training"),
            )
            for arm in ("n=2", "n=4")
        ),
        Claim(
            says="with pauses n=4 answers more than n=1, too",
            of=difference("n=4, 5 pauses", "n=1, 5 pauses", "at_most"),
            side="above",
        ),
    ),
)
