"""Other folders than those of a run: its corpora elsewhere, its checkpoints by name."""

import json
import pathlib
import shutil

import pytest
from etils import epath
from test_prepare import run as prepared

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.cli import audit, calibrate, evaluate, generate, verify
from mtp_jax.errors import UserError
from mtp_jax.storage import run_at

FOLDER = pathlib.Path(__file__).parent / "data" / "run_format_0"
VERBS = {
    "generate": (generate, ["--heldout=2", "--prompt_tokens=8", "--max_new_tokens=2",
                            "--json", "--decoder=plain"]),
    "evaluate": (evaluate, ["--max_batches=1"]),
    "calibrate": (calibrate, ["--output=tree.json", "--passages=3", "--nodes=3"]),
    "audit": (audit, ["--step=3"]),
    "verify": (verify, ["--heldout=1", "--prompt_tokens=6", "--decoder=blockwise"]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, and its corpus in another place than it was trained on."""
    shutil.copytree(FOLDER / "run", tmp_path / "runs" / "mine")
    shutil.copytree(FOLDER / "corpus", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def other(tmp_path):
    """Another corpus of bytes, and one of another tokenizer."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(
            f"{i} other words than those. " * 3
        )
    prepared(tmp_path / "texts", tmp_path / "other", "--heldout=0.5")
    options = ["--heldout=0.5", "--train_tokenizer=285"]
    prepared(tmp_path / "texts", tmp_path / "pieces", *options)
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_a_corpus_that_was_moved_is_named_with_data(folder, verb, monkeypatch):
    module, options = VERBS[verb]
    with pytest.raises(UserError, match=r"corpus is not a prepared corpus.*--data=DIR"):
        module.main(["--workdir=runs/mine", *options])
    for checks in ("greedy", "distribution", "sampling"):  # minutes of them
        name = f"mtp_jax.verification.verifier.{checks}_checks"
        monkeypatch.setattr(name, lambda subject: ())
    assert module.main(["--workdir=runs/mine", "--data=elsewhere", *options]) == 0


def test_prompts_and_passages_are_those_of_the_other_corpus(folder, other, capsys):
    capsys.readouterr()
    module, options = VERBS["generate"]
    module.main(["--workdir=runs/mine", "--data=other", *options])
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [path.read_text() for path in (folder / "texts").iterdir()]
    assert len(made) == 2
    assert all(any(row["prompt"] in text for text in texts) for row in made)

    module, options = VERBS["calibrate"]
    module.main(["--workdir=runs/mine", "--data=other", *options])
    assert json.loads((folder / "tree.json").read_text())["data"] == ["other"]


@pytest.mark.parametrize("verb", ["generate", "calibrate", "verify"])
def test_a_corpus_of_another_tokenizer_is_refused(folder, other, verb):
    module, options = VERBS[verb]
    with pytest.raises(UserError, match=r"pieces was .*the model's tokenizer, bytes"):
        module.main(["--workdir=runs/mine", "--data=pieces", *options])


def test_an_audit_takes_the_corpora_by_their_content(folder, other, capsys):
    argv = ["--workdir=runs/mine", "--data=other", "--data=elsewhere", "--step=1"]
    assert audit.main(argv) == 0
    assert "of elsewhere" in capsys.readouterr().out
    match = r"the run's corpus corpus \(sha256 4021c80e3ead.*none of --data: other\."
    with pytest.raises(UserError, match=match):
        audit.main(["--workdir=runs/mine", "--data=other"])


def test_data_without_heldout_prompts_is_refused(folder):
    with pytest.raises(UserError, match=r"--data is for --heldout"):
        generate.main(["--workdir=runs/mine", "--prompt=a", "--data=elsewhere"])


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("runs/mine", None),
        ("runs/mine/", None),
        ("runs/mine/checkpoints", None),
        ("runs/mine/checkpoints/", None),
        ("runs/mine/checkpoints/20", 20),
        ("runs/../runs/mine/checkpoints/20/", 20),
    ],
)
def test_a_run_is_found_by_its_checkpoints(folder, name, step):
    found, named = run_at(name)
    assert found.resolve() == (folder / "runs" / "mine").resolve() and named == step
    assert restore_model(name).step == 20


def test_from_within_a_run_its_checkpoints_are_found(folder, monkeypatch):
    for place, name in (("mine", "checkpoints"), ("mine/checkpoints", "."),
                        ("mine/checkpoints", "20")):  # fmt: skip
        monkeypatch.chdir(folder / "runs" / place)
        assert restore_model(name).step == 20


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/20"])
def test_a_workdir_may_have_the_name_of_what_is_in_it(folder, name):
    shutil.copytree(folder / "runs" / "mine", folder / name)
    assert run_at(name) == (epath.Path(name), None)
    assert restore_model(name).step == 20


def test_figures_are_written_into_the_workdir(folder, capsys):
    evaluate.main(["--workdir=runs/mine/checkpoints/20", "--data=elsewhere"])
    assert len(list((folder / "runs" / "mine").glob("eval*.json"))) == 1
    assert not list((folder / "runs" / "mine").glob("checkpoints/**/eval*"))
    assert audit.main(["--workdir=runs/mine/checkpoints", "--data=elsewhere"]) == 0


def test_a_step_in_an_object_store_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("mtp_jax.storage.workdir_at", epath.Path)  # without the store
    remote = type(epath.Path("gs://bucket"))
    monkeypatch.setattr(remote, "is_dir", lambda path: False)
    found, step = run_at("gs://bucket/run/checkpoints/40")
    assert str(found) == "gs://bucket/run" and step == 40


def test_two_steps_are_refused(folder):
    with pytest.raises(UserError, match=r"--step=10 is not the step of"):
        restore_model("runs/mine/checkpoints/20", step=10)
    assert restore_model("runs/mine/checkpoints/20", step=20).step == 20
    with pytest.raises(UserError, match=r"no checkpoint of step 30; there are \[20\]"):
        restore_model("runs/mine/checkpoints/30")


@pytest.mark.parametrize(
    "verb", [restore_model, lambda name: audit.main(["--workdir", name])]
)
def test_what_is_no_workdir_is_told_the_layout(folder, verb):
    layout = r"run\.json and checkpoints/ in it"
    with pytest.raises(UserError, match=layout + r", like runs/mine\.$"):
        verb("runs")
    with pytest.raises(UserError, match=r"no such folder; .*" + layout):
        verb("nowhere")
    shutil.copytree(folder / "runs/mine/checkpoints/20", folder / "alone")
    with pytest.raises(UserError, match=layout):
        verb("alone")
