"""What a report reads: logs as columns and bins, files of runs, and what is refused."""

import json

import numpy as np
import pytest
from report_runs import BEGIN, lines, nan_steps, record, write_results, write_run

from mtp_jax.errors import UserError
from mtp_jax.reports.bins import binned
from mtp_jax.reports.result_tables import (
    compared_rows,
    evaluation_rows,
    summary_rows,
    task_rows,
)
from mtp_jax.reports.run_data import config_differences, config_rows, read_runs
from mtp_jax.run import log_columns
from mtp_jax.run.log_columns import read_log


@pytest.fixture
def folder(tmp_path):
    rows = [record(step) for step in range(1, 41)]
    run = write_run(tmp_path / "run", rows, evaluations=(20, 40), starts=(0, 13, 30))
    write_results(run)
    return run


@pytest.mark.parametrize("parser", [json.loads, log_columns._fast_loads])
def test_a_log_is_read_as_columns(tmp_path, monkeypatch, parser):
    monkeypatch.setattr(log_columns, "_fast_loads", parser)
    monkeypatch.setattr(log_columns, "_CHUNK", 7)
    rows = nan_steps([record(step) for step in range(1, 31)], {4, 30})
    rows[9]["mfu"] = 0.5
    path = tmp_path / "log"
    path.write_text(lines(rows))

    log = read_log(path)

    assert log.unread == 0 and log.step.tolist() == list(range(1, 31))
    assert not {"batch_hash", "step"} & set(log.columns)
    for name in ("loss/head_2", "grad_norm", "lr", "bad_steps", "mfu", "time"):
        wanted = [row.get(name) for row in rows]
        wanted = [np.nan if x is None else x for x in wanted]
        np.testing.assert_array_equal(log.column(name), wanted)
    assert log.heads_of("loss") == [1, 2, 3, 4] and log.heads_of("accept") == []
    assert np.isnan(log.column("nothing")).all()


def test_what_is_no_record_is_counted_and_the_rest_is_read(tmp_path):
    path = tmp_path / "log"
    bad = ["", "[1]", "{", '{"loss": 1}', '{"step": true}', '{"step": "3"}', "\x00"]
    good = [
        '{"step": 2, "loss": NaN, "lr": 1}',
        '{"step": 3, "loss": "1.5", "lr": 1e999}',
        '{"step": 4, "loss": [1], "x": "\\ud800"}',
        '{"step": 5, "loss": {"a": 1}, "lr": ' + "9" * 400 + "}",
        '{"step": 6, "loss": 7}',
    ]
    path.write_text("\n".join([*bad, *good]) + '\n{"step": 7, "lo')

    log = read_log(path)

    assert log.step.tolist() == [2, 3, 4, 5, 6]
    assert log.unread == 6  # the empty line is none
    np.testing.assert_array_equal(log.column("loss"), [np.nan] * 4 + [7])
    assert np.isfinite(log.column("lr")).tolist() == [True] + [False] * 4


def test_steps_that_were_done_again_count_once(tmp_path):
    path = tmp_path / "log"
    steps = [1, 2, 3, 4, 5, 3, 4, 5, 6, 6, 7]
    path.write_text(lines({"step": s, "loss": float(i)} for i, s in enumerate(steps)))

    log = read_log(path)

    assert log.step.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert log.column("loss").tolist() == [0, 1, 5, 6, 7, 9, 10]
    assert len(read_log(tmp_path / "nothing").step) == 0


