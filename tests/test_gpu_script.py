"""The GPU script rehearsed on a CPU, and its tables against results by hand."""

import json
import pathlib
import subprocess
import sys

import pytest
from runs import ROOT, start

from benchmarks.gpu import profile, results, tables
from mtp_jax.errors import UserError

ABOUT = {"device": "NVIDIA H100", "jax": "0.11.2", "rehearsed": False}


def training(name, n, head_loss, **figures):
    case = {"shape": name, "n": n, "head_loss": head_loss, "scan_layers": "auto"}
    return {"part": "training", **case, **figures, **ABOUT}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_parts_are_rehearsed(tmp_path):
    out = tmp_path / "gpu.jsonl"
    process = start(
        ["--rehearse", f"--out={out}", "--minutes=22"],
        program=("env", f"PYTHON={sys.executable}", ROOT / "benchmarks" / "gpu.sh"),
    )
    _, err = process.communicate(timeout=1400)

    assert process.returncode == 0, err[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    parts = {row["part"] for row in rows}
    assert parts == {
        "equality", "training", "torch_training", "decoding", "profile",
        "torch_decoding", "vllm_decoding",
    }  # fmt: skip
    assert all(row["rehearsed"] and row["device"] for row in rows)
    assert all(row["ok"] for row in rows if row["part"] == "equality")
    assert not [row for row in rows if "error" in row and "installed" not in
                row["error"] and "rehearsed" not in row["error"]]  # fmt: skip
    measured = [row for row in rows if row["part"] == "training"]
    assert {
        (row["shape"], row["n"], row["head_loss"], row["scan_layers"])
        for row in measured
    } == set(tables._CASES)
    assert all(row["tokens_per_s"] > 0 and row["planned_bytes"] > 0 for row in measured)
    text = "\n".join(tables.tables(rows))
    assert "a rehearsal at tiny shapes" in text


def test_what_was_not_measured_says_so():
    lines = tables.tables([])

    assert "not measured" in lines[0]
    cells = [c for line in lines if line.startswith("| 1.3b, n=4, fused |") for c in
             line.split(" | ")[1:6]]  # fmt: skip
    assert cells == ["not measured"] * 5


def test_tables_have_the_figures_and_their_ratios():
    rows = [
        training("1.3b", 1, "fused", tokens_per_s=200.0, step_s=1.0,
                 executed_flops_per_step=10.0, peak_share=0.5,
                 peak_bytes=3 * 2**30, planned_bytes=2**30),
        training("1.3b", 4, "fused", tokens_per_s=150.0, step_s=1.5,
                 executed_flops_per_step=12.0, peak_share=None, peak_bytes=None,
                 planned_bytes=2**30),
        {"part": "torch_training", "shape": "1.3b", "n": 1, "tokens_per_s": 160.0,
         **ABOUT},
    ]  # fmt: skip

    lines = "\n".join(tables.tables(rows))

    assert "NVIDIA H100, jax 0.11.2" in lines
    one = "| 1.3b, n=1, fused | 200 | 0.50 | 3.0 | 1.0 |  | 1.25 |"
    # 1.5 times the step for 1.2 times the arithmetic.
    four = "| 1.3b, n=4, fused | 150 | not measured | not measured | 1.0 | 1.25 |  |"
    assert one in lines and four in lines


def test_the_last_result_of_a_case_counts():
    rows = [training("0.3b", 1, "fused", tokens_per_s=x) for x in (1.0, 7.0)]

    assert any(
        line.startswith("| 0.3b, n=1, fused | 7 |") for line in tables.tables(rows)
    )


def test_an_error_is_a_result_and_the_rest_goes_on(tmp_path, capsys):
    found = results.Results(str(tmp_path / "r.jsonl"), True, "cpu")

    with found.failures_told("training", n=4):
        raise MemoryError("no room\nat all")
    found.add("training", n=1, step_s=2.0)

    first, second = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert first["error"] == "MemoryError: no room at all" and first["n"] == 4
    assert second["step_s"] == 2.0


def test_busy_time_counts_overlaps_once():
    assert profile._length([(5, 9), (0, 4), (3, 6), (20, 21)]) == 10
    assert profile._length([]) == 0
    assert profile._kind("ncclDevKernel_AllReduce") == "collectives"
    assert profile._kind("MemcpyD2D") == "copies"
    assert profile._kind("fusion_12") == "rest"


@pytest.mark.parametrize("text", ["{", "[]\n", '{"a": 1}\n'])
def test_what_is_no_file_of_results_is_refused(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_text(text)

    with pytest.raises(UserError, match=r"r\.jsonl"):
        tables._read(str(path))


def test_an_unknown_option_of_the_script_is_refused():
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--fast"], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert "unknown option --fast" in done.stderr
    assert not pathlib.Path("gpu.jsonl").exists()
