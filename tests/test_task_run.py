"""Measurements of tasks: figures, interruptions, drafting, comparisons, refusals."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from head_cases import model_of
from llamas import restored
from models import TINY, mesh_of, placed_params, random_params
from task_files import WORDS, task_files
from test_sandbox import working_sandbox

from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.eval.comparison import compare_runs
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.eval.task_data import TaskSettings
from mtp_jax.eval.task_run import evaluate_tasks
from mtp_jax.reports.task_table import comparison_lines, task_lines


@functools.cache
def model(kind=None):
    """A model of bytes that was never trained, and writes ASCII all the same."""
    cfg = dataclasses.replace(model_of(kind, n=2) if kind else TINY, vocab_size=256)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        params = random_params(cfg)
        for name in ("w_unembedding", "w_markov_out"):
            if name in params:
                table = np.moveaxis(params[name], -2, 0)  # heads may have their own
                table[:32] = table[127:] = 0.0
        params = placed_params(cfg, params)
    return restored(cfg, params, mesh, ByteTokenizer(), seq_len=64)


@pytest.fixture
def data(tmp_path):
    return task_files(tmp_path / "data")


def measured(data, folder, *tasks, of=None, **settings):
    of_call = {k: settings.pop(k) for k in ("decoder", "sandbox", "progress", "report")
               if k in settings}  # fmt: skip
    return evaluate_tasks(
        of or model(),
        tasks,
        data,
        settings=TaskSettings(**{"batch_size": 2, **settings}),
        folder=folder,
        **of_call,
    )


def naive_log_prob(context, continuation):
    """The log-probability of a continuation, from the logits of training."""
    tokenizer = model().tokenizer
    before = [tokenizer.bos_id, *tokenizer.encode(context)]
    ids = [*before, *tokenizer.encode(continuation)]
    logits = np.asarray(head_outputs(model(), np.array([ids])).logits_NBTV[0, 0])
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_TV = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return sum(log_TV[t - 1, ids[t]] for t in range(len(before), len(ids)))


def test_choices_are_those_of_the_logits(data, tmp_path):
    result = measured(data, tmp_path, "piqa")["piqa"]

    right, right_norm = [], []
    for i, word in enumerate(WORDS):
        choices = [word, word[::-1] + "xy"]
        context = f"Question: {word} it\nAnswer:"
        scores = np.array([naive_log_prob(context, f" {x}") for x in choices])
        np.testing.assert_allclose(
            result["items"][i]["results"][0]["log_probs"], scores, atol=1e-3
        )
        right.append(float(scores.argmax() == i % 2))
        right_norm.append(float((scores / [len(x) for x in choices]).argmax() == i % 2))
    assert result["metrics"]["acc"]["value"] == np.mean(right)
    assert result["metrics"]["acc_norm"]["value"] == np.mean(right_norm)
    assert json.loads((tmp_path / "piqa.json").read_text()) == result


def test_bits_per_byte_are_over_all_bytes(data, tmp_path):
    result = measured(data, tmp_path, "bits_per_byte")["bits_per_byte"]

    nats = bytes_ = 0.0
    for i, word in enumerate(WORDS):
        text = f"{word} " * (1 + 9 * i)
        bytes_ += len(text)
        if len(text) <= 64:  # in one window
            found = result["items"][i]["results"][0]["nats"]
            assert found == pytest.approx(-naive_log_prob("", text), abs=1e-3)
        nats += result["items"][i]["results"][0]["nats"]
    value = result["metrics"]["bits_per_byte"]["value"]
    assert value == pytest.approx(nats / bytes_ / np.log(2))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("task", ["piqa", "mbpp", "bits_per_byte"])
def test_an_interrupted_measurement_goes_on_to_the_same_result(data, tmp_path, task):
    settings, extra = {}, {}
    if task == "mbpp":
        sandbox = working_sandbox(None)
        settings = {"samples": 2, "shots": 0, "max_new_tokens": 8, "limit": 3}
        extra = {"decoder": Blockwise(), "sandbox": sandbox}
    whole = measured(data, tmp_path / "whole", task, **settings, **extra)[task]
    told = []

    def interrupt(name, done, total):
        told.append(done)
        if done and len(told) % 2 == 0:
            raise Interrupted

    kept = tmp_path / "cut" / f"{task}.partial.jsonl"
    for _ in range(30):
        try:
            found = measured(
                data, tmp_path / "cut", task, progress=interrupt, **settings, **extra
            )[task]
            break
        except Interrupted:
            with open(kept, "a") as file:  # as if killed in the midst of a line
                file.write('{"item": 3, "sam')
    assert len(told) > 3
    assert found == whole
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [f"{task}.json"]


def test_a_batch_that_is_there_in_part_is_made_again(data, tmp_path):
    measured(data, tmp_path, "piqa")
    whole = json.loads((tmp_path / "piqa.json").read_text())
    (tmp_path / "piqa.json").unlink()

    def interrupt(name, done, total):
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        measured(data, tmp_path, "piqa", progress=interrupt)
    kept = tmp_path / "piqa.partial.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:-1]) + "\n")  # three of four results
    done = []

    found = measured(data, tmp_path, "piqa", progress=lambda n, d, t: done.append(d))

    assert done == [2, 4, 5]
    assert found["piqa"] == whole


def test_what_is_there_of_other_settings_is_begun_anew(data, tmp_path):
    lines = []
    measured(data, tmp_path, "piqa", limit=3)
    measured(data, tmp_path, "piqa", limit=3, report=lines.append)
    assert "is there already" in lines.pop()
    (tmp_path / "piqa.partial.jsonl").write_text(
        json.dumps({"settings": {"step": 1}, "chosen": {}}) + "\n"
    )

    result = measured(data, tmp_path, "piqa", limit=4, report=lines.append)

    assert "begins anew" in lines[-1] and "limit" in lines[-1]
    assert len(result["piqa"]["items"]) == 4


@pytest.mark.parametrize("text", ["", "nonsense\n", "[1]\n", '{"settings": 3}\n'])
def test_a_file_that_holds_no_results_is_begun_anew(data, tmp_path, text):
    lines = []
    (tmp_path / "piqa.partial.jsonl").write_text(text)

    result = measured(data, tmp_path, "piqa", limit=1, report=lines.append)

    assert "is no result of this program" in lines[0]
    assert len(result["piqa"]["items"]) == 1


@pytest.mark.parametrize("kind", [None, "serial", "anticausal, shared, bias"])
def test_drafting_changes_no_greedy_answer(data, tmp_path, kind):
    of = model(kind)
    found = [
        measured(
            data, tmp_path / decoder.__name__, "triviaqa", decoder=decoder(), of=of
        )["triviaqa"]
        for decoder in (Plain, Blockwise)
    ]

    texts = [[x["results"][0]["text"] for x in r["items"]] for r in found]
    assert texts[0] == texts[1]
    assert found[0]["metrics"] == found[1]["metrics"]
    plain, drafted = (r["drafting"]["tokens_per_forward"] for r in found)
    assert plain == 1.0 <= drafted
    assert found[1]["drafting"]["decoder"]["name"] == "blockwise"


def test_the_faster_decoder_is_chosen_and_both_are_told(data, tmp_path):
    result = measured(data, tmp_path, "triviaqa", max_new_tokens=8)["triviaqa"]

    speeds = result["drafting"]["tokens_per_s"]
    assert set(speeds) == {"plain", "blockwise"}
    fastest = max(speeds, key=speeds.get)
    assert result["drafting"]["decoder"]["name"] == fastest
    [line] = [x for x in task_lines(result) if "written by" in x]
    assert fastest in line


def test_long_prompts_are_cut_from_the_left_and_counted(data, tmp_path):
    rows = [{"context": "x" * 300 + "?", "answer": "y", "aliases": []}]
    rows += [{"context": "x?", "answer": "y", "aliases": []}]
    path = data / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = measured(path, tmp_path, "triviaqa")["triviaqa"]

    assert result["truncated"] == 1
    assert result["max_new_tokens"] == 32  # half of what the model reads
    assert any("1 prompts were longer" in line for line in task_lines(result))


def test_several_temperatures_are_told_apart_from_the_best(data, tmp_path):
    sandbox = working_sandbox(None)

    result = measured(
        data, tmp_path, "mbpp", sandbox=sandbox, samples=2, temperatures=(0.2, 1.0),
        k=(1, 2), shots=0, max_new_tokens=4, decoder=Plain(), limit=2,
    )["mbpp"]  # fmt: skip

    assert set(result["metrics"]) == {
        f"pass@{k} at {which}"
        for k in (1, 2)
        for which in ("temperature 0.2", "temperature 1", "the best temperature")
    }
    assert result["metrics"]["pass@1 at the best temperature"]["temperature"] == 0.2
    assert len(result["items"][0]["results"]) == 4


def test_maths_with_several_samples_has_pass_at_k(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    path = tmp_path / "maths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = measured(
        path, tmp_path, "gsm8k", samples=3, k=(1, 3), shots=1, max_new_tokens=4,
        decoder=Plain(), temperatures=(1.0,),
    )["gsm8k"]  # fmt: skip

    assert set(result["metrics"]) == {
        "exact_match", "exact_match_flexible", "pass@1", "pass@3",
    }  # fmt: skip
    assert [item["id"] for item in result["items"]] == ["2", "3"]
    for item in result["items"]:
        right = [r["scores"]["exact_match"] for r in item["results"]]
        assert item["scores"]["pass@3"] == float(any(right))
        assert item["scores"]["pass@1"] == pytest.approx(np.mean(right))


def test_runs_are_compared_by_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    base_P = rng.random(200)
    for name, shift in (("a", 0.0), ("b", 0.02), ("c", 0.0)):
        values_P = base_P + shift + rng.normal(0, 0.01, 200) * (name != "a")
        items = [{"item": i, "scores": {"acc": v}} for i, v in enumerate(values_P)]
        result = {
            "metrics": {"acc": {"value": values_P.mean()}},
            "items": items[: 200 if name != "c" else 150],
            "settings": {"sha256": "x"},
        }
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        (folder / "piqa.json").write_text(json.dumps(result))
        if name != "c":
            (folder / "copa.json").write_text(
                json.dumps({**result, "settings": {"sha256": name}})
            )
    runs = [str(tmp_path / name) for name in "abc"]

    copa, piqa = compare_runs(runs)

    better, same = piqa.differences
    assert better.certain and 0.018 < better.low < 0.02 < better.high < 0.022
    assert not same.certain and same.low < same.value < same.high
    assert copa.differences == ["other data", None] and copa.values[2] is None
    lines = comparison_lines([copa, piqa], ["a", "b", "c"])
    assert "+0.02" in lines[2] and "*" in lines[2] and "other data" in lines[1]
