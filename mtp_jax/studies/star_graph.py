"""Paths through star graphs: does a head that looks far help the one that looks near?

A star has branches of equal length around a source. A row lists its edges in any order,
then source and goal, and asks for the path between them (arXiv:2403.06963). Only the
first step of the path is hard: whoever is given it, as training always is, finds each
further node by one look-up, so a model that is taught the next token alone may never
learn to look back from the goal, and takes the right branch by chance. At the source
head i is asked for a node that is L - 1 - i look-ups before the goal, of paths of L
nodes: L - 2 for head 1, none for head L - 1, which copies the goal. Expected: success
rises with n at equal L and falls with L at equal n; it needs the gradient of the
farther heads in the trunk, so that detached heads are as bad as none; written from the
goal on, each step is one look-up, and one head is enough.

Axes: R rows, S tokens of a row, E edges, L nodes of a path, X nodes of a graph.
"""

import dataclasses

import numpy as np

from mtp_jax.config import Config, LossConfig, ModelConfig, OptimConfig, TrainConfig
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

NAMES, BRANCHES = 16, 2
EDGE, QUERY, EQUALS = NAMES, NAMES + 1, NAMES + 2
VOCABULARY = NAMES + 3
SOLVED = 0.95  # share of paths, of a seed that counts as solved


@dataclasses.dataclass(frozen=True)
class _Arm:
    nodes: int = 4  # of a path, L
    n: int = 1  # heads
    deeper: int = 0  # layers more on the way to head 1
    detached: bool = False  # heads 2 to n teach the trunk nothing
    reverse: bool = False  # the path is written from the goal on


_ARMS = {
    "n=1": _Arm(),
    "n=2": _Arm(n=2),
    "n=3": _Arm(n=3),
    "n=4": _Arm(n=4),
    "n=3, detached": _Arm(n=3, detached=True),
    "n=1, deeper": _Arm(deeper=2),
    "n=1, reverse": _Arm(reverse=True),
    "L=3, n=1": _Arm(nodes=3),
    "L=5, n=3": _Arm(nodes=5, n=3),
    "L=6, n=3": _Arm(nodes=6, n=3),
}
_QUICK = ("n=1", "n=3", "n=1, reverse")
_LAYERS = 4  # on the way to head 1
# Width, rows of a step, steps, graphs of the test.
_SIZES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (16, 4, 3, 64),
    "quick": (48, 64, 1000, 512),
    "full": (64, 128, 4000, 2048),
}


