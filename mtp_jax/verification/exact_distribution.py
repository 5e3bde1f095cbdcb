"""The exact distribution of a decoder's first tokens, and that of head 1 alone.

A decoder's distribution is that of its own programs: every draw is made to give each of
its values in turn, and the probabilities of all that leads to a text add up. Head 1's
comes from the forward pass of training, which has no cache, and from sampling written
in NumPy.

Axes: B rows, C rows of a call, J draws of a forward pass, T time, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.decode.batch import bucket_size, put
from mtp_jax.decode.cache import at_slot
from mtp_jax.decode.decoders.sampling import RandomKeys, Sampling, sampling_arrays
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.programs import Programs, Prompts, slack
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import HeadRunner, all_hidden, tokens_before
from mtp_jax.model.language_model import keep_heads, model_builder, run_trunk
from mtp_jax.model.layers import unembed
from mtp_jax.parallel.sharding import batch_shards, spec

# Texts, end of text included, to probabilities.
Distribution = dict[tuple[int, ...], float]
NextLogits = Callable[[Sequence[Sequence[int]]], np.ndarray]

_ROWS_PER_CALL = 32  # where nothing else is asked for
_NO_RANK = 2**30  # rank of no value: a draw forced to it has a probability of NaN


class TooManyDraws(Exception):
    """Enumerating would take more rows than allowed."""


def head_one(cfg: ModelConfig, params: Any, ids: int | None = None) -> NextLogits:
    """Returns `f(rows) -> [B, V]`, logits of the token after each row, as in training.

    They are float32; rows are token ids from begin of text on. There are tokens for the
    first `ids` ids, or for all: the others have logits of -inf, as in decoding, where
    training has finite ones. Takes parameters as `model_builder` makes them. Needs the
    mesh to be set.
    """
    cfg, params = keep_heads(cfg, params, cfg.heads.least_kept(cfg.n_future_tokens))
    _, build = model_builder(cfg)

    @jax.jit
    def after(params, tokens_BT, length_B):
        model = build(params)
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        rows = RowContext(model.angles(positions_BT), 0 * tokens_BT)
        trunk_BTD = run_trunk(model, model.embed(tokens_BT), rows, "xla")

        runner = HeadRunner(cfg, rows, "xla")
        before_NBT = tokens_before(cfg, tokens_BT)
        hidden_BTD = all_hidden(runner, model.parts(trunk_BTD), before_NBT)[0][0]
        last_B1D = at_slot(hidden_BTD, length_B - 1)[:, None]
        unembedding = model.unembedding_param()
        w_VD = unembedding if unembedding.ndim == 2 else unembedding[0]
        w_VD = jax.sharding.reshard(w_VD.astype(last_B1D.dtype), spec("vocab", None))
        logits_B1V = unembed(last_B1D, w_VD, spec("batch", None, "vocab"))
        return jax.sharding.reshard(logits_B1V[:, 0], spec("batch", None))

    def call(rows: Sequence[Sequence[int]]) -> np.ndarray:
        mesh = jax.sharding.get_mesh()
        width = bucket_size(max(map(len, rows)), least=8)
        size = _whole(min(_ROWS_PER_CALL, len(rows)), batch_shards(mesh))
        logits = []
        for start in range(0, len(rows), size):
            now = rows[start : start + size]
            tokens_BT = np.zeros((size, width), np.int32)
            length_B = np.ones(size, np.int32)
            for b, row in enumerate(now):
                tokens_BT[b, : len(row)] = row
                length_B[b] = len(row)
            predicted_BV = after(params, put(tokens_BT), put(length_B))
            logits.append(np.asarray(predicted_BV)[: len(now)])
        logits_BV = np.concatenate(logits)
        if ids is not None and ids < cfg.vocab_size:
            logits_BV[:, ids:] = -np.inf
        return logits_BV

    return call


def next_distribution(logits_V: np.ndarray, text: Sequence[int], sampling: Sampling):
    """The distribution of the next token, float64 [V], of the logits after a text."""
    logits_V = np.asarray(logits_V, np.float64)
    seen = np.unique(np.asarray(text, np.int64))
    penalty = sampling.repetition_penalty
    logits_V[seen] *= np.where(logits_V[seen] > 0, 1 / penalty, penalty)
    if sampling.greedy:
        return np.eye(len(logits_V))[np.argmax(logits_V)]
    logits_V = logits_V / np.float32(sampling.temperature)
    order = np.argsort(-logits_V, kind="stable")
    kept = order[: sampling.top_k or len(order)]
    prob = np.exp(logits_V[kept] - logits_V[kept[0]])
    prob /= prob.sum()
    before = np.cumsum(prob) - prob
    few = (before < np.float32(sampling.top_p)) | (np.arange(len(kept)) == 0)
    target_V = np.zeros(len(logits_V))
    target_V[kept[few]] = prob[few] / prob[few].sum()
    return target_V


def head_one_distribution(
    next_logits: NextLogits,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling,
    eos_id: int,
) -> Distribution:
    """The distribution of the first `tokens` new tokens by head 1, token by token.

    Args:
      next_logits: from `head_one`.
      prompt: token ids, begin of text first.
      tokens: how many; a text may end before.
      sampling: its top_k, or the vocabulary, should be small.
      eos_id: end of text.
    """
    distribution: Distribution = {(): 1.0}
    for _ in range(tokens):
        ended = {text: p for text, p in distribution.items() if text[-1:] == (eos_id,)}
        going = [text for text in distribution if text not in ended]
        if not going:
            break
        rows = [[*prompt, *text] for text in going]
        longer: Distribution = {}
        for text, row, logits_V in zip(going, rows, next_logits(rows), strict=True):
            target_V = next_distribution(logits_V, row, sampling)
            for token in np.flatnonzero(target_V):
                longer[(*text, int(token))] = distribution[text] * float(
                    target_V[token]
                )
        distribution = ended | longer
    return distribution


def distance(a: Distribution, b: Distribution) -> float:
    """The sum of all differences of two distributions: 0 if equal, 2 at most."""
    return sum(abs(a.get(text, 0.0) - b.get(text, 0.0)) for text in a.keys() | b.keys())


def decoder_distribution(
    programs: Programs,
    params: Any,
    decoder: Decoder,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling,
    *,
    most_rows: int = 20_000,
    rows: int = _ROWS_PER_CALL,
) -> Distribution:
    """The distribution of the first `tokens` new tokens that a decoder writes.

    Runs `begin` and `step` of the decoder, compiled as for any other use. States that
    differ in nothing that can matter to the text are merged. Needs the mesh to be set.

    Args:
      programs: compiled programs of the model.
      params: from `decode_model.unstack`, with the heads that the decoder runs.
      decoder: the decoder.
      prompt: token ids, begin of text first.
      tokens: their number; a text may end before.
      sampling: with a small top_k, unless the vocabulary is small.
      most_rows: the most rows of a batch that this may take.
      rows: the number of them in a call, which decides the memory.

    Returns:
      The probabilities of the texts; they add up to 1 but for rounding.

    Raises:
      TooManyDraws: it would take more rows.
    """
    ranks = sampling.top_k or params["w_embedding"].shape[0]
    ranks = max(ranks, 2)
    run = _Enumeration(programs, params, decoder, prompt, tokens, sampling, ranks, rows)
    distribution: Distribution = {}
    frontier = run.begin(most_rows)
    used = run.rows
    while True:
        going: list[_Branch] = []
        for state in frontier:
            if state.done:
                distribution[state.text] = (
                    distribution.get(state.text, 0.0) + state.prob
                )
            else:
                going.append(state)
        if not going:
            return distribution
        frontier = run.step(going, most_rows - used)
        used = run.rows


@dataclasses.dataclass
class _Branch:
    """A row of a `DecodeState` on the host, and its probability."""

    row: list[np.ndarray]  # leaves that have rows; none once it is done
    text: tuple[int, ...]
    done: bool
    prob: float


class _Enumeration:
    """Runs a decoder over one prompt with prescribed draws, many rows in a call."""

    def __init__(
        self, programs, params, decoder, prompt, tokens, sampling, ranks, rows
    ):
        mesh = jax.sharding.get_mesh()
        self._params = params
        self._prompt = prompt
        self._ranks = ranks
        self._c = _whole(rows, batch_shards(mesh))
        width = decoder.width(len(params["heads"]))
        self._j = 4 * width + 8  # draws of a forward pass, at most
        self.rows = 0
        more = slack(programs.cfg, decoder, len(params["heads"]))
        room = bucket_size(len(prompt) + tokens + more, least=8)
        tokens_CP = np.tile(np.asarray(prompt, np.int32), (self._c, 1))
        length_C = np.full(self._c, len(prompt), np.int32)
        zeros_CJ = np.zeros((self._c, self._j), np.int32)
        self._prompts = Prompts(
            tokens_BP=put(tokens_CP),
            length_B=put(length_C),
            limit_B=put(length_C + np.int32(tokens)),
            done_B=put(np.zeros(self._c, bool)),
            sampling=sampling_arrays(sampling, params["w_embedding"].shape[0]),
            keys=RandomKeys(
                put(np.zeros((self._c, 2), np.uint32)),
                put(zeros_CJ),
                put(np.zeros(self._c, np.float32)),
            ),
        )
        self._begin, (shapes, _) = programs.begin(
            decoder, params, self._prompts, room, room
        )
        self._advance = programs.advance(decoder, params, len(params["heads"]), shapes)
        leaves, self._structure = jax.tree.flatten(shapes)
        self._shardings = [leaf.sharding for leaf in leaves]
        self._zeros_C = np.zeros(self._c, np.float32), shapes.keys.log_prob_B.sharding
        self._last: list[np.ndarray] = []
        self._step_values: list[int] | None = None

    def begin(self, most_rows: int) -> list[_Branch]:
        """The branches after the pass that reads the prompt."""

        def call(_, forced_CJ):
            keys = dataclasses.replace(self._prompts.keys, forced_BJ=forced_CJ)
            prompts = dataclasses.replace(self._prompts, keys=keys)
            return self._begin(self._params, prompts)[0]

        start = [_Branch([], (), False, 1.0)]
        return self._expand(
            call, start, self._values_per_draw(call, start[0]), most_rows
        )

    def step(self, states: list[_Branch], most_rows: int) -> list[_Branch]:
        """The branches after one more forward pass."""

        def call(now, forced_CJ):
            state = self._state(now)
            keys = dataclasses.replace(
                state.keys,
                forced_BJ=forced_CJ,
                log_prob_B=jax.device_put(*self._zeros_C),
            )
            state = dataclasses.replace(state, keys=keys)
            return self._advance(self._params, state, np.int32(1))

        if self._step_values is None:
            self._step_values = self._values_per_draw(call, states[0])
        return self._expand(call, states, self._step_values, most_rows)

    def _values_per_draw(self, call, state: _Branch) -> list[int]:
        """The number of values of each draw of a forward pass; 1 past the last draw.

        A draw that is forced to a value it cannot have makes the probability of its row
        NaN, and a draw that is never made does nothing.
        """
        values = [*range(1, self._ranks), _NO_RANK]
        asked = list(itertools.product(range(self._j), values))
        forced = np.zeros((len(asked), self._j), np.int32)
        for row, (j, value) in enumerate(asked):
            forced[row, j] = value
        spoiled = set()
        for start in range(0, len(asked), self._c):
            now = asked[start : start + self._c]
            state_out = self._call(call, [state] * len(now), forced[start:][: len(now)])
            log_prob_C = np.asarray(state_out.keys.log_prob_B)[: len(now)]
            spoiled |= {x for x, p in zip(now, log_prob_C, strict=True) if np.isnan(p)}
        return [
            1 + sum((j, v) not in spoiled for v in values[:-1])
            if (j, _NO_RANK) in spoiled
            else 1
            for j in range(self._j)
        ]

    def _call(self, call, states: list[_Branch], forced: np.ndarray):
        """Runs a branch a row with prescribed draws; more rows fill up the batch."""
        spare = self._c - len(states)
        forced_CJ = np.pad(forced, ((0, spare), (0, 0)))
        return call([*states, *[states[0]] * spare], put(forced_CJ))

    def _expand(self, call, states, values: list[int], most_rows: int) -> list[_Branch]:
        """The branches after a forward pass, with every value of every draw."""
        count = len(states) * int(np.prod(values, dtype=np.float64))
        if count > most_rows:
            raise TooManyDraws(f"{count} rows")
        self.rows += count
        merged: dict[Any, _Branch] = {}
        work = itertools.product(states, itertools.product(*map(range, values)))
        while batch := list(itertools.islice(work, self._c)):
            forced = np.array([ranks for _, ranks in batch], np.int32)
            out = self._call(call, [state for state, _ in batch], forced)
            self._merge(merged, out, [state.prob for state, _ in batch])
        return list(merged.values())

    def _merge(self, merged: dict[Any, _Branch], out, before: list[float]) -> None:
        """Adds the rows of a state, those that go on alike as one branch."""
        p = len(self._prompt)
        tokens_CE, length_C = np.asarray(out.tokens_BE), np.asarray(out.length_B)
        done_C, log_prob_C = np.asarray(out.done_B), np.asarray(out.keys.log_prob_B)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(out)]
        carry = [np.asarray(x) for x in jax.tree.leaves(out.carry)]
        self._last = leaves  # for what is the same in all rows
        for b, prob in enumerate(before):
            prob = prob * float(np.exp(np.float64(log_prob_C[b])))
            if not prob > 0:  # a value that a draw cannot have
                continue
            text = tuple(tokens_CE[b, p : length_C[b]].tolist())
            done = bool(done_C[b])
            key = (text, done, () if done else tuple(_key(x[b]) for x in carry))
            if key in merged:
                merged[key].prob += prob
            else:
                row = [] if done else [x[b] for x in leaves if x.ndim]
                merged[key] = _Branch(row, text, done, prob)

    def _state(self, states: list[_Branch]):
        """The `DecodeState` of some branches, on the devices."""
        rows = zip(*(state.row for state in states), strict=True)
        leaves = [np.stack(next(rows)) if x.ndim else x for x in self._last]
        placed = map(jax.device_put, leaves, self._shardings)
        return jax.tree.unflatten(self._structure, placed)


def _key(x: np.ndarray) -> bytes:
    """A key that is equal for carries that are equal but for rounding."""
    return (np.round(x, 3) + 0.0 if x.dtype.kind == "f" else x).tobytes()


def _whole(count: int, shards: int) -> int:
    """The first multiple of `shards` that is at least `count`."""
    return -(-count // shards) * shards
