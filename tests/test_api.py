"""The package from Python: public names, the page of examples, outputs and batches."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import jax
import naive
import numpy as np
import pytest
from models import TINY, mesh_of, placed_batch, placed_params, random_params
from runs import ROOT, complete

import mtp_jax
from mtp_jax import __main__
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, DataConfig
from mtp_jax.data.packing import batch_hash
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.training.batches import batch_of
from mtp_jax.training.train_step import make_init, make_step
from mtp_jax.verification.settings import VerifySettings


def in_new_process(code):
    """Stdout of Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import mtp_jax",
        "from mtp_jax.cli.version import version_text; version_text()",
        "import mtp_jax.__main__",
    ],
)
def test_what_need_not_import_jax_does_not(code):
    assert in_new_process(f"import sys; {code}; print('jax' in sys.modules)") == (
        "False\n"
    )


def test_signals_have_their_meaning_before_anything_large_is_imported():
    code = (
        "import sys, mtp_jax.__main__; print({'asyncio', 'etils'} & sys.modules.keys())"
    )
    assert in_new_process(code) == "set()\n"


@pytest.mark.parametrize("verb", ["train", "evaluate", "verify", "calibrate"])
def test_flags_are_read_without_jax(verb):
    code = (
        f"import sys; from mtp_jax.cli import {verb}\n"
        f"try: {verb}.main(['--help'])\n"
        "except SystemExit: print('jax' in sys.modules)"
    )
    assert in_new_process(code).endswith("False\n")


def test_every_public_name_resolves():
    for name in mtp_jax.__all__:
        assert getattr(mtp_jax, name).__name__ == name
        assert getattr(mtp_jax, name).__doc__
    assert set(mtp_jax.__all__) <= set(dir(mtp_jax))
    with pytest.raises(AttributeError, match="no attribute 'generte'"):
        mtp_jax.generte  # noqa: B018


def test_type_checkers_see_the_names_where_they_are():
    tree = ast.parse(pathlib.Path(mtp_jax.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}

    assert seen == mtp_jax._MODULES
    assert sorted(seen) == mtp_jax.__all__


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_of_examples_runs(tmp_path):
    """Every Python block of docs/python.md, one after another in one program."""
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "texts").mkdir()
    # So many that some of them are held out, whatever they hold.
    for i, path in enumerate(sorted((ROOT / "mtp_jax").rglob("*.py"))):
        (tmp_path / "texts" / f"{i}.py").write_bytes(path.read_bytes())
    script = tmp_path / "page.py"
    body = "\n".join([f"import os; os.chdir({str(tmp_path)!r})", *blocks])
    script.write_text(body)

    out = complete([str(script)], timeout_s=840, program=(sys.executable,))

    assert len(blocks) >= 9
    assert "5 batches are those of the log" in out
    # A control may go unnoticed: the model is small and the samples are few.
    proofs = [x for x in out.splitlines() if x.startswith(("law", "equal texts"))]
    assert any("law speculative" in proof for proof in proofs)
    assert all(proof.endswith("True") for proof in proofs)
    for own in blocks[-3:]:  # with JAX code of one's own
        assert len(own.splitlines()) <= 10


def test_the_page_names_every_public_function():
    page = (ROOT / "docs" / "python.md").read_text()

    missing = [name for name in mtp_jax.__all__ if not re.search(rf"\b{name}\b", page)]
    assert set(missing) <= {"Restored"}  # what restore_model returns


def restored_on(mesh):
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        placed = placed_params(TINY, params)
    config = Config(model=TINY, data=DataConfig(sources=("corpus",)))
    return Restored(config, placed, mesh, 7, ByteTokenizer()), params


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
def test_head_outputs_are_those_of_the_paper(shape):
    restored, params = restored_on(mesh_of(*shape))
    rows = naive.packed_rows(np.random.default_rng(0), 3, 12, 32, padding=2)
    inputs = [rows[name] for name in ("tokens", "segments", "positions")]

    outputs = head_outputs(restored, rows["tokens"], rows["segments"])

    expected_NBTV = naive.all_logits(TINY, params, *inputs)
    assert outputs.logits_NBTV.dtype == np.float32
    np.testing.assert_allclose(outputs.logits_NBTV, expected_NBTV, rtol=1e-3, atol=1e-4)
    made_NBTV = np.asarray(outputs.hidden_NBTD) @ params["w_unembedding"].T
    np.testing.assert_allclose(made_NBTV, outputs.logits_NBTV, rtol=1e-3, atol=1e-4)


