"""Studies: what goes on, what is refused, and verdicts by their rule."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from runs import complete, kill, records, start

from mtp_jax.config import config_to_json
from mtp_jax.errors import UserError
from mtp_jax.run.gradients import helping, mean_cosines
from mtp_jax.studies import STUDIES, curricula, head_kinds, runner
from mtp_jax.studies.study import (
    Claim,
    Study,
    Trial,
    difference,
    distance,
    figure_of,
    find_study,
    judge,
    quotient,
)


def by_seed(a, b):
    return {
        seed: {"a": {"x": p}, "b": {"x": q}}
        for seed, (p, q) in enumerate(zip(a, b, strict=True))
    }


def claim(side, than=0.0, of=None):
    return Claim(
        says="a differs", of=of or difference("a", "b", "x"), side=side, than=than
    )


@pytest.mark.parametrize(
    ("apart", "side", "than", "verdict"),
    [
        ([1.0, 2.0, 3.0], "above", 0.0, "reproduced"),
        ([1.0, 2.0, 3.0], "below", 0.0, "refuted"),
        ([1.0, -2.0, 3.0], "above", 0.0, "not decided"),
        ([1.0, -2.0, 3.0], "below", 0.0, "not decided"),
        ([1.0, 2.0], "above", 0.0, "not decided"),
        ([1.0, 2.0, 3.0], "above", 4.0, "refuted"),
        ([1.0, 2.0, 3.0], "below", 4.0, "reproduced"),
        ([-1.0, -2.0, -3.0], "below", -0.5, "reproduced"),
        ([-1.0, -2.0, -3.0], "above", -0.5, "refuted"),
    ],
)
def test_a_verdict_follows_its_rule(apart, side, than, verdict):
    base = np.array([100.0, -50.0, 7.0])[: len(apart)]  # seeds differ more than arms

    judged = judge(claim(side, than), by_seed(base + apart, base))

    assert judged.verdict == verdict
    assert judged.seeds == len(apart)
    assert math.isclose(judged.mean, np.mean(apart), abs_tol=1e-9)


def test_the_interval_is_that_of_resampled_seeds():
    apart = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8])
    judged = judge(claim("above"), by_seed(apart, np.zeros(7)))

    rng = np.random.default_rng(5)
    means = rng.choice(apart, (40_000, 7)).mean(axis=1)
    np.testing.assert_allclose(
        (judged.low, judged.high), np.quantile(means, (0.025, 0.975)), atol=0.015
    )


def test_what_claims_read():
    [arms] = by_seed([3.0], [-2.0]).values()

    assert difference("b", "a", "x")(arms) == -5.0
    assert distance("b", "a", "x")(arms) == 5.0
    assert quotient("a", "b", "x")(arms) == -1.5
    assert figure_of("b", "x")(arms) == -2.0


def test_seeds_without_all_arms_do_not_count():
    figures = by_seed([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    del figures[1]["b"]
    figures[2]["a"] = {}

    judged = judge(claim("above"), figures)

    assert (judged.seeds, judged.mean, judged.verdict) == (1, 1.0, "not decided")
    assert judge(claim("above"), {}).seeds == 0


@pytest.fixture
def toy(monkeypatch):
    """A study of arithmetic; the list of trials that were measured; when to fail."""
    calls, fail_at = [], []

    def measure(trial):
        if len(calls) in fail_at:
            fail_at.clear()
            raise KeyboardInterrupt
        calls.append((trial.arm, trial.seed))
        scale = {"a": 1, "b, much": 10, "c": 2}[trial.arm]
        return {"x": scale * (trial.seed + 1.5) + (trial.steps or 0), "curve": [1, 2]}

    made = Study(
        about="x of each arm.",
        arms=lambda size: ("a", "b, much"),
        more_arms=("c",),
        measure=measure,
        shown=("x",),
        base="a",
        claims=(claim("above", of=difference("b, much", "a", "x")),),
        seeds=lambda size: 3,
    )
    monkeypatch.setattr(runner, "find_study", lambda name: made)
    return calls, fail_at


def without_seconds(folder):
    return [
        {k: v for k, v in row.items() if k != "seconds"}
        for row in records(folder, "toy.jsonl")
    ]


def test_a_study_that_was_stopped_goes_on_to_the_same_numbers(toy, tmp_path):
    calls, fail_at = toy
    whole = runner.study("toy", tmp_path / "whole")
    calls.clear()
    fail_at.append(4)

    with pytest.raises(KeyboardInterrupt):
        runner.study("toy", tmp_path / "parts")
    done = list(calls)
    assert len(records(tmp_path / "parts", "toy.jsonl")) == 4
    parts = runner.study("toy", tmp_path / "parts")

    assert len(done) == 4 and len(calls) == 6 and len(set(calls)) == 6
    assert without_seconds(tmp_path / "parts") == without_seconds(tmp_path / "whole")
    assert [j.verdict for j in parts.verdicts] == ["reproduced"]
    assert dataclasses.replace(parts.verdicts[0], claim=None) == dataclasses.replace(
        whole.verdicts[0], claim=None
    )
    assert (tmp_path / "parts" / "toy.md").read_text() == parts.page


def test_arms_can_come_one_by_one_and_seeds_later(toy, tmp_path):
    calls, _ = toy
    runner.study("toy", tmp_path, arms=["b, much"], seeds=1)
    runner.study("toy", tmp_path, arms=["c"], seeds=2)
    runner.study("toy", tmp_path)

    assert len(calls) == len(set(calls)) == 8
    rows = records(tmp_path, "toy.jsonl")
    assert [(row["seed"], row["arm"]) for row in rows] == [
        *[(0, "a"), (0, "b, much"), (0, "c"), (1, "a"), (1, "b, much"), (1, "c")],
        *[(2, "a"), (2, "b, much")],
    ]
    assert rows[0]["figures"] == {"x": 1.5, "curve": [1, 2]}


def test_the_page_tells_means_differences_and_verdicts(toy, tmp_path):
    page = runner.study("toy", tmp_path).page

    lines = [line.split("|") for line in page.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert ["a", "3", "2.5000 (1.5000..3.5000)"] in cells
    assert ["b, much", "3", "22.5000 (13.5000..31.5000)"] in cells
    assert cells[-1][-1] == "reproduced" and cells[-1][1] == "above 0"
    tables = [part.split() and part.splitlines() for part in page.split("\n\n")]
    aligned = [{len(line) for line in table} for table in tables if "|" in table[0]]
    assert [len(lengths) for lengths in aligned] == [1, 1, 1]


def test_a_workdir_of_something_else_is_refused(toy, tmp_path):
    runner.study("toy", tmp_path, seeds=1)

    for name, options, said in [
        ("other", {}, "begun with study toy"),
        ("toy", {"size": "full"}, "begun with size quick"),
        ("toy", {"steps": 5}, "begun with steps None"),
        ("toy", {"data": ["corpus"]}, "begun with data"),
    ]:
        with pytest.raises(UserError, match=said):
            runner.study(name, tmp_path, **options)
    with pytest.raises(UserError, match="'d' is not an arm of toy; there are: a; b, m"):
        runner.study("toy", tmp_path, arms=["d"])
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="not a study's"):
        runner.study("toy", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        runner.study("toy", tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        runner.study("toy", tmp_path / "run")


def test_damaged_figures_are_named(toy, tmp_path):
    runner.study("toy", tmp_path, seeds=1)
    (tmp_path / "a-seed0" / "figures.json").write_text("{")

    with pytest.raises(UserError, match=r"a-seed0/figures.json is damaged"):
        runner.study("toy", tmp_path, seeds=1)


def test_no_such_study_is_one_line():
    with pytest.raises(
        UserError, match="'nothing' is not a study; there are identities"
    ):
        find_study("nothing")


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_file_arms_and_claims(name):
    study = find_study(name)

    for size in ("tiny", "quick", "full"):
        arms = study.arms(size)
        assert len(set(arms)) == len(arms) >= 1
        assert set(arms) <= {*study.arms("full"), *study.more_arms}
    folders = {runner._folder_name(arm, 0) for arm in study.arms("full")}
    assert len(folders) == len(study.arms("full"))
    assert study.base in ("", *study.arms("quick")) and study.claims and study.shown
    assert study.seeds("full") >= 3


def trial_of(arm, tmp_path, **changed):
    trial = Trial(
        arm=arm,
        seed=1,
        size="full",
        folder=tmp_path / "trial",
        shared=tmp_path,
        data=("corpus",),
    )
    return dataclasses.replace(trial, **changed)


@pytest.mark.parametrize("study", [curricula, head_kinds])
def test_arms_are_good_configs_of_nearly_equal_parameters(study, tmp_path):
    from mtp_jax.model.sizes import sizes_of

    arms = [*study.STUDY.arms("full"), *study.STUDY.more_arms]
    for size in ("tiny", "quick", "full"):
        configs = [study.config_of(trial_of(arm, tmp_path, size=size)) for arm in arms]
        if size == "full":
            assert len({(c.loss, c.model) for c in configs}) == len(arms)
        assert len({(c.optim, c.train, c.data) for c in configs}) == 1
        usual = configs[: len(study.STUDY.arms("full"))]
        sizes = [sizes_of(c.model).total for c in usual]
        assert size != "full" or max(sizes) / min(sizes) < 1.15


def test_steps_of_a_trial_are_those_that_are_asked_for(tmp_path):
    cfg = curricula.config_of(trial_of("extra targets", tmp_path, steps=90))

    assert cfg.train.steps == 90
    assert [row[0] for row in cfg.loss.extra_targets] == [0, 30, 60]


def test_figures_of_the_benchmark_before_are_taken_over(tmp_path):
    trial = trial_of("serial", tmp_path)
    cfg = head_kinds.config_of(trial)
    trial.folder.mkdir()
    old = {"bits_per_byte": 1.5, "agree": 2.5, "greedy": 2.25, "sampled": 2.0}
    (trial.folder / "study.json").write_text(json.dumps(old))
    run = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1))
    (trial.folder / "run.json").write_text(json.dumps({"config": config_to_json(run)}))

    figures = head_kinds.measure(trial)

    assert {name: figures[name] for name in old} == old
    assert figures["parameters_m"] > 0.5
    for other in ({"arm": "causal"}, {"seed": 2}, {"steps": 7}):
        with pytest.raises(UserError, match="is of another run than"):
            head_kinds.measure(dataclasses.replace(trial, **other))


def test_the_program_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    from mtp_jax import __main__

    for argv, said in [
        (["nothing"], "is not a study"),
        (["curricula", "--arm=nothing", f"--workdir={tmp_path}"], "is not an arm"),
        (["curricula", "--quick", "--full"], "not allowed with"),
        (["curricula", "--seeds=0"], "whole number above 0"),
        ([], "NAME"),
    ]:
        monkeypatch.setattr(sys, "argv", ["mtp-jax", "study", *argv])
        assert __main__.main() == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_numbers(corpus_dir, tmp_path):
    def args(folder):
        return [
            *("study", "curricula", "--tiny", "--steps=4", f"--data={corpus_dir}"),
            *("--arm=static", "--arm=reverse", f"--workdir={tmp_path / folder}"),
        ]

    out = complete(args("whole"))
    process = start(args("parts"))
    while not (tmp_path / "parts" / "static-seed0" / "figures.json").exists():
        assert process.poll() is None, process.communicate()
    kill(process)
    complete(args("parts"))

    def figures(folder):
        rows = records(tmp_path / folder, "curricula.jsonl")
        return {row["arm"]: row["figures"] for row in rows}

    assert figures("parts") == figures("whole") and len(figures("whole")) == 2
    assert "| static" in out and "not decided" in out
    hashes = [
        [row["batch_hash"] for row in records(tmp_path / "whole" / f"{arm}-seed0")]
        for arm in ("static", "reverse")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kinds_of_heads_are_measured(corpus_dir, tmp_path):
    complete(
        [
            *("study", "head_kinds", "--tiny", f"--workdir={tmp_path / 'kinds'}"),
            *("--arm=parallel", "--arm=serial", f"--data={corpus_dir}"),
        ]
    )

    rows = records(tmp_path / "kinds", "head_kinds.jsonl")
    assert [row["arm"] for row in rows] == ["parallel", "serial"]
    for row in rows:
        assert 6 < row["figures"]["bits_per_byte"] < 10
        for name in ("agree", "greedy", "sampled"):
            assert 1.0 <= row["figures"][name] <= 4.0


def test_cosines_are_those_of_the_second_half_of_the_log(tmp_path):
    lines = [
        {"step": step, "gradient/cosine/head_2": 0.1 * step, "loss": 1.0}
        for step in (1, 2, 3, 4, 3, 4)  # a run that went back to step 2
    ]
    lines[-2]["gradient/cosine/head_2"] = 0.5
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "gra'
    (tmp_path / "metrics.jsonl").write_text(text)

    cosines = mean_cosines(tmp_path)

    assert list(cosines) == [2]
    mean, low, high = cosines[2]
    assert math.isclose(mean, (0.5 + 0.4) / 2)
    assert math.isclose(low, 0.4) and math.isclose(high, 0.5)
    assert mean_cosines(tmp_path / "nothing") == {}


def test_a_run_tells_which_heads_help(tmp_path):
    rng = np.random.default_rng(0)
    means = {2: 0.3, 3: -0.2, 4: 0.0}
    lines = [
        {"step": s}
        | {
            f"gradient/cosine/head_{i}": m + 0.01 * rng.normal()
            for i, m in means.items()
        }
        for s in range(1, 201)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(map(as_line, lines)))

    [line] = helping(tmp_path)

    verdicts = [part.rsplit(") ", 1)[1] for part in line.split(", ")]
    assert verdicts == ["helps", "hinders", "not decided"]
    assert helping(tmp_path / "nothing") == []

    (tmp_path / "metrics.jsonl").write_text("".join(map(as_line, lines[:4])))
    assert helping(tmp_path)[0].count("(2 records: not decided)") == 3


def as_line(record):
    return json.dumps(record) + "\n"
