"""The files that prepare reads, and those that it leaves out."""

import json
import os

import pytest
from test_prepare import all_texts, run

from mtp_jax.cli import prepare
from mtp_jax.data.corpus import Corpus
from mtp_jax.errors import UserError


def write(folder, *names):
    """Files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def lines_of(capsys, beginning):
    out = capsys.readouterr().out.splitlines()
    return [line for line in out if line.startswith(beginning)]


def test_links_to_folders_are_followed_and_every_file_counts_once(tmp_path, capsys):
    write(tmp_path, "src/own.txt", "src/m/deep.txt", "real/r1.txt", "real/sub/r2.txt")
    os.symlink(tmp_path / "real", tmp_path / "src" / "a_link")
    os.symlink(tmp_path / "real" / "sub", tmp_path / "src" / "m" / "again")
    os.symlink("own.txt", tmp_path / "src" / "a_file.txt")

    corpus = run(tmp_path / "src", tmp_path / "out", "--heldout=0")

    assert all_texts(corpus) == {
        "src/a_file.txt": "src/own.txt",
        "src/a_link/r1.txt": "real/r1.txt",
        "src/a_link/sub/r2.txt": "real/sub/r2.txt",
        "src/m/deep.txt": "src/m/deep.txt",
    }
    assert lines_of(capsys, "read:") == ["read: 4 .txt"]


def test_a_file_behind_a_link_keeps_the_name_it_has_without(tmp_path):
    write(tmp_path, "a/own.txt", "z/real.txt")
    os.symlink(tmp_path / "z", tmp_path / "a" / "link")
    os.symlink(tmp_path / "a", tmp_path / "z" / "back")
    argv = [f"--input={tmp_path / name}" for name in "az"]

    prepare.main([*argv, f"--output={tmp_path / 'o'}", "--heldout=0", "--workers=1"])

    texts = all_texts(Corpus.open(tmp_path / "o"))
    assert list(texts) == ["a/own.txt", "z/real.txt"]


def test_links_that_go_round_end(tmp_path, capsys):
    write(tmp_path, "up/not_asked_for.txt", "up/src/a.txt", "x/b.txt", "y/c.txt")
    for target, link in (("src", "self"), (".", "above"), ("../x", "x")):
        os.symlink(tmp_path / "up" / target, tmp_path / "up" / "src" / link)
    os.symlink(tmp_path / "y", tmp_path / "x" / "y")
    os.symlink(tmp_path / "x", tmp_path / "y" / "x")
    os.symlink("loop", tmp_path / "up" / "src" / "loop")
    os.symlink("gone.txt", tmp_path / "up" / "src" / "broken.txt")

    corpus = run(tmp_path / "up" / "src", tmp_path / "out", "--heldout=0")

    assert list(all_texts(corpus)) == ["src/a.txt", "src/x/b.txt", "src/x/y/c.txt"]
    above = f"1 link to a folder above it ({tmp_path}/up/src/above)"
    assert lines_of(capsys, "left out:") == [f"left out: 2 broken link, {above}"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "src/a.txt", "src/closed/b.txt")
    scandir = os.scandir

    def closed(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)

    match = r"src/closed cannot be read \(Permission denied\).*--exclude=closed"
    with pytest.raises(UserError, match=match):
        run(tmp_path / "src", tmp_path / "out", "--heldout=0")
    assert not (tmp_path / "out").exists()
    corpus = run(tmp_path / "src", tmp_path / "out", "--heldout=0", "--exclude=closed")
    assert list(all_texts(corpus)) == ["src/a.txt"]


def test_what_is_left_out_is_counted_by_kind(tmp_path, capsys):
    names = "a.py b.js c.JS d.txt e.arrow README f.jsonl.zst g.json .hidden.txt"
    write(tmp_path / "src", *names.split(), ".git/config", "tests/t.py")
    os.mkfifo(tmp_path / "src" / "pipe.txt")

    run(tmp_path / "src", tmp_path / "out", "--heldout=0", "--exclude=tests")

    assert lines_of(capsys, ("read:", "left out:")) == [
        "read: 1 .py, 1 .txt",
        "left out: 3 hidden or excluded, 2 .js, 1 .arrow, 1 .json, 1 .jsonl.zst, "
        "1 no regular file, 1 without a suffix",
    ]


def test_the_kinds_that_are_there_are_named_where_none_is_read(tmp_path):
    write(tmp_path / "src", "a.arrow", "b.arrow", "c.js")
    with pytest.raises(UserError, match=r"left out: 2 \.arrow, 1 \.js\); known"):
        run(tmp_path / "src", tmp_path / "out")


def test_a_refusal_tells_what_was_left_out(tmp_path):
    write(tmp_path / "src", "a.txt", "b.js")
    with pytest.raises(UserError, match=r"none of 1 \(left out: 1 \.js\) fell into"):
        run(tmp_path / "src", tmp_path / "out", "--heldout=0.000001")
    (tmp_path / "src" / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"1 empty ones\) \(left out: 1 \.js\); give"):
        run(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.arrow", "a.jsonl.zst", "a.ZIP"])
def test_files_that_are_never_text_are_refused_by_name(tmp_path, name):
    write(tmp_path, name)
    with pytest.raises(UserError, match=rf"{name}: \.\w+ is not read; (write|unpack)"):
        run(tmp_path / name, tmp_path / "out", "--heldout=0")


def test_an_input_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        run(tmp_path / "pipe", tmp_path / "out")


@pytest.mark.parametrize("name", [b"st\xf6ries.txt", "störies.txt".encode()])
def test_a_name_in_any_encoding_is_kept(tmp_path, name):
    folder = tmp_path / os.fsdecode(name[:3])  # the manifest has this name
    folder.mkdir()
    (folder / os.fsdecode(name)).write_text("words")

    corpus = run(folder, tmp_path / "out", "--heldout=0")

    assert len(all_texts(corpus)) == 1
    content = (tmp_path / "out" / "manifest.json").read_bytes()
    assert content.decode("utf-8")  # strictly
    (kept,) = json.loads(content)["options"]["input"]
    assert os.fsencode(kept) == name[:3]
