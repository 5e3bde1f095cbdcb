"""A small model of mtp_jax, trained, exported and measured by the command line."""

import json
import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]
PYTHON = os.environ.get("MTP_JAX_PYTHON", sys.executable)
BEGIN = 254  # the begin-of-text token of texts of bytes
LENGTH = 128  # tokens of a row
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
# A head size that vLLM has on CPUs, and four heads on a trunk of two layers.
MODEL = {
    "model.d_head": 32,
    "model.num_query_heads": 2,
    "model.num_kv_heads": 1,
    "model.n_future_tokens": 4,
    "model.num_layers": 6,
    "data.seq_len": LENGTH,
    "train.steps": 180,
    "optim.peak_lr": 0.005,
    "eval.every": 0,
    "log.tensorboard": False,
    "log.every": 60,
    "checkpoint.every": 1000,
}


def mtp_jax(*words):
    """Stdout of `python -m mtp_jax words`, which must end well."""
    ended = subprocess.run(
        [PYTHON, "-m", "mtp_jax", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr[-4000:]}"
    return ended.stdout


def has_mtp_jax():
    """True if the Python that is to train can."""
    asked = [PYTHON, "-c", "import mtp_jax, jax, safetensors"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(asked, env=env, capture_output=True).returncode == 0


def dates(day, number, month, count):
    """Dates one after another: what comes next follows from the one before."""
    return ", ".join(
        f"{DAYS[(day + i) % 7]} {1 + (number + i) % 28} {MONTHS[(month + i) % 12]}"
        for i in range(count)
    )


def ids_of(text):
    """The tokens of a text of bytes."""
    return [BEGIN, *text.encode()]


def corpus_of(folder, texts, heldout):
    """Texts as a prepared corpus."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    options = [f"--output={folder / 'corpus'}", f"--heldout={heldout}", "--workers=1"]
    mtp_jax("prepare", f"--input={folder / 'texts.jsonl'}", *options)
    return folder / "corpus"


def trained_on_dates(folder, other=None):
    """The workdir of a model that learned to go on with dates, of other fields too."""
    draw = random.Random(0)
    starts = [[draw.randrange(n) for n in (7, 28, 12)] for _ in range(600)]
    texts = [dates(*start, count=draw.randrange(3, 12)) for start in starts]
    fields = MODEL | {"data.sources": corpus_of(folder / "dates", texts, 0.1)}
    fields |= other or {}
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    file = f"--config={ROOT / 'configs' / 'tiny.py'}"
    mtp_jax("train", file, f"--workdir={folder / 'run'}", *settings)
    return folder / "run"


def exported(workdir, output, format="hf"):
    """The folder of a workdir in another format, for texts of two rows."""
    options = [f"--format={format}", f"--positions={2 * LENGTH}"]
    mtp_jax("export", f"--workdir={workdir}", f"--output={output}", *options)
    return output
