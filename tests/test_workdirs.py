"""The verb `runs`: what it finds under a folder, and how it tells runs apart."""

import dataclasses
import json

import pytest
from runs import ROOT

from mtp_jax.cli import runs as verb
from mtp_jax.config import Config, config_to_json, freeze
from mtp_jax.errors import UserError
from mtp_jax.run.workdirs import differences, list_runs


def write_run(folder, config, *, steps=0, finished=False, heldout=None):
    folder.mkdir(parents=True)
    run = {"config": config, "goodput": {"finished": finished, "at": 0.0}}
    (folder / "run.json").write_text(json.dumps(run))
    lines = [
        json.dumps({"step": s, "loss": 9.0, "loss/head_1": 5.0 - s}) + "\n"
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if heldout is not None:
        record = json.dumps({"step": steps, "bits_per_byte": heldout})
        (folder / "heldout.jsonl").write_text(record + "\n")
    return folder


def config(**sections):
    return config_to_json(freeze(sections))


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "runs"
    write_run(top / "a", config(), steps=3, finished=True, heldout=2.25)
    write_run(top / "deep" / "er" / "b", config(optim={"peak_lr": 1e-3}), steps=2)
    write_run(top / "c", config(train={"steps": 7}, data={"sources": ("x", "y")}))
    write_run(top / "a" / "checkpoints" / "1", config())  # not a run of its own
    write_run(top / ".hidden", config())
    (top / "empty").mkdir()
    return top


def test_runs_are_found_with_step_loss_and_evaluation(folder):
    a, c, b = list_runs(folder)

    assert [run.workdir for run in (a, b, c)] == [
        str(folder / "a"),
        str(folder / "deep" / "er" / "b"),
        str(folder / "c"),
    ]
    assert (a.step, a.steps, a.loss, a.bits_per_byte) == (3, 25_000, 2.0, 2.25)
    assert a.finished and not b.finished
    assert (b.step, b.loss, b.bits_per_byte) == (2, 3.0, None)
    assert (c.step, c.steps, c.loss) == (0, 7, None)
    assert a.config == Config() and a.updated > 0
    assert list_runs(folder / "a") == [a]


def test_what_sets_runs_apart_is_told(folder):
    assert differences(list_runs(folder)) == [
        {},
        {"data.sources": ("x", "y"), "train.steps": 7},
        {"optim.peak_lr": 1e-3},
    ]
    assert differences([]) == []


def test_a_line_that_is_being_written_is_not_read(folder):
    with (folder / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/he')

    assert list_runs(folder / "a")[0].step == 3


def test_a_long_log_is_read_from_its_end(folder):
    line = json.dumps({"step": 1, "loss/head_1": 1.0, "x": "y" * 500}) + "\n"
    last = json.dumps({"step": 900, "loss/head_1": 0.5, "x": "z" * 500}) + "\n"
    (folder / "a" / "metrics.jsonl").write_text(line * 1000 + last)

    assert list_runs(folder / "a")[0].step == 900


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "run.json cannot be read"),
        ("[]", "run.json cannot be read"),
        ('{"config": 3}', "run.json holds no config"),
        ('{"config": {"format": 999}}', "format 999"),
        ('{"config": {"optim": {"lr": 1}}, "goodput": 3}', "did you mean"),
    ],
)
def test_a_run_that_cannot_be_read_is_listed_with_the_reason(folder, text, words):
    (folder / "a" / "run.json").write_text(text)

    runs = list_runs(folder)

    assert len(runs) == 3 and words in runs[0].wrong and runs[0].config is None
    assert runs[0].step == 3 and differences(runs)[0] == {}


def test_a_config_of_an_older_format_is_compared(folder):
    plain = {k: v for k, v in config(train={"steps": 5}).items() if k != "format"}
    write_run(folder / "old", plain)

    last = list_runs(folder)[-1]

    assert last.workdir.endswith("old") and not last.wrong and last.steps == 5


def test_the_table_and_json_say_so(folder, capsys):
    assert verb.main([str(folder)]) == 0
    head, a, c, b = capsys.readouterr().out.splitlines()
    assert verb.main([str(folder), "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)

    assert head.split() == ["workdir", "step", "loss", "bits/byte", "updated", "config"]
    assert a.split()[:5] == [str(folder / "a"), "3/25000", "done", "2.000", "2.2500"]
    assert c.endswith("data.sources=('x', 'y') train.steps=7")
    assert b.endswith("optim.peak_lr=0.001")
    assert objects[2]["differs"] == {"optim.peak_lr": 0.001}
    names = {field.name for field in dataclasses.fields(list_runs(folder)[0])}
    assert set(objects[0]) == names - {"config"} | {"differs"}


def test_a_table_on_a_narrow_terminal_has_the_fields_below(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")

    assert verb.main([str(folder)]) == 0

    head, a, c, *fields, b, rate = capsys.readouterr().out.splitlines()
    assert head.split() == ["workdir", "step", "loss", "bits/byte", "updated"]
    assert [row.split()[0] for row in (a, c, b)] == [
        str(folder / name) for name in ("a", "c", "deep/er/b")
    ]
    assert all(len(row) < 40 and row.startswith("    ") for row in (*fields, rate))
    assert " ".join(f.strip() for f in fields) == (
        "data.sources=('x', 'y') train.steps=7"
    )
    assert rate == "    optim.peak_lr=0.001"


def test_where_there_are_no_runs_it_says_so(tmp_path, capsys, monkeypatch):
    assert verb.main([str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list_runs(tmp_path / "nowhere")
    monkeypatch.chdir(ROOT / "tests")
    with pytest.raises(UserError, match="runs is not a folder"):
        verb.main([])
