"""How many heads are used changes how fast a text is made, and nothing else."""

import itertools

import jax
import numpy as np
import pytest
from test_decode import NEW, Letters, case, expected, init, one_device

from mtp_jax.decode.adaptive import DepthChooser, _entropy
from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.programs import Programs
from mtp_jax.parallel.sharding import spec


@pytest.fixture
def restless(monkeypatch):
    """A depth of its own for every two forward passes."""
    depths = itertools.cycle([4, 1, 1, 2, 1, 4, 2])
    monkeypatch.setattr(DepthChooser, "depth", lambda self: next(depths))
    monkeypatch.setattr(DepthChooser, "passes", lambda self: 2)
    monkeypatch.setattr(DepthChooser, "stays_alone", lambda self, tokens: False)


@pytest.mark.parametrize("decoder", ["blockwise", "speculative", "tree"])
@pytest.mark.parametrize("alone", [False, True])
def test_any_change_of_depth_gives_the_same_text(restless, monkeypatch, decoder, alone):
    monkeypatch.setattr(DepthChooser, "leaves_heads", lambda self: alone)
    c = case(4, 5)
    results = c.generator.generate(
        c.prompts, max_new_tokens=NEW, decoder=decoder, adaptive=True
    )
    for result, text in zip(results, c.texts, strict=True):
        assert (result.tokens, result.finish) == expected(text, c.eos_id)
    assert any(1 < r.tokens_per_forward < 4 for r in results)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_caches_are_what_reading_the_text_at_once_would_make(
    restless, monkeypatch, adaptive, alone
):
    monkeypatch.setattr(DepthChooser, "leaves_heads", lambda self: alone)
    c = case(4, 5)
    rows = [np.concatenate([[0], p]).astype(np.int32) for p in c.prompts]
    nothing_ends = Letters(eos_id=-1)
    programs = Programs(c.cfg, nothing_ends.eos_id)
    blockwise = DECODERS["blockwise"]()
    with jax.set_mesh(c.generator.mesh):
        params = unstack(c.cfg, init(c.cfg, c.generator.mesh))
        batch = DecodeBatch(
            programs, params, blockwise, rows, 40, Sampling(), adaptive=adaptive
        )
        batch.begin()
        texts = batch.advance(11)
        batch._use_heads(True)  # they catch up, if they are behind
        made = jax.device_get(batch._state.cache)
        read = [
            t[: n - 1] for t, n in zip(texts.tokens_BE, texts.length_B, strict=True)
        ]
        again = DecodeBatch(programs, params, blockwise, read, 1, Sampling())
        again.begin()
        fresh = jax.device_get(again._state.cache)
    assert len(made.k_BGSK) == c.cfg.num_layers
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(fresh), strict=True):
        for b, row in enumerate(read):
            np.testing.assert_allclose(
                ours[b, :, : len(row)], theirs[b, :, : len(row)], atol=1e-5
            )


def test_texts_of_one_token_leave_nothing_to_choose():
    c = case(4, 5)
    results = c.generator.generate(c.prompts, max_new_tokens=1, adaptive=True)
    assert all(r.forwards == 1 for r in results)


def test_a_full_cache_does_not_make_a_depth_look_cheap(monkeypatch):
    c = case(4, 5)
    runs = iter([(1, 2.0), (0, 0.001), (4, 8.0), (0, 0.001), (4, 6.0), (4, 8.0)])
    monkeypatch.setattr(DecodeBatch, "_run", lambda self, depth, forwards: next(runs))
    rows = [np.concatenate([[0], p]).astype(np.int32) for p in c.prompts]
    with jax.set_mesh(c.generator.mesh):
        params = unstack(c.cfg, init(c.cfg, c.generator.mesh))
        programs = Programs(c.cfg, c.eos_id)
        batch = DecodeBatch(
            programs, params, DECODERS["blockwise"](), rows, 40, Sampling()
        )
        batch.begin()
        assert batch._pass_s(4) == 1.5


def chooser(cost_s, confidence_M):
    made = DepthChooser(dict(cost_s))
    made.begin(confidence_M)
    return made


