"""The files that `evaluate` writes, and corpora that are not the model's."""

import dataclasses
import json
import pathlib

import pytest
from runs import ROOT

from mtp_jax.checkpoint import restore
from mtp_jax.cli import evaluate as verb
from mtp_jax.cli import train
from mtp_jax.cli.args import config_from
from mtp_jax.data.prepare import prepare
from mtp_jax.errors import UserError
from mtp_jax.eval import heldout

OLD_RUN = pathlib.Path(__file__).parent / "data" / "run_format_0" / "run"
TINY = str(ROOT / "configs" / "tiny.py")
FIGURES = {
    "step": 20,
    "data": ["corpus"],
    "heads": [
        {"offset": i, "loss": 1.0, "perplexity": 2.7, "accuracy": 0.5} for i in (1, 2)
    ],
    "bits_per_byte": 2.0415,
    "accept": {"length": 1.99, "by_head": [0.99]},
    "batches": 7,
    "tokens": 1000,
    "bytes": 990,
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A corpus of more ids than bytes."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = (json.dumps({"text": f"a text {i} of words"}) for i in range(200))
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare(folder / "text.jsonl", folder / "data", heldout=0.2, train_tokenizer=300)
    return folder / "data"


def test_every_setting_has_a_file_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restore, "restore_model", lambda *args, **kwargs: None)
    settings = [
        [],
        ["--step=20"],
        ["--heads=2"],
        ["--max_batches=7"],
        ["--step=20", "--heads=2"],
        [f"--data={tmp_path / 'one' / 'corpus'}"],
        [f"--data={tmp_path / 'two' / 'corpus'}"],
    ]

    for i, options in enumerate(settings):
        made = {**FIGURES, "step": i}
        monkeypatch.setattr(heldout, "evaluate", lambda *a, made=made, **k: made)
        assert verb.main([f"--workdir={tmp_path}", *options]) == 0

    written = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert sorted(figures["step"] for figures in written.values()) == list(range(7))
    assert written["eval.json"]["step"] == 0
    assert written["eval-step20-heads2.json"]["step"] == 4
    out = capsys.readouterr().out
    assert "written to" in out and "eval-step20-heads2.json" in out
    assert "2.0415 bits per byte of 7 batches" in out
    assert "heads agree for 1.990 of 2 tokens" in out and "right or wrong" in out


def test_another_tokenizer_is_called_that_in_evaluate(pieces):
    model = restore.restore_model(OLD_RUN)

    with pytest.raises(UserError, match=r"data was made with another tokenizer"):
        heldout.evaluate(model, data=[pieces])


def test_another_tokenizer_is_called_that_in_train(pieces, tmp_path):
    model = dataclasses.asdict(config_from(TINY, []).model)
    run = {"config": {"model": model}, "tokenizer": {"fingerprint": "that of the run"}}
    (tmp_path / "run.json").write_text(json.dumps(run))

    with pytest.raises(UserError, match=r"data was made with another tokenizer"):
        train.main(
            [
                f"--config={TINY}",
                f"--workdir={tmp_path}",
                f"--config.data.sources={pieces}",
            ]
        )