def test_without_segments_a_row_is_one_document():
    restored, params = restored_on(mesh_of())
    tokens_BT = np.arange(8).reshape(1, 8)

    _, logits_NBTV = head_outputs(restored, tokens_BT.tolist())

    same_BT = np.ones_like(tokens_BT)
    expected_NBTV = naive.all_logits(
        TINY, params, tokens_BT, same_BT, np.arange(8)[None]
    )
    np.testing.assert_allclose(logits_NBTV, expected_NBTV, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        ([1, 2], None, r"shape \(2,\)"),
        ([[0.5]], None, "float64"),
        ([[1, 32]], None, "from 1 to 32; the model knows 0 to 31"),
        ([[1, 2]], [[1]], r"segments have shape \(1, 1\)"),
    ],
)
def test_wrong_tokens_are_refused(tokens, segments, message):
    restored, _ = restored_on(mesh_of())
    with pytest.raises(UserError, match=message):
        head_outputs(restored, tokens, segments)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_of_ones_own_train_as_those_of_a_corpus(accumulation):
    config = Config(model=TINY)
    rows = naive.packed_rows(np.random.default_rng(0), 8, 12, 32, padding=2)
    with jax.set_mesh(mesh_of(2, 2, 1)):
        batch = batch_of(rows["tokens"], rows["segments"], accumulation=accumulation)
        expected = placed_batch(rows, accumulation)
        state = make_init(config)(jax.random.key(0))
        _, metrics = make_step(config)(state, batch)

    for name, x_AMS in expected.items():
        np.testing.assert_array_equal(batch[name], x_AMS)
    assert batch["tokens"].sharding == expected["tokens"].sharding
    hashes = np.asarray(batch["hash"]).reshape(8, 2)
    assert len({tuple(pair) for pair in hashes.tolist()}) == 8
    np.testing.assert_array_equal(metrics["hash"], batch_hash(hashes))
    assert np.isfinite(metrics["loss"])


def test_rows_that_do_not_split_are_refused():
    with jax.set_mesh(mesh_of(2, 1, 1)):
        with pytest.raises(UserError, match="3 rows do not split into 2"):
            batch_of(np.ones((3, 5), int), accumulation=2)
        with pytest.raises(UserError, match="do not split evenly"):
            batch_of(np.ones((3, 5), int))
        with pytest.raises(UserError, match="rows of integers"):
            batch_of(np.ones((3, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; give float32 or bfloat16"),
        ({"samples": 0}, "samples is 0"),
        ({"batch_sizes": ()}, r"batch_sizes is \(\)"),
        ({"prompt_tokens": (8, 0)}, r"prompt_tokens is \(8, 0\)"),
    ],
)
def test_settings_of_a_verification_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        VerifySettings(**change)


def test_the_version_is_what_a_bug_report_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "--version"])

    assert __main__.main() == 0

    out = capsys.readouterr().out
    assert out.startswith(f"mtp_jax {mtp_jax.__version__}\nPython 3.")
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        assert re.search(rf"^{name} \d", out, re.MULTILINE)
    assert "platform " in out and "bug" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mtp-jax ca", ["calibrate"]),
        ("mtp-jax ev", ["evaluate"]),
        ("mtp-jax verify --law_t", ["--law_tokens", "--law_tolerance"]),
        ("mtp-jax generate --color a", ["auto", "always"]),
        ("mtp-jax nothing --", []),
    ],
)
def test_a_shell_completes_verbs_and_options(tmp_path, line, words):
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }

    subprocess.run([sys.executable, "-m", "mtp_jax"], env=environment, timeout=60)

    assert (answer.read_text().split() if answer.exists() else []) == words