def test_heads_that_are_sure_are_used_and_others_are_not():
    cost_s = {1: 1.0, 2: 1.2, 4: 1.5}
    assert chooser(cost_s, [0.95, 0.9, 0.9]).depth() == 4
    assert chooser(cost_s, [0.9, 0.05, 0.05]).depth() == 2
    assert chooser(cost_s, [0.05, 0.05, 0.05]).depth() == 1
    # A pass four times as dear, as with a large batch, is not worth 3.5 tokens.
    assert chooser({1: 1.0, 2: 2.1, 4: 4.0}, [0.95, 0.9, 0.9]).depth() == 1


def test_what_is_seen_outweighs_what_the_heads_say():
    choose = chooser({1: 1.0, 4: 1.5}, [0.95, 0.95, 0.95])
    assert choose.depth() == 4
    for _ in range(6):
        choose.saw(4, np.array([8, 0, 0, 0]), passes=8, seconds=12.0)
    assert choose.depth() == 1


def test_new_texts_begin_without_heads_that_cannot_pay_or_did_not():
    dear = chooser({1: 1.0, 2: 2.1, 4: 4.0}, [0.95, 0.9, 0.9])
    assert dear.leaves_heads()  # however right the drafts may be
    choose = DepthChooser({1: 1.0, 4: 1.5})
    assert not choose.leaves_heads()  # nothing is known yet
    choose.begin([0.2, 0.2, 0.2])
    for _ in range(6):
        choose.saw(4, np.array([8, 0, 0, 0]), passes=8, seconds=12.0)
    assert choose.leaves_heads()
    choose.begin(None)
    assert choose.depth() == 1
    choose.saw(1, np.array([512, 0, 0, 0]), passes=512, seconds=512.0)
    assert not choose.leaves_heads()  # it is time to look again


def test_heads_that_cannot_pay_are_never_asked_again():
    choose = chooser({1: 1.0, 4: 4.0}, [0.9, 0.9, 0.9])
    for _ in range(100):
        assert choose.depth() == 1
        choose.saw(1, np.array([64, 0, 0, 0]), passes=64, seconds=64.0)


def test_heads_are_asked_again_ever_more_rarely():
    choose = chooser({1: 1.0, 4: 1.5}, [0.1, 0.1, 0.1])
    waits, wait = [], 0
    while len(waits) < 3:
        if choose.depth() == 1:
            choose.saw(1, np.array([4, 0, 0, 0]), passes=4, seconds=4.0)
            wait += 4
        else:
            choose.saw(4, np.array([4, 0, 0, 0]), passes=4, seconds=6.0)
            waits, wait = [*waits, wait], 0
    assert waits == [512, 1024, 2048]


def test_a_text_that_becomes_calm_is_drafted_again():
    choose = chooser({1: 1.0, 4: 1.5}, [0.1, 0.1, 0.1])
    choose.saw(1, np.array([8, 0, 0, 0]), passes=8, seconds=8.0)
    choose.saw_entropy(2.0)
    choose.saw(1, np.array([40, 0, 0, 0]), passes=40, seconds=40.0)
    choose.saw_entropy(1.9)
    assert choose.depth() == 1
    choose.saw_entropy(0.5)
    assert choose.depth() == 4


def test_costs_follow_what_passes_take():
    choose = chooser({1: 1.0, 4: 1.5}, [0.9, 0.9, 0.9])
    assert choose.depth() == 4
    # Ten times as slow as at first: at every depth, as far as is known ...
    for _ in range(10):
        choose.saw(4, np.array([0, 0, 0, 4]), passes=4, seconds=60.0)
    assert choose.cost_s[1] > 2.0
    # ... until depth 1 is tried and is as fast as ever.
    for _ in range(10):
        choose.saw(1, np.array([4, 0, 0, 0]), passes=4, seconds=4.0)
    assert choose.cost_s[4] / choose.cost_s[1] > 3.0 and choose.depth() == 1


def test_asking_again_is_brief_and_waits_until_it_costs_little():
    choose = chooser({1: 1e-4, 4: 1.5e-4}, [0.1, 0.1, 0.1])
    asked, passes = [], 0
    while passes < 60_000:
        if choose.depth() == 1:
            choose.saw(1, np.array([100, 0, 0, 0]), passes=100, seconds=0.01)
            passes += 100
        else:
            asked.append((passes, choose.passes()))
            choose.saw(4, np.array([16, 0, 0, 0]), passes=16, seconds=0.0024)
    # Once a second, which is 10000 passes, and not after 512 or 4096.
    assert [n for _, n in asked] == [16] * len(asked)
    waits = np.diff([0] + [at for at, _ in asked])
    assert len(asked) == 5 and min(waits) >= 9_900 and max(waits) <= 10_200


