"""A wheel of the package, installed beside nothing of this checkout, does its work."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from runs import ROOT

pytestmark = pytest.mark.packages


def run(command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run([*pip, "--no-build-isolation", "--wheel-dir", folder, ROOT])
    [path] = folder.iterdir()
    return path


def test_it_holds_every_file_of_the_package_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mtp_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("mtp_jax/")} == package
    assert "mtp_jax/py.typed" in package
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.fixture
def elsewhere(wheel, tmp_path, monkeypatch):
    """`python ARGUMENTS` in an empty folder, with the wheel's files and no others."""
    site, work = tmp_path / "site", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    run([*pip, "--target", site, wheel])
    work.mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(site),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def python(*arguments, **more):
        command = [sys.executable, *arguments]
        return run(command, cwd=work, env={**environment, **more})

    return python


@pytest.mark.timeout(900)
def test_it_prepares_trains_evaluates_and_generates(elsewhere, tmp_path):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler here")
    # A compiler that writes down what it is asked to compile.
    log, spy = tmp_path / "log", tmp_path / "spy"
    spy.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shlex.join(compiler)} "$@"\n')
    spy.chmod(0o755)
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path / "work")
    site = pathlib.Path(tmp_path, "site", "mtp_jax")

    def verb(*arguments):
        return elsewhere("-m", "mtp_jax", *arguments, CXX=str(spy))

    assert elsewhere("-c", "import mtp_jax; print(mtp_jax.__file__)").strip() == str(
        site / "__init__.py"
    )
    verb("prepare", f"--input={site}", "--output=data/tiny", "--heldout=0.2")
    verb("train", "--config=tiny.py", "--workdir=run", "--config.train.steps=20")
    assert "bits per byte" in verb("evaluate", "--workdir=run", "--max_batches=2")
    few = ["--heldout=2", "--prompt_tokens=16", "--max_new_tokens=16"]
    table = verb("generate", "--workdir=run", *few, "--compare")
    assert "speculative exact" in table
    made = verb("generate", "--workdir=run", "--prompt=def ", "--json")
    assert json.loads(made)["text"]

    assert f"{site}/decode/cpu/native/native.cc" in log.read_text()
    [library] = (tmp_path / "cache" / "mtp_jax").glob("*.so")
    assert library.stat().st_size > 0
