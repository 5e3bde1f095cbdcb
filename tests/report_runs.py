"""Runs for reports: files as training writes them, of steps that nobody trained."""

import json
import math

import numpy as np

from mtp_jax.config import config_to_json, freeze

TINY = {
    "vocab_size": 256,
    "d_model": 16,
    "num_layers": 5,
    "num_query_heads": 2,
    "num_kv_heads": 1,
    "d_head": 8,
    "d_ff": 32,
}
BEGIN = 1_795_000_000  # the Unix time of the first start


def record(step, heads=4, seed=0):
    """A record of a step whose losses fall."""
    rng = np.random.default_rng([seed, step])
    loss = 1 + 4 / math.sqrt(step) + 0.2 * rng.random(heads) + 0.3 * np.arange(heads)
    right = 0.7 - 0.1 * np.arange(heads) - 0.05 * rng.random(heads)
    return {
        "step": step,
        "batch_hash": f"{step:016x}",
        "loss": float(loss.sum()),
        **{f"loss/head_{i}": float(x) for i, x in enumerate(loss, 1)},
        **{f"accuracy/head_{i}": float(x) for i, x in enumerate(right, 1)},
        "accept/length": 1 + (heads - 1) * 0.4,
        "grad_norm": 2.0 + float(rng.random()),
        "lr": 0.001 * (1 - step / 1e7),
        "bad_steps": 0,
        "tokens": 640,
        "tokens_per_s": 8000.0 + 100 * float(rng.random()),
        "step_s": 0.08,
        "data_wait_share": 0.02,
        "goodput": 1 - 0.5 / step,
        "time": BEGIN + 10 + 4.0 * step,
    }


def heldout(step, heads=4):
    """A record of an evaluation, with the text that was written then."""
    found = {"step": step, "bits_per_byte": 2.0 + 1 / step, "batches": 4}
    found |= {f"loss/head_{i}": 1.5 + 0.3 * i for i in range(1, heads + 1)}
    found |= {f"accuracy/head_{i}": 0.6 - 0.1 * i for i in range(1, heads + 1)}
    found |= {f"accept/head_{i}": 0.9 - 0.2 * i for i in range(2, heads + 1)}
    found |= {"accept/length": 1.5, "prompt": "def f(", "sample": "x, y):\n"}
    return found


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder, rows, *, heads=4, evaluations=(), starts=(0,), config=None):
    """A workdir with these records of steps, started again after some of them."""
    folder.mkdir(parents=True)
    sections = {"model": {**TINY, "n_future_tokens": heads}, **(config or {})}
    configs = [
        config_to_json(freeze({**sections, "optim": {"peak_lr": 1e-3 * 2**i}}))
        for i in range(len(starts))
    ]
    run = {
        "config": configs[-1],
        "tokenizer": {"kind": "bytes", "fingerprint": "x"},
        "versions": {"jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
        "command": ["mtp-jax", "train", "--workdir=$(rm -rf ~)<script>"],
        "runs": [
            {
                "after": after,
                "rows": 2 * after,
                "time": f"2026-11-18T11:{6 + i:02d}:40Z",
                "processes": 1,
                "devices": 1 + i,
                "corpora": ["abc"],
                "config": configs[i],
            }
            for i, after in enumerate(starts)
        ],
        "goodput": {
            "seconds": {"step": 90.0, "compile": 5.0, "lost": 5.0, "save": 0.0},
            "at": BEGIN + 100,
            "finished": True,
        },
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text(lines(rows))
    if evaluations:
        text = lines(heldout(step, heads) for step in evaluations)
        (folder / "heldout.jsonl").write_text(text)
    return folder


def write_results(folder):
    """The files of an evaluation and of a task in a workdir."""
    heads = [
        {"offset": i, "loss": 1.0 + i, "perplexity": 3.0, "accuracy": 0.5 / i}
        for i in (1, 2, 3, 4)
    ]
    evaluation = {
        "step": 40,
        "data": ["data/<b>bold</b>"],
        "heads": heads,
        "bits_per_byte": 2.0159,
        "accept": {"length": 2.2, "by_head": [0.5, 0.4, 0.3]},
        "batches": 3,
        "tokens": 1234,
        "bytes": 1234,
    }
    (folder / "eval.json").write_text(json.dumps(evaluation))
    task = {
        "task": "copa",
        "metrics": {"acc": {"value": 0.625, "low": 0.5, "high": 0.75}},
        "settings": {"step": 40, "sha256": "s"},
        "items": [
            {"item": i, "scores": {"acc": float(i % 2)}, "weight": 1.0}
            for i in range(8)
        ],
    }
    (folder / "eval").mkdir()
    (folder / "eval" / "copa.json").write_text(json.dumps(task))


def nan_steps(rows, bad):
    """The records with some steps that were not finite, as a run writes them."""
    for row in rows:
        if row["step"] in bad:
            for name in row:
                if name.startswith(("loss", "grad_norm")):
                    row[name] = None
            row["bad_steps"] = 1
    return rows