def test_texts_that_end_before_heads_could_be_asked_stay_alone():
    choose = DepthChooser({1: 1e-4, 4: 1.5e-4})
    assert not choose.stays_alone(100)  # nothing is known yet
    choose.begin([0.2, 0.2, 0.2])
    for _ in range(6):
        choose.saw(4, np.array([8, 0, 0, 0]), passes=8, seconds=0.0012)
    assert choose.stays_alone(9_000) and not choose.stays_alone(11_000)
    choose.saw(1, np.array([9_900]), passes=9_900, seconds=0.99)
    assert choose.stays_alone(90) and not choose.stays_alone(200)
    dear = chooser({1: 1.0, 4: 4.0}, [0.9, 0.9, 0.9])
    assert dear.stays_alone(1_000_000)  # they cannot pay


@pytest.mark.parametrize("decoder", ["blockwise", "speculative", "tree"])
def test_a_text_that_stays_alone_is_plains_and_is_told_of(monkeypatch, decoder):
    monkeypatch.setattr(DepthChooser, "stays_alone", lambda self, tokens: True)
    told = []
    monkeypatch.setattr(DepthChooser, "saw", lambda self, *args: told.append(args))
    c = case(4, 5)
    results = c.generator.generate(
        c.prompts, max_new_tokens=NEW, decoder=decoder, adaptive=True
    )
    for result, text in zip(results, c.texts, strict=True):
        assert (result.tokens, result.finish) == expected(text, c.eos_id)
        assert result.tokens_per_forward == 1
    assert {depth for depth, *_ in told} == {1}
    assert sum(passes for _, _, passes, _ in told) == NEW - 1


def test_the_min_entropy_is_that_of_the_largest_probability():
    logits_BWV = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    p_BWV = np.exp(logits_BWV.astype(np.float64))
    p_BWV /= p_BWV.sum(axis=-1, keepdims=True)
    with jax.set_mesh(one_device()):
        found_BW = _entropy(jax.device_put(logits_BWV, spec("batch", None, "vocab")))
    np.testing.assert_allclose(found_BW, -np.log(p_BWV.max(axis=-1)), atol=1e-6)


def test_at_depth_1_the_entropy_is_that_of_the_text_from_the_first_pass_on():
    c = case(4, 5)
    row = np.concatenate([[0], c.prompts[0]]).astype(np.int32)
    with jax.set_mesh(one_device()):
        params = unstack(c.cfg, init(c.cfg, one_device()))
        programs = Programs(c.cfg, -1)
        batch = DecodeBatch(
            programs, params, DECODERS["blockwise"](), [row], 8, Sampling()
        )
        batch._begin = batch._begun(alone=True)[0]
        batch.begin()
        found = []
        for _ in range(3):
            before = float(batch._state.alone.entropy)
            batch._run(4, 1)
            found.append((before, float(batch._state.alone.entropy)))
    assert found[0][0] == -1 and 0 < found[0][1] < np.log(c.cfg.vocab_size)
    for before, after in found[1:]:
        # A mean of what was and of one more, which lies between 0 and log V.
        assert 0.9 * before < after < 0.9 * before + 0.1 * np.log(c.cfg.vocab_size)


def test_what_texts_have_shown_holds_for_the_next_ones():
    choose = chooser({1: 1.0, 4: 1.5}, [0.9, 0.9, 0.9])
    for _ in range(6):
        choose.saw(4, np.array([8, 0, 0, 0]), passes=8, seconds=12.0)
    choose.begin([0.9, 0.9, 0.9])
    assert choose.depth() == 1
    for _ in range(4):
        choose.begin([0.9, 0.9, 0.9])
    assert choose.depth() == 4  # long ago


def test_looks_become_rare_while_nothing_changes():
    choose = chooser({1: 0.001, 4: 0.0015}, [0.1, 0.1, 0.1])
    found = []
    for _ in range(8):
        choose.depth()
        found.append(choose.passes())
    assert found[0] == 30 and found[-1] == 250 and sorted(found) == found
    for _ in range(6):
        choose.saw(4, np.array([0, 0, 0, 8]), passes=8, seconds=0.012)
    assert choose.depth() == 4 and choose.passes() == 20
    choose.begin([0.9, 0.9, 0.9])
    assert choose.depth() == 4 and choose.passes() == 4  # of the first drafts
