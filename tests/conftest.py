"""Eight host devices and a compilation cache, for every test."""

import json
import os
import pathlib
import random
import signal
import sys

import jax
import pytest
import runs

# Read when the first device is asked for. A pool of fewer threads than devices can
# deadlock in a collective; plain programs compile faster than they run slower.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later versions do not know it, and abort
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is installed, too
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# Programs of tests are to hear it, also where the tests themselves are under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A process of a test that failed would slow down all tests after it."""
    yield
    runs.kill_what_is_left()


@pytest.fixture
def one_device():
    """A mesh of one device, set."""
    from models import mesh_of

    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        yield mesh


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=3, help="SIGKILLs that a run must survive"
    )
    parser.addoption(
        "--pods",
        action="store_true",
        help="200 steps on every mesh and number of processes; resumes on 1, 4, 2, 8",
    )
    parser.addoption(
        "--rehearsals", type=int, default=0, help="faults at 4 hosts, all kinds of them"
    )
    parser.addoption(
        "--every_case", action="store_true", help="every form of the loss on every mesh"
    )


@pytest.fixture(scope="session")
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def rehearsals(request):
    return request.config.getoption("--rehearsals")


@pytest.fixture
def pods(request):
    if not request.config.getoption("--pods"):
        pytest.skip("takes an hour; --pods")


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """The package's own source, prepared as bytes."""
    from mtp_jax.data.prepare import prepare

    source = os.path.join(os.path.dirname(__file__), "..", "mtp_jax")
    output = tmp_path_factory.mktemp("corpus") / "source"
    prepare(source, output, heldout=0.2)
    return output


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """Documents of 3 to 62 tokens, all different, in several shards."""
    from corpora import make_corpus

    texts = [
        "".join(
            random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=1 + i * 7 % 60)
        )
        for i in range(80)
    ]
    folder = tmp_path_factory.mktemp("story") / "s"
    return make_corpus(folder, texts, heldout=0.2, shard_tokens=500)


@pytest.fixture
def source(tmp_path):
    """Sixty text files of different sizes."""
    folder = tmp_path / "src"
    folder.mkdir()
    for i in range(60):
        text = f"# file {i}\n" + f"x_{i} = {i * i}\n" * (i % 7)
        (folder / f"f{i:02d}.py").write_text(text)
    return folder


@pytest.fixture
def refusal(monkeypatch, capsys):
    """All that the program says when it refuses arguments, one line; exit code 2."""
    from mtp_jax import __main__

    def line_of(*argv):
        monkeypatch.setattr(sys, "argv", ["mtp-jax", *map(str, argv)])
        assert __main__.main() == 2
        said = capsys.readouterr()
        [line] = said.err.splitlines()
        assert not said.out
        assert line.startswith("mtp-jax: error: ")
        return line

    return line_of


@pytest.fixture(scope="session")
def counts_file(tmp_path_factory):
    """Counts of runs of random letters, in a file."""
    from letter_counts import ngrams

    from mtp_jax.data import ngram_counts

    path = tmp_path_factory.mktemp("counts") / "counts"
    ngram_counts.save(ngrams(), path)
    return str(path)


@pytest.fixture
def tree_file(tmp_path):
    """Writes a file of these paths; the name of it."""

    def write(paths, name="tree.json"):
        file = tmp_path / name
        file.write_text(json.dumps({"nodes": [{"path": p} for p in paths]}))
        return str(file)

    return write
