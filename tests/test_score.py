"""Scores of tokens, against NumPy in float64 and against transformers."""

import json

import jax
import naive
import naive_heads
import numpy as np
import pytest
from head_cases import OPTIONS, model_of
from llamas import FOLDER, MODEL, restored, stories_in_transformers, stories_params
from models import TINY, mesh_of, placed_params, random_params

from mtp_jax.data.positions import positions_of
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.score import (
    context_and_continuation,
    rolling_windows,
    score_continuations,
    score_text,
)

PAIRS = [
    ([1, 5, 9], [3, 7]),
    ([1, 2], [4]),
    ([1, *range(2, 30)], [6, 6, 31, 0, 2]),
    ([1, 5, 9], [3, 7]),
    ([1, 30, 29, 28], list(range(20))),
]


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def naive_scores(cfg, params, context, after, head):
    """Log-probabilities, ranks and best tokens by the definition, float64."""
    tokens = np.array([[*context, *after]])
    segments = np.ones_like(tokens)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    logits = naive.all_logits(cfg, wide, tokens, segments, positions_of(segments))
    found = []
    for place in range(len(context), tokens.shape[1]):
        of_place = logits[head - 1, 0, place - head]
        target = tokens[0, place]
        rank = 1 + int((of_place > of_place[target]).sum())
        found.append((log_softmax(of_place)[target], rank, int(of_place.argmax())))
    return [np.array(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("head", [1, 2])
def test_scores_are_those_of_numpy_on_any_mesh(axes, head):
    mesh = mesh_of(*axes)
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        model = restored(TINY, placed_params(TINY, params), mesh, ByteTokenizer(), 64)

    found = score_continuations(model, PAIRS, head=head, batch_size=3)

    for (context, after), scores in zip(PAIRS, found, strict=True):
        log_probs, ranks, best = naive_scores(TINY, params, context, after, head)
        np.testing.assert_allclose(scores.log_probs, log_probs, atol=1e-4)
        np.testing.assert_array_equal(scores.ranks, ranks)
        np.testing.assert_array_equal(scores.best, best)
        np.testing.assert_array_equal(scores.tokens, after)
        assert scores.log_prob == pytest.approx(log_probs.sum(), abs=1e-3)
        assert scores.greedy == (list(best) == list(after))


@pytest.mark.parametrize("name", OPTIONS)
def test_heads_of_every_kind_have_scores(name, one_device):
    cfg = model_of(name)
    params = random_params(cfg)
    model = restored(cfg, placed_params(cfg, params), one_device, ByteTokenizer(), 64)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    context, after = [1, 5, 9, 12], [3, 7, 30, 2, 2]
    tokens = np.array([[*context, *after]])
    segments = np.ones_like(tokens)
    before = np.stack([np.pad(tokens[:, i:], ((0, 0), (0, i))) for i in range(4)])
    rows = (tokens, segments, positions_of(segments))
    logits_NTV = naive_heads.all_logits(cfg, wide, rows, before)[:, 0]

    for head in (1, 3, 4):
        [scores] = score_continuations(model, [(context, after)], head=head)

        places = np.arange(len(context), tokens.shape[1])
        expected = log_softmax(logits_NTV[head - 1, places - head])
        np.testing.assert_allclose(
            scores.log_probs, expected[np.arange(len(after)), after], atol=1e-4
        )
        np.testing.assert_array_equal(scores.best, expected.argmax(-1))


def test_the_greedy_text_is_known_as_such(one_device):
    params = placed_params(TINY, random_params(TINY))
    model = restored(TINY, params, one_device, ByteTokenizer(), 64)
    context, after = [1, 5], []
    for _ in range(4):
        [scores] = score_continuations(model, [([*context, *after], [0])])
        after.append(int(scores.best[0]))

    right, wrong = score_continuations(
        model, [(context, after), (context, [*after[:-1], (after[-1] + 1) % 32])]
    )

    assert right.greedy and set(right.ranks) == {1}
    assert not wrong.greedy and wrong.ranks[-1] > 1


def test_long_contexts_are_cut_from_the_left(one_device):
    params = placed_params(TINY, random_params(TINY))
    model = restored(TINY, params, one_device, ByteTokenizer(), 64)
    long = [1, *(np.arange(99) % 32)]

    [cut] = score_continuations(model, [(long, [3, 4])], max_tokens=16)
    [same] = score_continuations(model, [(long[-15:], [3, 4])])

    np.testing.assert_allclose(cut.log_probs, same.log_probs, atol=1e-5)


def test_ids_that_no_token_has_are_never_the_best(one_device):
    class Few(ByteTokenizer):
        vocab_size = 8

    params = placed_params(TINY, random_params(TINY))
    model = restored(TINY, params, one_device, Few(), 64)

    scores = score_continuations(
        model, [([1, i], [j]) for i in range(8) for j in (2, 3)]
    )

    assert max(int(s.best[0]) for s in scores) < 8
    assert max(int(s.ranks[0]) for s in scores) <= 8


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_windows_predict_every_token_once(length):
    ids = np.arange(100, 100 + length)

    windows = list(rolling_windows(ids, 1, 8))

    assert np.concatenate([after for _, after in windows]).tolist() == ids.tolist()
    text = np.concatenate([[1], ids])
    for context, after in windows:
        both = np.concatenate([context, after]).tolist()
        start = text.tolist().index(both[0])
        assert text[start : start + len(both)].tolist() == both
        assert len(both) <= 9 and len(context) >= 1
    # All but the first have as much context as there is room for.
    assert all(len(c) + len(a) == 9 for c, a in windows[1:])


def test_rolling_scores_are_those_of_each_window(one_device):
    params = random_params(TINY)
    model = restored(TINY, placed_params(TINY, params), one_device, ByteTokenizer(), 8)
    model.tokenizer.bos_id = 1
    ids = np.random.default_rng(0).integers(0, 32, 21)

    scores = score_text(model, ids, batch_size=2)

    expected = [
        naive_scores(TINY, params, context.tolist(), after.tolist(), 1)[0]
        for context, after in rolling_windows(ids, 1, 8)
    ]
    np.testing.assert_allclose(scores.log_probs, np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("pair", "head", "message"),
    [
        (([1], []), 1, "has 0 tokens; it can have 1 to 64"),
        (([1], [2] * 65), 1, "has 65 tokens; it can have 1 to 64"),
        (([1], [2]), 2, "head 2 reads at least 2"),
        (([], [2]), 1, "head 1 reads at least 1"),
        (([1], [32]), 1, "the model knows 0 to 31"),
        (([1], [2]), 3, "head is 3; the model has 1 to 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(one_device, pair, head, message):
    params = placed_params(TINY, random_params(TINY))
    model = restored(TINY, params, one_device, ByteTokenizer(), 64)

    with pytest.raises(UserError, match=message):
        score_continuations(model, [pair], head=head)


def test_a_token_is_never_cut():
    def encode(text):  # pairs of letters are tokens
        return [hash(text[i : i + 2]) % 1000 for i in range(0, len(text), 2)]

    context, after = context_and_continuation(encode, 1, "abc ", "de")

    assert context.tolist() == [1, *encode("abc")]
    assert after.tolist() == encode("abc de")[2:]
    assert context_and_continuation(encode, 1, "", "de")[0].tolist() == [1]


def test_scores_of_a_real_model_are_those_of_its_known_answers(one_device):
    model = restored(MODEL, placed_params(MODEL, stories_params()), one_device)
    known = json.loads((FOLDER / "known_answers.json").read_text())
    ids = known["greedy_from_bos_ids"]

    [greedy] = score_continuations(model, [(ids[:1], ids[1:])])
    [every] = [
        score_continuations(model, [(known["prompt_ids"], [i]) for i in range(512)])
    ]

    assert greedy.greedy
    expected = log_softmax(np.array(known["logits_after_prompt"], np.float64))
    np.testing.assert_allclose([s.log_prob for s in every], expected, atol=1e-4)


@pytest.mark.packages
def test_scores_of_a_real_model_are_those_of_transformers(one_device):
    llama = stories_in_transformers()
    import torch

    model = restored(MODEL, placed_params(MODEL, stories_params()), one_device)
    rng = np.random.default_rng(0)
    ids = json.loads((FOLDER / "known_answers.json").read_text())["greedy_from_bos_ids"]
    pairs = [(ids[:n], ids[n : n + 20]) for n in (1, 17, 60, 130, 200)]
    pairs += [(ids[:n], rng.integers(3, 512, 9).tolist()) for n in (5, 50, 100)]

    for (context, after), scores in zip(
        pairs, score_continuations(model, pairs, batch_size=4), strict=True
    ):
        with torch.no_grad():
            logits = (
                llama(torch.tensor([[*context, *after]])).logits[0].double().numpy()
            )
        log_probs = log_softmax(logits[len(context) - 1 : -1])
        expected = log_probs[np.arange(len(after)), after]
        np.testing.assert_allclose(scores.log_probs, expected, atol=1e-4)
        np.testing.assert_array_equal(scores.best, log_probs.argmax(-1))