def graphs(
    rng: np.random.Generator, count: int, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Graphs with a question each, and the path from source to goal.

    Args:
      rng: of names, and of the order of edges.
      count: R.
      nodes: L, of a path; a graph has 1 + BRANCHES (L - 1).

    Returns:
      questions, int64 [R, 3 E + 3], `a b |` for each edge but `a b /` for the last,
      then source, goal and =; and paths, int64 [R, L], which begin with the source.
    """
    of_branch = np.arange(BRANCHES * (nodes - 1)).reshape(BRANCHES, -1) + 1
    source = np.zeros((BRANCHES, 1), np.int64)
    chains = np.concatenate([source, of_branch], axis=1)  # [BRANCHES, L]
    edges_E2 = np.stack([chains[:, :-1].ravel(), chains[:, 1:].ravel()], axis=-1)
    assert chains.max() < NAMES, "there are more nodes than names"

    def shuffled(size: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)

    names_RX, order_RE = shuffled(NAMES), shuffled(len(edges_E2))
    ends = edges_E2[order_RE].reshape(count, -1)  # [R, 2 E]
    named = np.take_along_axis(names_RX, ends, axis=1).reshape(*order_RE.shape, 2)
    listed = np.full((*order_RE.shape, 3), EDGE)
    listed[..., :2] = named
    listed[:, -1, 2] = QUERY
    paths_RL = names_RX[:, chains[0]]
    asked = np.stack([paths_RL[:, 0], paths_RL[:, -1], np.full(count, EQUALS)], axis=-1)
    return np.concatenate([listed.reshape(count, -1), asked], axis=1), paths_RL


def config_of(trial: Trial) -> Config:
    """Four layers on the way to head 1, whatever n is, and one for each other head."""
    arm = _ARMS[trial.arm]
    width, _, steps, _ = _SIZES[trial.size]
    steps = trial.steps or steps
    pull = (1.0,) + (0.0,) * (arm.n - 1) if arm.detached else ()
    return Config(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            num_layers=_LAYERS + arm.deeper + arm.n - 1,
            n_future_tokens=arm.n,
            num_query_heads=4,
            num_kv_heads=4,
            d_head=width // 4,
            d_ff=8 * width // 3 // 8 * 8,
        ),
        loss=LossConfig(trunk_gradient=pull),
        optim=OptimConfig(
            peak_lr=2e-3, warmup_steps=min(100, steps), weight_decay=0.01
        ),
        train=TrainConfig(steps=steps),
    )


def measure(trial: Trial) -> Figures:
    """Shares of right paths and of right branches, on graphs that are drawn anew."""
    arm = _ARMS[trial.arm]
    _, rows, _, tests = _SIZES[trial.size]

    def asked(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        questions, paths = graphs(rng, count, arm.nodes)
        return questions, paths[:, ::-1] if arm.reverse else paths

    def make_rows(rng: np.random.Generator) -> Rows:
        questions, paths = asked(rng, rows)
        learned = np.concatenate(
            [np.zeros_like(questions), np.ones_like(paths)], axis=1
        )
        return padded(np.concatenate([questions, paths], axis=1), arm.n, learned)

    model = fit(config_of(trial), make_rows, trial.seed)
    # Every seed is asked the same, in numbers that no seed of training gives.
    questions, paths = asked(np.random.default_rng([2**31, arm.nodes]), tests)
    right_RL = _right(model, questions, paths)
    solved = float(right_RL.all(axis=1).mean())
    turn = -2 if arm.reverse else 1  # where the path leaves the source
    return {
        "solved": solved,
        "branch": float(right_RL[:, turn].mean()),
        "solved_seeds": float(solved > SOLVED),
        "by_node": right_RL.mean(axis=0).tolist(),
    }


def _right(model, questions_RQ: np.ndarray, paths_RL: np.ndarray) -> np.ndarray:
    """Which nodes of each path head 1 finds most likely, bool [R, L].

    Given the right ones before: greedy decoding is right where all of them are.
    """
    tokens = np.concatenate([questions_RQ, paths_RL], axis=1)
    asked = slice(questions_RQ.shape[1] - 1, -1)
    guesses = []
    for i in range(0, len(tokens), 256):
        logits = np.asarray(head_outputs(model, tokens[i : i + 256]).logits_NBTV)
        guesses.append(np.argmax(logits[0, :, asked], axis=-1))
    return np.concatenate(guesses) == paths_RL


def _slope(arms, names: tuple[str, ...]) -> float:
    """The slope of `solved` over arms, an arm being a unit."""
    y = [arms[name]["solved"] for name in names]
    return float(np.polyfit(np.arange(len(y)), y, 1)[0])


STUDY = Study(
    about="Stars of two branches; paths of four nodes where L is not named. `solved`: "
    "share of paths that are right as a whole (by chance .5); `branch`: of right first "
    "steps; `solved_seeds`: share of seeds with more than .95 of paths right, with "
    "exact intervals of a share (Clopper and Pearson 1934).",
    arms=lambda size: _QUICK if size == "quick" else tuple(_ARMS),
    measure=measure,
    shown=("solved", "branch", "solved_seeds"),
    shares=("solved_seeds",),
    base="n=1",
    seeds=lambda size: 5 if size == "full" else 1,
    claims=(
        Claim(
            says="one head does not find the path: fewer than .75 of paths right",
            of=figure_of("n=1", "solved"),
            side="below",
            than=0.75,
        ),
        Claim(
            says="n = L - 1 heads solve it in more seeds than one, by a fifth or more",
            of=difference("n=3", "n=1", "solved_seeds"),
            side="above",
            than=0.2,
        ),
        Claim(
            says="more heads find more paths: a slope over n = 1, 2, 3 above 0",
            of=lambda arms: _slope(arms, ("n=1", "n=2", "n=3")),
            side="above",
        ),
        Claim(
            says="three heads find fewer longer paths: a slope over L = 4, 5, 6 "
            "below 0",
            of=lambda arms: _slope(arms, ("n=3", "L=5, n=3", "L=6, n=3")),
            side="below",
        ),
        Claim(
            says="it is their gradient in the trunk: detached heads find .2 less",
            of=difference("n=3, detached", "n=3", "solved"),
            side="below",
            than=-0.2,
        ),
        Claim(
            says="it is not the parameters: one head with as many finds .2 less",
            of=difference("n=1, deeper", "n=3", "solved"),
            side="below",
            than=-0.2,
        ),
        Claim(
            says="written from the goal on, one head finds .95 of paths",
            of=figure_of("n=1, reverse", "solved"),
            side="above",
            than=0.95,
        ),
        Claim(
            says="where one look-up is enough (L=3), one head finds .95 of paths",
            of=figure_of("L=3, n=1", "solved"),
            side="above",
            than=0.95,
        ),
    ),
)
