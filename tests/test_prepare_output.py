"""The folder that a corpus is written into."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
from runs import ROOT
from test_prepare import contents, run

from mtp_jax.data import prepare as library
from mtp_jax.data.corpus import Corpus
from mtp_jax.errors import UserError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for i in range(60):
        (folder / f"f{i:02d}.txt").write_text(f"text {i}\n" * (1 + i % 3))
    return folder


@pytest.fixture
def expected(source, tmp_path):
    """The corpus's files, written to a folder that was not there."""
    run(source, tmp_path / "expected")
    return contents(tmp_path / "expected")


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_is_there_stays_the_same_folder(source, expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before = out.stat()

    run(source, out)
    assert contents(out) == expected
    run(source, out, "--force", "--shard_tokens=200")
    assert contents(out) != expected
    run(source, out, "--force")
    assert contents(out) == expected
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == {"src", "expected", "out"}


def test_the_working_directory_can_be_the_output(
    source, expected, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    for force in ([], ["--force"]):
        run(source, ".", *force)
        assert contents(pathlib.Path()) == contents(tmp_path / "here") == expected


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_kept_and_the_corpus_is_where_it_leads(
    source, expected, tmp_path, exists
):
    target = tmp_path / "disk" / "target"
    target.parent.mkdir()
    if exists:
        target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)

    for force in ([], ["--force"]):
        run(source, link, *force)
        assert link.is_symlink() and contents(target) == expected
        assert names(tmp_path) == {"src", "expected", "disk", "link"}
        assert names(target.parent) == {"target"}


def test_a_volume_whose_parent_is_closed_is_written(
    source, expected, tmp_path, monkeypatch
):
    """As a container mounts one: it cannot be renamed, nothing beside it be made."""
    volume = tmp_path / "data" / "volume"
    (volume / "lost+found").mkdir(parents=True)
    rename, mkdir = os.rename, os.mkdir

    def closed(path):
        return os.path.dirname(os.path.abspath(path)) == str(volume.parent)

    def no_rename(a, b, **options):
        if closed(a) or closed(b):
            raise OSError(errno.EBUSY, "Device or resource busy", str(a))
        rename(a, b, **options)

    def no_mkdir(path, *args, **options):
        if closed(path):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, "rename", no_rename)
    monkeypatch.setattr(os, "mkdir", no_mkdir)

    for force in ([], ["--force"]):
        run(source, volume, *force)
        assert names(volume) == {*expected, "lost+found"}
        (volume / "lost+found").rmdir()
        assert contents(volume) == expected
        mkdir(volume / "lost+found")


def test_a_mount_point_is_written(source, expected, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "volume").mkdir()
    code = (
        "import sys; from mtp_jax.data.prepare import prepare\n"
        "for force in (False, True): prepare(*sys.argv[1:], workers=1, force=force)"
    )
    script = f'mount --bind disk volume && exec "{sys.executable}" -c "$0" src volume'
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in found.stderr or "mount" in found.stderr:
        pytest.skip("nothing may be mounted here")

    assert found.returncode == 0, found.stderr
    written = contents(tmp_path / "disk")
    assert {k: written[k] for k in written if k != "manifest.json"} == {
        k: expected[k] for k in expected if k != "manifest.json"
    }
    assert names(tmp_path / "disk") == set(expected)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    source, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(library, "_make_tokenizer", None)  # would fail if called
    monkeypatch.setattr(library, "tokenized", None)
    for place in ("file/below", "file/below/that"):
        with pytest.raises(UserError, match="cannot be written"):
            library.prepare(source, tmp_path / place, train_tokenizer=290)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="cannot be written"):
        library.prepare(source, tmp_path / "round")
    assert names(tmp_path) == {"src", "file", "round"}


@pytest.mark.parametrize("place", ["out", "new/a/b", "there"])
def test_nothing_is_left_of_a_failure(source, tmp_path, place):
    (tmp_path / "there").mkdir()
    (source / "z.txt").write_bytes(b"\xff")

    with pytest.raises(UserError, match="UTF-8"):
        run(source, tmp_path / place)

    assert names(tmp_path) == {"src", "there"} and not names(tmp_path / "there")


def test_what_a_killed_prepare_left_is_no_obstacle(source, expected, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    (out / "manifest.json").unlink()  # the last that is put in place
    (out / ".0123abcd.partial").mkdir()

    with pytest.raises(UserError, match=r"not a prepared corpus"):
        Corpus.open(out)
    with pytest.raises(UserError, match="--force"):
        run(source, out)
    run(source, out, "--force")
    (out / ".0123abcd.partial").rmdir()
    assert contents(out) == expected


def test_a_tokenizer_of_others_is_not_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.model").write_text("days of training")
    with pytest.raises(UserError, match=r"did not write \(tokenizer\.model\)"):
        run(source, out, "--force")
    assert (out / "tokenizer.model").read_text() == "days of training"
