"""Texts and accepted drafts of exported models in vLLM; each engine is a process.

With the same drafts a text takes as many passes in vLLM as in mtp_jax, so passes are
compared by number, and shares of accepted drafts with those of `evaluate`.
"""

import importlib.util
import json
import os
import pathlib
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import exported
import pytest
from engine import SETTINGS
from exported import LENGTH, corpus_of, dates, ids_of, mtp_jax, trained_on_dates
from mtp_vllm import arguments
from mtp_vllm.__main__ import serve_command

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if not exported.has_mtp_jax():
    pytest.skip("MTP_JAX_PYTHON has no mtp_jax", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HERE = pathlib.Path(__file__).parent
# Prompts of 17 to 77 tokens are read in chunks of at most 24, drafts included.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2 * LENGTH,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "disable_log_stats": False,
}
NEW = 60
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
PROMPTS = [dates(i, 3 * i, 2 * i, count=1 + i % 4) + ", " for i in range(8)]
JOB = {"prompts": [ids_of(text) for text in PROMPTS], "sampling": GREEDY}
SURE = 3.3  # standard deviations, beyond which one count of a thousand lies


def run_engine(tmp_path, engine, *jobs, own_process=False):
    """What `engine.py` wrote about some jobs."""
    asked = {"engine": ENGINE | engine, "jobs": jobs}
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    job.write_text(json.dumps(asked))
    env = os.environ | {
        "PYTHONPATH": str(HERE.parent / "src"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
    }
    program = [sys.executable, str(HERE / "engine.py"), str(job), str(out)]
    ended = subprocess.run(program, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained_on_dates(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def folder(workdir):
    return exported.exported(workdir, workdir.parent / "hf")


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """Ids of the prompts' texts without drafts, and of fifty texts of a whole row."""
    starts = [f"{day} {number}" for day in exported.DAYS for number in range(10, 28)]
    starts = [ids_of(text) for text in random.Random(1).sample(starts, 50)]
    rows = [
        {"prompts": [ids], "sampling": GREEDY | {"max_tokens": LENGTH - 1 - len(ids)}}
        for ids in starts
    ]
    found = run_engine(tmp_path_factory.mktemp("plain"), {"model": str(folder)}, JOB)
    rows = run_engine(
        tmp_path_factory.mktemp("rows"),
        {"model": str(folder), "max_num_batched_tokens": 512},
        *rows,
    )
    whole = [ids + row["ids"][0] for ids, row in zip(starts, rows, strict=True)]
    return found[0]["ids"], whole


@pytest.fixture(scope="module")
def held_out(plain, tmp_path_factory):
    """A corpus of the texts of a row, and ids of those that `evaluate` will read."""
    texts = [bytes(ids[1:]).decode() for ids in plain[1]]
    corpus = corpus_of(tmp_path_factory.mktemp("rows") / "own", texts, 0.8)
    tokens = (corpus / "heldout-00000.tokens").read_bytes()
    rows = [list(tokens[i : i + LENGTH]) for i in range(0, len(tokens), LENGTH)]
    assert len(rows) > 20
    assert all(row[:-1] in plain[1] for row in rows)  # then an end of text
    return corpus, rows


@pytest.fixture(scope="module")
def drafting(folder, held_out, tmp_path_factory):
    """Counts of drafting the same texts, of prefixes of rows, and of wrong states."""
    draw = random.Random(2)
    prefixes = [draw.choice(held_out[1]) for _ in range(500)]
    prefixes = [ids[: draw.randrange(2, LENGTH - 4)] for ids in prefixes]
    once = {"prompts": prefixes, "sampling": GREEDY | {"max_tokens": 2}}
    return run_engine(
        tmp_path_factory.mktemp("drafting"),
        arguments(folder),
        JOB,
        JOB,
        once,
        JOB | {"sampling": GREEDY | {"temperature": 1.0}},
        JOB | {"wrong_row": True},
        once,
    )


def passes_of(result):
    """Passes in which a token of a text was sampled."""
    return result["drafts"] + len(result["ids"])


def passes_here(workdir, tmp_path):
    """Passes of mtp_jax's own decoder for the prompts, and ids of their texts."""
    file = tmp_path / "prompts.jsonl"
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    file.write_text(lines)
    options = [f"--prompts={file}", f"--max_new_tokens={NEW}", "--json"]
    said = mtp_jax("generate", f"--workdir={workdir}", *options)
    results = [json.loads(line) for line in said.splitlines()]
    return sum(x["forwards"] for x in results), [x["tokens"] for x in results]


def share_is(share, result, position):
    """True if so many accepted drafts can be chance where this share is accepted."""
    n = result["drafts"]
    deviation = (n * share * (1 - share)) ** 0.5
    return abs(result["accepted"][position] - n * share) <= SURE * deviation


def test_a_batch_says_what_it_says_without_drafts(plain, drafting):
    first = drafting[0]

    print(f"{8 * NEW} tokens in {passes_of(first)} passes")
    assert len(first["ids"]) == 8
    assert first["ids"] == plain[0]
    assert len({tuple(ids) for ids in plain[0]}) == 8
    assert sum(first["accepted"]) > first["drafts"]  # two tokens a pass and more


def test_transformers_say_the_same(folder, plain):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    for prompt, ids in zip(JOB["prompts"], plain[0], strict=True):
        text = torch.tensor([prompt])
        with torch.no_grad():
            found = llama.generate(
                text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert found[0, len(prompt) :].tolist() == ids


def test_passes_are_those_of_the_own_decoder(workdir, drafting, tmp_path):
    passes, ids = passes_here(workdir, tmp_path)

    assert drafting[0]["ids"] == ids
    assert passes_of(drafting[0]) == passes


def test_a_cached_prefix_changes_nothing(drafting):
    first, second = drafting[:2]

    assert sum(first["cached"]) == 0
    assert sum(second["cached"]) > 0
    assert second["ids"] == first["ids"]
    assert passes_of(second) == passes_of(first)


def test_shares_by_position_are_those_of_evaluate(workdir, held_out, drafting):
    mtp_jax("evaluate", f"--workdir={workdir}", f"--data={held_out[0]}")
    [file] = workdir.glob("eval*.json")
    figures = json.loads(file.read_text())
    shares = figures["accept"]["by_head"]
    right, wrong = drafting[2], drafting[5]

    assert figures["tokens"] >= len(held_out[1]) * (LENGTH - 1)
    assert right["drafts"] == 500
    print("evaluate", shares, "vLLM", right["accepted"], "wrong", wrong["accepted"])
    assert all(share_is(share, right, i) for i, share in enumerate(shares))
    assert not any(share_is(share, wrong, i) for i, share in enumerate(shares))


def test_wrong_states_cost_passes_and_no_text(drafting):
    right, wrong = drafting[0], drafting[4]

    assert wrong["ids"] == right["ids"]
    assert passes_of(wrong) > 1.3 * passes_of(right)


def test_sampled_texts_are_drafted_too(drafting):
    sampled = drafting[3]

    assert sampled["ids"] != drafting[0]["ids"]
    assert 0 < sum(sampled["accepted"]) < sum(drafting[0]["accepted"])


def test_the_engine_may_have_a_process_of_its_own(folder, drafting, tmp_path):
    [found] = run_engine(tmp_path, arguments(folder), JOB, own_process=True)

    assert found == drafting[0]


def test_a_server_answers_with_the_same_text(folder, plain, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(serve_command(str(folder)))[1:]
    words += ["--dtype=float32", "--enforce-eager", "--host=127.0.0.1"]
    words += [f"--port={port}", f"--max-model-len={2 * LENGTH}"]
    env = os.environ | SETTINGS | {"PYTHONPATH": str(HERE.parent / "src")}
    asked = {"prompt": PROMPTS[3], "temperature": 0, "max_tokens": NEW}
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [sys.executable, *words],
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        answer = answer_of(server, f"http://127.0.0.1:{port}", asked)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        log.close()

    assert answer["choices"][0]["text"] == bytes(plain[0][3]).decode()


def answer_of(server, address, asked, patience_s=600):
    """What a server completes, once it can."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    end = time.monotonic() + patience_s
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(1)
    raise AssertionError(f"no answer; exit code {server.poll()}")


def test_a_compiled_model_drafts_the_same(folder, drafting, tmp_path):
    compiled = arguments(folder) | {"enforce_eager": False}

    [found] = run_engine(tmp_path, compiled, JOB)

    assert found == drafting[0]


def test_head_2_as_eagle3_is_accepted_as_often(workdir, folder, plain, tmp_path):
    eagle = exported.exported(workdir, tmp_path / "eagle3", "eagle3")
    about = {"method": "eagle3", "model": str(eagle), "num_speculative_tokens": 1}
    as_eagle = {"model": str(folder), "speculative_config": about}
    [theirs] = run_engine(tmp_path, as_eagle, JOB)

    [ours] = run_engine(tmp_path, arguments(folder, 1), JOB)

    assert ours["ids"] == theirs["ids"] == plain[0]
    assert ours["drafts"] == theirs["drafts"]
    assert ours["accepted"] == theirs["accepted"]
    assert ours["accepted"][0] > 0.5 * ours["drafts"]


@pytest.fixture(scope="module")
def one_head(workdir):
    """The workdir of the model without its other heads."""
    output = workdir.parent / "one_head"
    mtp_jax("grow", f"--workdir={workdir}", f"--output={output}", "--heads=1")
    return output


@pytest.mark.parametrize(
    "heads, fields",
    [
        (4, {"norm": "own", "markov_rank": 4}),
        (4, {"kind": "causal", "unembedding": "own"}),
        (3, {"kind": "linear", "norm": "own"}),
        (2, {"layers": 2}),
    ],
    ids=["bias", "causal", "linear", "deep"],
)
def test_every_kind_drafts_as_the_own_decoder(one_head, plain, tmp_path, heads, fields):
    grown = tmp_path / "grown"
    options = [f"--config.heads.{name}={value}" for name, value in fields.items()]
    options += [f"--heads={heads}", f"--output={grown}", "--fit_tokens=8192"]
    mtp_jax("grow", f"--workdir={one_head}", *options)

    found = drafts_as_here(grown, tmp_path)

    assert found["ids"] == plain[0]


def test_residual_heads_of_a_tied_model_draft_as_the_own_decoder(tmp_path):
    fields = {
        "heads.kind": "residual",
        "heads.layers": 2,
        "heads.norm": "own",
        "model.tie_embeddings": True,
        "model.num_layers": 3,
        "model.n_future_tokens": 3,
    }

    drafts_as_here(trained_on_dates(tmp_path, fields), tmp_path)


def drafts_as_here(workdir, tmp_path):
    """What vLLM wrote and counted with an export, after a comparison with mtp_jax."""
    folder = exported.exported(workdir, tmp_path / "hf")
    [found] = run_engine(tmp_path, arguments(folder), JOB)
    passes, ids = passes_here(workdir, tmp_path)
    assert found["ids"] == ids
    assert passes_of(found) == passes
    assert found["accepted"][0] > 0
    return found
