"""Names of two tokens that come again: who says the second after the first?

A small and sharp form of arXiv:2404.19737, section 4.1, without stories: every row has
four names, pairs of a first and a second token that are drawn anew for it, and between
their mentions filler of a Markov chain. From its second mention on the second token of
a name is certain to a reader who looks back. Some pairs are never names in training.
Expected: two heads are ahead of one in small models, and no longer in larger ones.
Axes: R rows, T tokens of a row.
"""

import numpy as np

from mtp_jax.config import Config, ModelConfig, OptimConfig, TrainConfig
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.studies.in_memory import Rows, fit, padded
from mtp_jax.studies.study import Claim, Figures, Size, Study, Trial, difference

FILLERS, FIRSTS, SECONDS, NAMES = 16, 32, 32, 4
VOCABULARY = FILLERS + FIRSTS + SECONDS
_NAME_RATE = 0.25  # probability that a name follows where it can
_WIDTHS = (16, 32, 64)
_ARMS = {f"d={width}, n={n}": (width, n) for width in _WIDTHS for n in (1, 2)}
_T = 96
# Rows of a step, steps, rows of a test.
_SIZES: dict[Size, tuple[int, int, int]] = {
    "tiny": (4, 3, 16),
    "quick": (32, 500, 256),
    "full": (32, 3000, 1024),
}


def is_held_out(first: int, second: int) -> bool:
    """True for the fifth of the pairs that are never names in training."""
    return (3 * first + second) % 5 == 0


def rows_of(
    rng: np.random.Generator, count: int, length: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with names, and where the second token of a known name is, [R, T] each.

    Args:
      rng: of all that is drawn.
      count: R.
      length: T.
      held_out: whether the names are of the pairs that training never has.

    Returns:
      tokens, int64, and known, True for the second token of each mention of a name but
      its first in the row.
    """
    chain = np.random.default_rng(11).dirichlet(np.full(FILLERS, 0.3), FILLERS)
    ends = np.cumsum(chain, axis=1)
    tokens_RT = np.zeros((count, length), np.int64)
    known_RT = np.zeros((count, length), bool)
    for row in range(count):
        firsts = rng.permutation(FIRSTS)[:NAMES]
        names = [(int(first), _second(rng, int(first), held_out)) for first in firsts]
        seen: set[int] = set()
        at, filler = 0, int(rng.integers(FILLERS))
        while at < length:
            if at + 1 < length and rng.random() < _NAME_RATE:
                which = int(rng.integers(NAMES))
                first, second = names[which]
                tokens_RT[row, at : at + 2] = (
                    FILLERS + first,
                    FILLERS + FIRSTS + second,
                )
                known_RT[row, at + 1] = which in seen
                seen.add(which)
                at += 2
                continue
            draw = rng.random()
            filler = min(int(np.searchsorted(ends[filler], draw)), FILLERS - 1)
            tokens_RT[row, at] = filler
            at += 1
    return tokens_RT, known_RT


def _second(rng: np.random.Generator, first: int, held_out: bool) -> int:
    while True:
        second = int(rng.integers(SECONDS))
        if is_held_out(first, second) == held_out:
            return second


def config_of(trial: Trial) -> Config:
    """Three layers, heads among them."""
    width, n = _ARMS[trial.arm]
    steps = trial.steps or _SIZES[trial.size][1]
    return Config(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            num_layers=3,
            n_future_tokens=n,
            num_query_heads=2,
            num_kv_heads=2,
            d_head=width // 2,
            d_ff=2 * width,
        ),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=min(100, steps)),
        train=TrainConfig(steps=steps),
    )


def measure(trial: Trial) -> Figures:
    """Accuracy of head 1 on second tokens of known names, seen pairs and others."""
    count, _, tests = _SIZES[trial.size]
    n = _ARMS[trial.arm][1]

    def make_rows(rng: np.random.Generator) -> Rows:
        return padded(rows_of(rng, count, _T, held_out=False)[0], n)

    model = fit(config_of(trial), make_rows, trial.seed)
    found = {}
    for name, held_out in (("seen", False), ("unseen", True)):
        rng = np.random.default_rng([2**31, held_out])
        tokens, known = rows_of(rng, tests, _T, held_out)
        right = 0.0
        for i in range(0, tests, 64):
            logits = np.asarray(head_outputs(model, tokens[i : i + 64]).logits_NBTV)
            guess = np.argmax(logits[0], axis=-1)[:, :-1]
            right += np.sum((guess == tokens[i : i + 64, 1:]) & known[i : i + 64, 1:])
        found[name] = float(right / known.sum())
    return found


_SMALLEST, _LARGEST = _WIDTHS[0], _WIDTHS[-1]
STUDY = Study(
    about="Accuracy of head 1 on the second token of names that were mentioned "
    "before in the row (by chance .03): `seen`, pairs that are names in "
    "training, too; `unseen`, pairs that never are.",
    arms=lambda size: tuple(_ARMS),
    measure=measure,
    shown=("seen", "unseen"),
    seeds=lambda size: 5 if size == "full" else 1,
    claims=(
        *(
            Claim(
                says=f"two heads beat one at width {width}",
                of=difference(f"d={width}, n=2", f"d={width}, n=1", "seen"),
                side="above",
            )
            for width in _WIDTHS
        ),
        Claim(
            says="two heads gain less at the largest width than at the smallest",
            of=lambda arms: (
                arms[f"d={_LARGEST}, n=2"]["seen"]
                - arms[f"d={_LARGEST}, n=1"]["seen"]
                - arms[f"d={_SMALLEST}, n=2"]["seen"]
                + arms[f"d={_SMALLEST}, n=1"]["seen"]
            ),
            side="below",
        ),
    ),
)
