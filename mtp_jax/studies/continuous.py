"""One head that is asked about any time ahead, a real number.

Sequences of even steps go on between their tokens, too: at a time that is half a token
on, a sequence of step 2 is one further. A head that is given the offset as a number is
trained on some offsets and asked about others, between these and beyond. Expected: it
answers those between in part, and none beyond, so that a head for each offset loses
little. Axes: R sequences, T tokens, D hidden width, F features of an offset, O offsets,
V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax.studies import progressions
from mtp_jax.studies.progressions import BATCH, HIDDEN, VOCABULARY
from mtp_jax.studies.study import Claim, Figures, Size, Study, Trial, figure_of

POSITION = 3  # after which the head is asked, when the step is long known
TRAINED = (1.0, 1.5, 2.0, 3.0, 3.5, 5.0, 6.0)
BETWEEN = (2.5, 4.0, 4.5, 5.5)
BEYOND = (7.0, 8.0, 9.5)
_SEQUENCES = 2000
_STEPS: dict[Size, int] = {"tiny": 10, "quick": 3000, "full": 10_000}
# Wave lengths of the features, in tokens; the offset itself is one more.
_ARMS: dict[str, tuple[float, ...]] = {
    "number alone": (),
    "number and waves": (50.0, 25.0, 12.5),
}


def features(offsets_O: jax.Array, waves: tuple[float, ...]) -> jax.Array:
    """Features of offsets, [O, F]: a tenth of each, and sines and cosines."""
    parts = [offsets_O / 10]
    for length in waves:
        parts += [jnp.sin(2 * jnp.pi * offsets_O / length)]
        parts += [jnp.cos(2 * jnp.pi * offsets_O / length)]
    return jnp.stack(parts, axis=-1)


def targets(
    tokens_RT: np.ndarray, offset: float, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence at a time, int [R], and whether it has a token there, bool [R].

    Args:
      tokens_RT: sequences.
      offset: tokens ahead of a position.
      position: from 1 on, where the step is known.
    """
    step_R = (tokens_RT[:, 1] - tokens_RT[:, 0]) % VOCABULARY
    ahead_R = step_R * offset
    whole_R = np.isclose(ahead_R, np.round(ahead_R))
    at_R = (tokens_RT[:, position] + np.round(ahead_R).astype(int)) % VOCABULARY
    return at_R, whole_R


def start(key: jax.Array, count: int) -> dict[str, jax.Array]:
    """Parameters: the network of `progressions`, and a head of two layers."""
    of_trunk, of_first, of_second = jax.random.split(key, 3)
    trunk = progressions.network(of_trunk, heads=1)
    inputs = HIDDEN + count
    return {
        **{name: trunk[name] for name in ("w_embed", "w_input", "w_state", "bias")},
        "w_first": jax.random.normal(of_first, (inputs, 128)) * inputs**-0.5,
        "bias_first": jnp.zeros(128),
        "w_second": jax.random.normal(of_second, (128, VOCABULARY)) * 0.01,
    }


def log_laws(
    params: Any, tokens_RT: jax.Array, features_OF: jax.Array, position: int
) -> jax.Array:
    """Log probabilities at each offset ahead of a position, [O, R, V]."""
    state_RD = progressions.states(params, tokens_RT[:, : position + 1])[-1]
    shape = (len(features_OF), len(state_RD))
    joined = jnp.concatenate(
        [
            jnp.broadcast_to(state_RD[None], (*shape, HIDDEN)),
            jnp.broadcast_to(features_OF[:, None], (*shape, features_OF.shape[-1])),
        ],
        axis=-1,
    )
    hidden = jax.nn.relu(joined @ params["w_first"] + params["bias_first"][None, None])
    return jax.nn.log_softmax(hidden @ params["w_second"], axis=-1)


@functools.partial(jax.jit, static_argnames=("steps", "waves"))
def train(
    key: jax.Array,
    tokens_RT: jax.Array,
    targets_OR: jax.Array,
    whole_OR: jax.Array,
    *,
    steps: int,
    waves: tuple[float, ...],
) -> Any:
    """Parameters trained on the targets of some offsets, where they are tokens."""
    of_params, of_batches = jax.random.split(key)
    asked_OF = features(jnp.array(TRAINED), waves)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    params = start(of_params, asked_OF.shape[-1])

    def loss_fn(params, rows):
        log_q = log_laws(params, tokens_RT[rows], asked_OF, POSITION)
        nll = -jnp.take_along_axis(log_q, targets_OR[:, rows, None], axis=-1)[..., 0]
        counts = whole_OR[:, rows]
        return jnp.sum(nll * counts) / jnp.sum(counts)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(tokens_RT))
        updates, state = optimizer.update(
            jax.grad(loss_fn)(params, rows), state, params
        )
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    return jax.lax.scan(step, carry, jax.random.split(of_batches, steps))[0][0]


def measure(trial: Trial) -> Figures:
    """Accuracy on all sequences at offsets of training, between and beyond them."""
    waves = _ARMS[trial.arm]
    tokens = progressions.sequences(np.random.default_rng(trial.seed), _SEQUENCES)
    pairs = [targets(tokens, offset, POSITION) for offset in TRAINED]
    params = train(
        jax.random.key(trial.seed),
        jnp.asarray(tokens),
        jnp.asarray(np.stack([at for at, _ in pairs])),
        jnp.asarray(np.stack([whole for _, whole in pairs])),
        steps=trial.steps or _STEPS[trial.size],
        waves=waves,
    )
    every = progressions.all_sequences()
    found: Figures = {}
    for name, offsets in (
        ("trained", TRAINED),
        ("between", BETWEEN),
        ("beyond", BEYOND),
    ):
        asked = features(jnp.array(offsets), waves)
        log_q = np.asarray(log_laws(params, jnp.asarray(every), asked, POSITION))
        right, count = 0, 0
        for o, offset in enumerate(offsets):
            at, whole = targets(every, offset, POSITION)
            right += int(np.sum((np.argmax(log_q[o], axis=-1) == at) & whole))
            count += int(whole.sum())
        found[name] = right / count
    return found


_BOUNDS = (("trained", 0.95), ("between", 0.5), ("beyond", 0.5))
STUDY = Study(
    about="Accuracy at offsets that were trained, at others between these, and beyond.",
    arms=lambda size: tuple(_ARMS),
    measure=measure,
    shown=tuple(name for name, _ in _BOUNDS),
    seeds=lambda size: 1 if size == "tiny" else 5,
    claims=tuple(
        Claim(
            says=f"{arm}: right at more than {bound:.0%} of offsets {name}",
            of=figure_of(arm, name),
            side="above",
            than=bound,
        )
        for arm in _ARMS
        for name, bound in _BOUNDS
    ),
)
