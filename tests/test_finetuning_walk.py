"""The walk of docs/finetuning.md: questions of a model's own, heads for it, exports."""

import json
import os
import subprocess
import sys

import chats
import foreign
import jax
import json_tokenizers
import numpy as np
import pytest
from json_tokenizers import MARKED, TURN, byte_level
from runs import ROOT

from mtp_jax.checkpoint.restore import restore_model

SCRIPT = ROOT / "launch" / "heads_for_smollm2.sh"
QUESTIONS = ROOT / "launch" / "own_questions.py"
SIZES = {
    "DRAWS": "640", "APART": "2", "HELDOUT": "0.3", "ANSWER": "24", "STEPS": "2",
    "FIT": "256", "SEQ": "96", "VERIFY": "--prompt_tokens=8 --samples=64",
}  # fmt: skip


def shell(command, **environment):
    environment = os.environ | {"PYTHON": sys.executable, **environment}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = byte_level([chats.VOCABULARY], size=420)
    json_tokenizers.write(folder, made, MARKED, eos_token=TURN)
    return folder


def test_a_users_turn_begins_where_the_template_puts_words(tokenizer):
    done = shell([sys.executable, QUESTIONS, "begin", tokenizer, 2])

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [{"prompt": f"{json_tokenizers.BEGIN}<user>\n"}] * 2


def test_questions_are_whole_turns_once_each(tmp_path):
    written = [("eos", "How do bees fly?"), ("length", "How do bees fly in"),
               ("eos", "Why so"), ("eos", " How do bees fly? "), ("stop", "Tell me of"),
               ("eos", "What is x = 1?")]  # fmt: skip
    lines = [json.dumps({"finish": how, "text": text}) for how, text in written]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))

    done = shell([sys.executable, QUESTIONS, "keep", tmp_path / "users.jsonl"])

    found = [json.loads(line)["messages"] for line in done.stdout.splitlines()]
    assert found == [
        [{"role": "user", "content": text}]
        for text in ("How do bees fly?", "What is x = 1?")
    ]


def test_what_holds_no_questions_is_refused_in_a_line(tmp_path):
    (tmp_path / "users.jsonl").write_text('{"finish": "eos", "text": "no"}\n')
    for words in (["keep", tmp_path / "users.jsonl"], ["begin", "bytes", 3], []):
        done = shell([sys.executable, QUESTIONS, *words])

        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def chat_model(folder, tokenizer):
    """A random Llama with a chat template that ends its turns after a few tokens."""
    config = foreign.CONFIGS["llama"] | {
        "vocab_size": 420, "max_position_embeddings": 256, "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    tensors, rng = foreign.tensors_of(config), np.random.default_rng(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (0.3 * rng.normal(size=(420, foreign.D))).astype(np.float32)
    tensors["lm_head.weight"][2] *= 3  # of TURN
    foreign.write_folder(folder, config, tensors)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_the_script_goes_from_a_model_to_exports_and_goes_on_where_it_stopped(
    tokenizer, tmp_path
):
    model = chat_model(tmp_path / "theirs", tokenizer)
    out = tmp_path / "out"

    done = shell([SCRIPT, out], MODEL=str(model), **SIZES)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    of_heads = json.loads((out / "hf" / "config.json").read_text())["mtp_heads"]
    assert (of_heads["kind"], of_heads["markov_rank"]) == ("linear", 128)
    assert (out / "gguf" / "model.gguf").exists()
    base, drafting = (restore_model(out / name).params for name in ("base", "heads"))
    of_first = {name: drafting[name] for name in ("w_embedding", "w_unembedding")}
    of_first["norm"] = drafting["norm"][0]
    of_first["trunk"] = jax.tree.map(lambda x: x[:-1], drafting["trunk"])
    for name, x in of_first.items():
        jax.tree.map(np.testing.assert_array_equal, base[name], x)
    asked = (out / "asked.jsonl").read_text().splitlines()
    assert len(asked) > 10
    assert len((out / "heldout.jsonl").read_text().splitlines()) == 2
    assert len((out / "answers.jsonl").read_text().splitlines()) == len(asked)

    # Nothing is done twice; a step that was ended, and those without marks, once more.
    assert "+ mtp_jax" not in shell([SCRIPT, out], MODEL=str(model), **SIZES).stdout
    (out / ".done-export").unlink()
    (out / "hf" / "config.json").unlink()
    done = shell([SCRIPT, out], MODEL=str(model), **SIZES)
    assert done.returncode == 0, done.stderr[-2000:]
    verbs = [line.split()[2] for line in done.stdout.splitlines() if line[0] == "+"]
    assert verbs == ["export"]
    assert (out / "hf" / "config.json").exists()
