"""Small files that are damaged, and a folder that is gone: a line, no traceback."""

import asyncio
import json
import math
import os
import pathlib
import resource
import shutil
import sys

import absl.logging
import pytest
import tensorstore
from letter_counts import ngrams

from mtp_jax import __main__
from mtp_jax.checkpoint.library_log import show_warnings_only
from mtp_jax.cli.args import config_from
from mtp_jax.config import config_from_json
from mtp_jax.data import ngram_counts
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prompts import read_prompts
from mtp_jax.errors import UserError
from mtp_jax.run import heldout_losses, run_log
from mtp_jax.run.audit import audit

OLD_RUN = pathlib.Path(__file__).parent / "data" / "run_format_0"
DEEP = "[" * 100_000


@pytest.fixture
def run(tmp_path):
    """A copy of the old run, to damage."""
    return pathlib.Path(shutil.copytree(OLD_RUN / "run", tmp_path / "run"))


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "exit()"])
def test_a_config_that_ends_the_program_is_refused(tmp_path, end):
    (tmp_path / "ends.py").write_text(end)

    with pytest.raises(UserError, match=r"ends\.py"):
        config_from(str(tmp_path / "ends.py"), [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=r"config\.optim\.peak_lr"):
        config_from_json({"optim": {"peak_lr": value}}, "run.json")


def test_a_whole_number_beyond_all_floats_is_refused():
    with pytest.raises(UserError, match=r"config\.optim\.peak_lr"):
        config_from_json({"optim": {"peak_lr": 10**400}}, "run.json")


def test_json_that_nests_too_deep_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": {DEEP}')
    (tmp_path / "manifest.json").write_text(DEEP)

    with pytest.raises(UserError, match="line 1"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match=r"manifest\.json is not JSON"):
        Corpus.open(tmp_path)


def test_a_message_is_no_longer_than_people_read():
    told = str(UserError(f"begins {'x' * 100_000} ends"))

    assert len(told) < 2000 and told.startswith("begins") and told.endswith("ends")


def test_no_verb_runs_in_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "runs"])

    assert __main__.main() == 2
    assert "current directory" in capsys.readouterr().err


def test_a_checkpoint_folder_with_a_damaged_file_is_refused(run, monkeypatch, capsys):
    metrics = run / "checkpoints" / "20" / "metrics" / "metrics"
    metrics.unlink()
    metrics.mkdir()
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "evaluate", f"--workdir={run}"])

    assert __main__.main() == 2
    assert str(metrics) in capsys.readouterr().err


def test_reads_that_end_after_a_failed_one_are_not_told(monkeypatch):
    """TensorStore tells them to the event loop, which is closed by then."""
    promise, read = tensorstore.Promise.new()

    async def waits():
        await read

    async def fails():
        raise OSError("another read")

    async def both():
        await asyncio.gather(fails(), waits())

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.object))
    show_warnings_only()
    loop = asyncio.new_event_loop()
    with pytest.raises(OSError, match="another read"):
        loop.run_until_complete(both())
    loop.close()

    promise.set_result(None)

    assert told == []


def test_other_exceptions_that_nobody_can_catch_are_told(monkeypatch):
    class Ends:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.object))
    show_warnings_only()

    Ends()

    assert told == [Ends.__del__]


def test_a_warning_of_orbax_is_a_line_without_a_traceback(caplog):
    show_warnings_only()
    try:
        raise OSError("no such folder")
    except OSError:
        absl.logging.warning("Failed to resolve\n%r", "a path", exc_info=True)
        absl.logging.error("Failed", exc_info=True)

    [record] = caplog.records
    assert record.getMessage() == "Failed to resolve 'a path'"
    assert "Traceback" not in caplog.text


def test_records_that_are_none_are_passed_over(run):
    records = [{"step": 10, "loss/head_1": 2.5}, {"step": 30, "loss/head_1": 2.0}]
    good = [json.dumps(record).encode() for record in records]
    content = b"\n".join(
        [good[0], b"\xff\xfe", b"3", b"{}", b'{"step": null}', good[1]]
    )
    (run / "heldout.jsonl").write_bytes(content + b"\n")

    assert heldout_losses._read(run / "heldout.jsonl") == {10: 2.5, 30: 2.0}
    run_log._keep_until(run / "heldout.jsonl", 20)
    assert (run / "heldout.jsonl").read_bytes() == good[0] + b"\n"


def test_the_audit_names_a_record_that_is_none(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")

    with pytest.raises(UserError, match=r"metrics\.jsonl:\d+ is not a record"):
        audit(str(run), data=[str(OLD_RUN / "corpus")])


def test_counts_on_a_full_disk_leave_no_file(tmp_path):
    written = tmp_path / "counts.npz"
    written.write_bytes(b"those of before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"counts\.npz cannot be written"):
            ngram_counts.save(ngrams(), written)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert written.read_bytes() == b"those of before"
    assert list(tmp_path.iterdir()) == [written]


@pytest.mark.parametrize("option", ["--output=--", "--text_field=--", "--tokenizer=--"])
def test_two_dashes_are_no_value(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.txt").write_text("words")
    argv = ["mtp-jax", "prepare", "--input=a.txt", "--output=out", option]
    monkeypatch.setattr(sys, "argv", argv)

    assert __main__.main() == 2
    assert f"{option}: -- is no value" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
def test_a_damaged_corpus_is_not_counted(tmp_path, kind):
    corpus = pathlib.Path(shutil.copytree(OLD_RUN / "corpus", tmp_path / "corpus"))
    shard = corpus / f"train-00000.{kind}"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)

    with pytest.raises(UserError, match=shard.name):
        ngram_counts.count_corpus(corpus, tmp_path / "counts.npz")
    assert not (tmp_path / "counts.npz").exists()


def test_prepare_without_streams_makes_a_corpus(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words")
    argv = ["prepare", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["mtp-jax", *argv, "--heldout=0"])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    assert __main__.main() == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
