"""A disk that is full or read-only, and paths that look like patterns."""

import contextlib
import errno
import io
import os
import resource
import shlex
import subprocess
import sys

import pytest
from etils import epath
from models import tiny_config
from runs import ROOT, complete, finish, start, told, train_args

from mtp_jax import errors
from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.config import CheckpointConfig, Config
from mtp_jax.data.prepare import prepare
from mtp_jax.errors import RunFailed, UserError
from mtp_jax.run.run_log import RunLog
from mtp_jax.run.screen import Screen
from mtp_jax.storage import workdir_at, write_atomically


@contextlib.contextmanager
def files_of_at_most(size):
    """A limit of this process that acts like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_errors_of_a_disk_are_told_in_one_line(number):
    told_as = pytest.raises(UserError, match=f"^/a/b: {os.strerror(number)}")
    with told_as, errors.disk_errors_told("/a"):
        raise OSError(number, os.strerror(number), "/a/b")

    with pytest.raises(ConnectionError), errors.disk_errors_told("/a"):
        raise ConnectionError  # is not of the disk


def test_prepare_on_a_full_disk_says_so_and_leaves_nothing(tmp_path):
    output = tmp_path / "corpus"
    text = tmp_path / "in.jsonl"
    text.write_text(f'{{"text": "{"x" * 5000}"}}\n' * 40)

    with files_of_at_most(20_000), pytest.raises(UserError) as caught:
        prepare(text, output, heldout=0)

    assert str(caught.value) == (
        f"--output={output}: File too large; free space and run the same command again."
    )
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_file_is_the_old_one_where_the_new_one_does_not_fit(tmp_path):
    path = epath.Path(tmp_path / "a.json")
    write_atomically(path, "old")

    with files_of_at_most(1000), pytest.raises(OSError):
        write_atomically(path, "new" * 1000)

    assert os.listdir(tmp_path) == ["a.json"] and path.read_text() == "old"


def test_scalars_that_do_not_fit_are_an_error_in_the_thread_that_has_them(tmp_path):
    workdir = epath.Path(tmp_path)
    log = RunLog(Config(), workdir, 0, Screen(False))

    with files_of_at_most(6000), pytest.raises(OSError, match="File too large"):
        for step in range(200):
            log.write("heldout.jsonl", {"step": step, **{f"x{i}": 1 for i in range(9)}})
    with contextlib.suppress(OSError):
        log.close()


@pytest.mark.parametrize(
    ("size", "stage"),
    [("12k", "compiles"), pytest.param("60k", "step 1/", marks=pytest.mark.slow)],
)
def test_a_run_on_a_full_disk_ends_with_one_line(size, stage, tmp_path, corpus_dir):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path],
        capture_output=True,
    ).returncode:
        pytest.skip("needs user namespaces")
    args = train_args(
        tmp_path / "run",
        corpus_dir,
        "--config.train.steps=100000",
        "--config.checkpoint.every=1000000",
        "--config.log.tensorboard=True",
    )
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {tmp_path} && "
        f"exec {sys.executable} -m mtp_jax {shlex.join(args)}"
    )

    code, out, err = finish(start(script, program=["unshare", "-rm", "sh", "-c"]))

    assert code == 2 and stage in out
    assert "Traceback" not in err and len(told(err)) == 1
    assert told(err)[0].startswith(f"mtp-jax: error: {tmp_path / 'run'}")
    assert "No space left on device; free space" in told(err)[0]


def test_a_line_that_cannot_be_printed_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        errors.say("a line")
        errors.settle()


def test_output_that_does_not_fit_is_an_error_without_traceback():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "mtp_jax", "rehearse", "--list"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert process.returncode == 2
    assert process.stderr.startswith("mtp-jax: error: what rehearse prints: No space")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["run[1]", "run*", "a?b"])
def test_a_path_like_a_pattern_is_refused_wherever_it_comes_from(
    name, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="such as a link"):
        workdir_at(str(tmp_path / name))

    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="such as a link"):
        workdir_at("run")


def test_a_link_to_such_a_path_works(tmp_path, corpus_dir):
    (tmp_path / "[real]").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "[real]")

    complete(train_args(link, corpus_dir, "--config.train.steps=1"))

    assert Checkpoints(epath.Path(link)).saved_metadata(1)["data"]["batches"] == 1


def test_a_first_checkpoint_that_cannot_be_read_ends_the_run(one_device, tmp_path):
    """Orbax itself says "saved" where its own glob finds nothing."""
    import jax

    from mtp_jax.training.train_step import make_init

    checkpoints = Checkpoints(epath.Path(tmp_path / "[1]"), CheckpointConfig())
    state = make_init(tiny_config())(jax.random.key(0))

    with pytest.raises(RunFailed, match="1 was saved, but cannot be read"):
        checkpoints.save(1, state, {})


def test_warnings_of_the_library_are_shown_and_its_tracebacks_are_not(tmp_path, caplog):
    import absl.logging

    Checkpoints(epath.Path(tmp_path))

    absl.logging.warning("this matters\nto %s", "people")
    try:
        raise ValueError
    except ValueError:
        absl.logging.exception("it failed")

    assert caplog.messages == ["this matters to people"]