def binned_by_hand(x, y, bins):
    points = sorted((a, b) for a, b in zip(x, y, strict=True) if np.isfinite(b))
    low, high = points[0][0], points[-1][0]
    found = {}
    for a, b in points:
        k = min(int((a - low) // ((high - low) / bins)), bins - 1)
        found.setdefault(k, []).append((a, b))
    cells = [np.array(found[k]) for k in sorted(found)]
    return [
        (c[:, 0].mean(), c[:, 1].mean(), c[:, 1].min(), c[:, 1].max()) for c in cells
    ]


def test_bins_have_the_mean_the_smallest_and_the_largest():
    rng = np.random.default_rng(0)
    x = np.sort(rng.choice(100_000, 5000, replace=False)).astype(float)
    y = rng.normal(size=5000)
    y[rng.random(5000) < 0.1] = np.nan
    y[17] = 1000.0  # a single spike is seen

    found = binned(x, y, 50)

    wanted = np.array(binned_by_hand(x, y, 50))
    np.testing.assert_allclose(found.x, wanted[:, 0])
    np.testing.assert_allclose(found.mean, wanted[:, 1], rtol=1e-9)
    np.testing.assert_array_equal(found.low, wanted[:, 2])
    np.testing.assert_array_equal(found.high, wanted[:, 3])
    assert found.high.max() == 1000 and len(found.x) == 50


def test_few_points_stay_as_they_are():
    x, y = np.arange(5.0), np.array([1.0, np.nan, 3.0, np.inf, 5.0])
    found = binned(x, y, 4)
    assert found.x.tolist() == [0, 2, 4] and found.mean.tolist() == [1, 3, 5]
    assert found.low.tolist() == found.high.tolist() == [1, 3, 5]
    assert len(binned(x, np.full(5, np.nan), 4).x) == 0
    assert binned(np.zeros(9), np.arange(9.0), 4).mean.tolist() == [4]


def test_the_files_of_a_run_are_read(folder):
    [run] = read_runs([folder / "checkpoints" / ".." / "checkpoints"])
    [same] = read_runs([folder])

    assert run.name == same.name == "run" and run.heads == 4 and run.finished
    assert [start.after for start in same.starts] == [0, 13, 30]
    assert [start.at for start in same.starts] == [BEGIN + 60 * i for i in range(3)]
    assert same.starts[0].changes == []
    [*settings, rate] = same.starts[1].changes
    assert settings == [
        "config.optim.peak_lr is 0.002, was 0.001: another optimizer from the next "
        "step on; its moments stay"
    ]
    assert rate.startswith("the learning rate of step 14 is ")
    assert [sample.step for sample in same.samples] == [20, 40]
    assert same.goodput["lost"] == 5.0 and same.notes == []
    assert dict(same.facts)["last command"].endswith("--workdir=$(rm -rf ~)<script>")
    assert config_differences([same, same]) == []
    fields = {field: (value, usual) for field, value, usual in config_rows(same.config)}
    assert fields["optim.peak_lr"] == ("0.004", False)
    assert fields["train.seed"] == ("0", True)


def test_figures_are_tables(folder):
    [run] = read_runs([folder])

    head, row = summary_rows([run])
    cells = dict(zip(head, row, strict=True))
    assert cells["step"] == "40 of 25,000 done" and cells["heads"] == "4"
    assert cells["bits/byte"] == "2.0250" and cells["in steps"] == "90%"
    assert cells["accuracy"] == "0.5000" and cells["wall time"] == "1m40s"
    about, rows = evaluation_rows(run.evaluations[0][1])
    assert "1,234 tokens" in about and "2.0159 bits per byte" in about
    assert rows[2] == ["2", "3.0000", "3.000", "0.2500", "0.5000"]
    assert task_rows(run.tasks[0][1]) == [
        ["acc", "0.6250", "0.5000 to 0.7500", "8", "40", ""]
    ]


def test_several_runs_are_told_apart(folder, tmp_path):
    rows = [record(step) for step in range(1, 5)]
    other = write_run(tmp_path / "deep" / "run", rows, config={"train": {"seed": 3}})
    write_results(other)

    runs = read_runs([folder, other])

    assert [run.name for run in runs] == [f"{tmp_path.name}/run", "deep/run"]
    assert config_differences(runs) == [
        ("optim.peak_lr", ["0.004", "0.001"]),
        ("train.seed", ["0", "3"]),
    ]
    head, row = compared_rows(runs)
    assert head[:2] == ["task", "metric"] and row[2:4] == ["0.6250", "0.6250"]
    assert row[4].startswith("+0.0000 [")
    assert compared_rows(runs[:1]) == []


def test_files_that_are_no_figures_are_left_out_with_a_note(folder):
    (folder / "eval-odd.json").write_text("[1, 2")
    (folder / "eval" / "odd.json").write_text('{"task": 3}')
    (folder / "run.json").write_text("{")
    (folder / "heldout.jsonl").write_text("what\n")

    [run] = read_runs([folder])

    assert run.config is None and run.starts == [] and run.heads == 4
    assert [note.split(" ")[0] for note in run.notes] == [
        "run.json", "1", "eval-odd.json", "odd.json",
    ]  # fmt: skip
    for content in ({"heads": 3, "bits_per_byte": 1}, {"heads": [{}]}):
        with pytest.raises(ValueError):
            evaluation_rows(content)
    with pytest.raises(ValueError):
        task_rows({"metrics": {"acc": {}}, "items": []})


@pytest.mark.parametrize("content", ['{"config": 3}', '{"config": {"format": 99}}'])
def test_a_config_that_cannot_be_read_is_noted(folder, content):
    (folder / "run.json").write_text(content)
    [run] = read_runs([folder])
    assert run.config is None and len(run.notes) == 1


def test_workdirs_without_a_record_are_refused(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere holds no metrics.jsonl .* no such fol"
    ):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="is given twice"):
        read_runs([folder, f"{folder}/../run"])
    with pytest.raises(UserError, match="give the workdir"):
        read_runs([])
    for text in ("", "what\n", '{"step": 1}'):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"holds no metrics.jsonl with a record"):
            read_runs([folder])
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="give the workdir"):
        read_runs([folder.parent, folder])
