"""The verb `verify`: it passes what is exact and fails what is not."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats
from models import mesh_of, placed_params, random_params

from mtp_jax.checkpoint import restore
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.cli import verify
from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.generation import Generation
from mtp_jax.errors import UserError
from mtp_jax.verification import subject
from mtp_jax.verification.greedy import first_difference
from mtp_jax.verification.sampling_checks import sampling_checks
from mtp_jax.verification.sampling_tests import Trusting, chi_square
from mtp_jax.verification.settings import VerifySettings
from mtp_jax.verification.subject import Subject

MODEL = ModelConfig(
    d_model=16,
    num_layers=3,
    n_future_tokens=2,
    num_query_heads=2,
    num_kv_heads=2,
    d_head=8,
    d_ff=16,
)
FEW = ["--workdir=run", "--heldout=2", "--prompt_tokens=3,6", "--max_new_tokens=12",
       "--batch_sizes=1,2", "--law_prompts=1", "--samples=256"]  # fmt: skip


@pytest.fixture
def restored(monkeypatch):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        params = placed_params(MODEL, random_params(MODEL))
    config = Config(model=MODEL, data=DataConfig(sources=("corpus",)))

    def restore_model(workdir, *, step=None, heads=None):
        cfg = config if heads is None else config.keep_heads(heads)
        return Restored(cfg, params, mesh, 7, ByteTokenizer())

    def heldout_prompts(sources, count, tokens):
        return [np.arange(65, 65 + tokens, dtype=np.int32) + i for i in range(count)]

    monkeypatch.setattr("mtp_jax.checkpoint.restore.restore_model", restore_model)
    monkeypatch.setattr(subject, "heldout_prompts", heldout_prompts)


def test_exact_decoders_pass_and_what_is_lossy_is_left_out(
    restored, capsys, monkeypatch
):
    lossy = dataclasses.make_dataclass("Lossy", [], bases=(Trusting,), frozen=True)
    lossy.lossy = True
    only = {name: DECODERS[name] for name in ("plain", "speculative", "dynamo_exact")}
    monkeypatch.setattr("mtp_jax.decode.fitting.DECODERS", {**only, "lossy": lossy})

    assert verify.main(FEW) == 0

    out = capsys.readouterr().out
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["equal", "texts", "speculative", "batch"] in rows
    assert out.count("0 differ, 0 at near-ties") == 3  # plain at another size, too
    assert out.count("caught") == 3 and "not caught" not in out
    assert (
        "left out: lossy" in out
        and "left out: dynamo_exact (counts" in out
        and "drafting changes nothing" in out
    )


def test_a_broken_decoder_fails_and_is_told_where(restored, capsys, monkeypatch):
    monkeypatch.setitem(DECODERS, "broken", Trusting)

    assert verify.main([*FEW, "--json", "--decoder=broken"]) == 1

    result = json.loads(capsys.readouterr().out)
    by_decoder = {}
    for check in result["checks"]:
        by_decoder.setdefault(check["decoder"], []).append(check)
    assert not result["ok"]
    assert len(by_decoder["broken"]) == 4  # two sizes, the law, the samples
    assert not any(check["ok"] for check in by_decoder["broken"])
    assert all(check["ok"] for check in by_decoder["plain"])
    difference = by_decoder["broken"][0]["differences"][0]
    assert difference["gap"] > 0 and not difference["near_tie"]
    assert difference["plain"] != difference["other"]


def test_distributions_are_compared_where_head_one_is_least_sure(restored, monkeypatch):
    sure, even = {(65, 66, 67): 0.999, (65, 66, 68): 0.001}, {(65,): 0.5, (66,): 0.5}
    found = [sure, even, {(65,): 0.9, (66,): 0.1}]
    monkeypatch.setattr(Subject, "_distribution", lambda self, i, sampling: found[i])
    settings = VerifySettings(prompts=3, prompt_tokens=(3,), samples=4)
    subject = Subject(restore.restore_model("run"), {"plain": Plain()}, settings)
    asked = []

    def generate(prompts, **options):
        asked.append({tuple(p.tolist()) for p in prompts})
        return [written([65, 66, 67])] * len(prompts)

    monkeypatch.setattr(subject.generator, "generate", generate)

    list(sampling_checks(subject))

    assert subject.open_prompts == [1, 2, 0]
    assert asked == [{tuple(subject.prompts[1].tolist())}]


def test_what_is_lossy_alone_is_refused(restored):
    with pytest.raises(UserError, match="--decoder=typical is lossy"):
        verify.main([*FEW, "--decoder=typical"])


def test_too_few_samples_are_said_to_be(restored, capsys, monkeypatch):
    """One text of any law is as likely as it is: nothing can be noticed."""
    monkeypatch.setattr(Subject, "open_prompts", [0])
    assert verify.main([*FEW, "--decoder=speculative", "--samples=1"]) == 1

    assert "too few --samples to notice" in capsys.readouterr().out


def test_a_model_of_one_head_has_nothing_to_verify(restored):
    with pytest.raises(UserError, match="one head"):
        verify.main([*FEW, "--heads=1"])


def written(tokens, finish="length"):
    return Generation("", "", tokens, [], [], 1, 1.0, [], 1.0, finish)


def test_where_two_texts_part():
    asked = []

    def next_logits(rows):
        asked.append([list(row) for row in rows])
        return np.array([[0.0, 2.0, 1.99995, -1.0, 1.0]], np.float32)

    def parts(a, b, **finish):
        return first_difference(3, [9, 8], a, b, 4, next_logits, 1e-4)

    assert parts(written([1, 2]), written([1, 2])) is None and not asked
    near = parts(written([0, 1]), written([0, 2]))
    assert (near.prompt, near.position, near.plain, near.other) == (3, 1, 1, 2)
    assert near.near_tie and near.gap == pytest.approx(5e-5, rel=0.1)
    assert asked == [[[9, 8, 0]]]
    far = parts(written([0, 3]), written([0, 1]))
    assert far.gap == pytest.approx(-3) and not far.near_tie
    ended = parts(written([0, 1]), written([0], "eos"))
    assert (ended.plain, ended.other) == (1, 4) and ended.gap == pytest.approx(1)
    short = parts(written([0, 1]), written([0]))
    assert (short.position, short.plain, short.other) == (1, 1, None)
    assert short.gap is None and not short.near_tie
    assert parts(written([1]), written([1], "stop")).position == 1


def test_two_tokens_far_from_the_best_are_no_near_tie():
    logits = np.array([[5.0, 1.0, 1.0]], np.float32)
    found = first_difference(0, [0], written([1]), written([2]), 9, lambda _: logits, 1)
    assert found.gap == 0 and not found.near_tie


def test_chi_square_is_that_of_scipy():
    distribution = {(0,): 0.5, (1,): 0.3, (2,): 0.2}
    texts = [(0,)] * 60 + [(1,)] * 25 + [(2,)] * 15
    test = chi_square(texts, distribution)
    expected = scipy.stats.chisquare([60, 25, 15], [50, 30, 20])
    assert test.statistic == pytest.approx(expected.statistic)
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    assert test.freedom == 2


def test_rare_texts_share_a_cell():
    distribution = {(0,): 0.9, **{(i,): 0.01 for i in range(1, 11)}}
    texts = [(0,)] * 80 + [(i,) for i in range(1, 11)] * 2
    test = chi_square(texts, distribution)
    expected = scipy.stats.chisquare([80, 20], [90, 10])
    assert (test.freedom, test.statistic) == (1, pytest.approx(expected.statistic))


def test_a_text_that_cannot_be_has_no_chance():
    assert chi_square([(0,), (1,)], {(0,): 1.0}).p_value == 0
    assert chi_square([(0,)] * 9, {(0,): 1.0}).p_value == 1


def test_p_values_of_right_distributions_are_spread_evenly():
    rng = np.random.default_rng(0)
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    distribution = {(i,): p for i, p in enumerate(probs)}
    draws = [rng.choice(4, 200, p=probs) for _ in range(200)]
    p_values = [
        chi_square([(int(i),) for i in draw], distribution).p_value for draw in draws
    ]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
