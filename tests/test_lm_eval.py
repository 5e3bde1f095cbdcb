"""lm-evaluation-harness: its contracts of a model, and the same tasks both ways."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT
from test_evaluate_files import OLD_RUN
from test_task_run import model

pytestmark = [
    pytest.mark.packages,
    pytest.mark.filterwarnings("ignore"),
]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CHOICE = """
task: {name}_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{choices}"
doc_to_target: "{gold}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: rolling_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
WRITTEN = """
task: written_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def harness():
    """The harness's package, offline."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def ours(harness):
    from mtp_jax.eval.lm_eval_model import MtpJaxLM

    return MtpJaxLM(model())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data, and the harness's tasks on it."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    label = "ABCD"
    rows = {
        "arc_easy": [
            {
                "question": f"What is {word}?",
                "choices": {
                    "text": [str(x) for x in rng.choice(WORDS, 4)],
                    "label": list(label),
                },
                "answerKey": label[i % 4],
            }
            for i, word in enumerate(WORDS)
        ],
        "piqa": [
            {"goal": f"{w} more", "sol1": w * 2, "sol2": f"a {w}", "label": i % 2}
            for i, w in enumerate(WORDS)
        ],
        "text": [{"text": f"{word} of them. " * (1 + 5 * i)}
                 for i, word in enumerate(WORDS)],
        "written": [{"context": f"{word}?", "answer": word} for word in WORDS],
    }  # fmt: skip
    for name, of_task in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in of_task)
        (folder / f"{name}.jsonl").write_text(text)
    arc = CHOICE.format(
        name="arc_easy", file=folder / "arc_easy.jsonl",
        text="Question: {{question}}\\nAnswer:", choices="{{choices.text}}",
        gold="{{choices.label.index(answerKey)}}",
    )  # fmt: skip
    piqa = CHOICE.format(
        name="piqa", file=folder / "piqa.jsonl",
        text="Question: {{goal}}\\nAnswer:", choices="{{[sol1, sol2]}}",
        gold="{{label}}",
    )  # fmt: skip
    (folder / "arc.yaml").write_text(arc)
    (folder / "piqa.yaml").write_text(piqa)
    (folder / "rolling.yaml").write_text(ROLLING.format(file=folder / "text.jsonl"))
    (folder / "written.yaml").write_text(WRITTEN.format(file=folder / "written.jsonl"))
    return folder


def by_harness(lm, files, *tasks, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files), include_defaults=False)
    return simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
    )


def figure(found, task, metric):
    return found["results"][task][f"{metric},none"]


def test_the_same_tasks_by_both_ways_have_the_same_figures(ours, files, tmp_path):
    from mtp_jax.eval.task_run import evaluate_tasks

    theirs = by_harness(ours, files, "arc_easy_here", "piqa_here", "rolling_here")

    own = evaluate_tasks(
        model(), ["arc_easy", "piqa", "bits_per_byte"], files, folder=tmp_path
    )
    for task in ("arc_easy", "piqa"):
        for metric in ("acc", "acc_norm"):
            value = own[task]["metrics"][metric]["value"]
            assert value == pytest.approx(figure(theirs, f"{task}_here", metric))
    value = own["bits_per_byte"]["metrics"]["bits_per_byte"]["value"]
    assert value == pytest.approx(figure(theirs, "rolling_here", "bits_per_byte"))


def characters():
    """A tokenizer of transformers with the ids of bytes, for ASCII."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(i): i for i in range(128)} | {"<s>": 254, "</s>": 255, "<u>": 128}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )


class BosHF:
    """The harness's model of transformers, which puts begin of text before contexts."""

    def __new__(cls, llama, tokenizer):
        from lm_eval.models.huggingface import HFLM

        class WithBegin(HFLM):
            def _encode_pair(self, context, continuation):
                before, after = super()._encode_pair(context, continuation)
                return [self.prefix_token_id, *before], after

            def tok_batch_encode(self, strings, **options):
                import torch

                ids, mask = super().tok_batch_encode(strings, **options)
                begin = torch.full((len(ids), 1), self.prefix_token_id)
                assert bool(mask.all()), "texts of one length, as here"
                return torch.cat([begin, ids], 1), torch.cat([mask[:, :1], mask], 1)

        return WithBegin(
            pretrained=llama, tokenizer=tokenizer, batch_size=1, max_length=64
        )


def test_the_harness_has_the_same_figures_with_transformers(ours, files):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import jax

    from mtp_jax.interop.hf_llama import llama_of

    of = model()
    params = jax.tree.map(np.asarray, of.params)
    theirs = BosHF(llama_of(of.config.model, params, 512), characters())
    tasks = ["arc_easy_here", "piqa_here", "rolling_here", "written_here"]

    a, b = (by_harness(lm, files, *tasks, log_samples=True) for lm in (ours, theirs))

    for task in tasks[:2]:
        for x, y in zip(a["samples"][task], b["samples"][task], strict=True):
            for (one_x, _), (one_y, _) in zip(
                x["filtered_resps"], y["filtered_resps"], strict=True
            ):
                assert float(one_x) == pytest.approx(float(one_y), abs=1e-3)
        for metric in ("acc", "acc_norm"):
            assert figure(a, task, metric) == figure(b, task, metric)
    rolling = [figure(found, "rolling_here", "bits_per_byte") for found in (a, b)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)
    for x, y in zip(a["samples"]["written_here"], b["samples"]["written_here"],
                    strict=True):  # fmt: skip
        assert x["resps"] == y["resps"]


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def test_likelihoods_come_in_the_order_of_the_requests(ours):
    pairs = [("a long context here", " x"), ("a", " y"), ("", "abc"), ("a ", "b")]

    found = ours.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    one_by_one = [
        ours.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)[0]
        for pair in pairs
    ]

    for (a, greedy_a), (b, greedy_b) in zip(found, one_by_one, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b
        assert isinstance(a, float) and isinstance(greedy_a, bool)
    again = ours.loglikelihood(instances("loglikelihood", ("a", " b")))
    assert found[3][0] == pytest.approx(again[0][0], abs=1e-4)


def test_likelihoods_of_what_was_written_are_greedy(ours):
    settings = {"until": [], "max_gen_toks": 8}
    [text] = ours.generate_until(instances("generate_until", ("seed", settings)))

    [(_, greedy), (_, other)] = ours.loglikelihood(
        instances("loglikelihood", ("seed", text), ("seed", text[:-1] + "~~"))
    )

    assert greedy and not other


def test_texts_end_before_the_first_stop_string(ours):
    settings = {"until": [], "max_gen_toks": 16}
    [whole] = ours.generate_until(instances("generate_until", ("seed", settings)))
    middle = whole[len(whole) // 2]
    stopping = {"until": ["\n\n\n\n", middle], "max_gen_toks": 16}
    requests = [("seed", stopping), ("other", settings), ("seed", {**settings})]

    cut, other, same = ours.generate_until(instances("generate_until", *requests))

    assert cut == whole[: whole.index(middle)] and same == whole
    [alone] = ours.generate_until(instances("generate_until", ("other", settings)))
    assert other == alone


def test_drafting_is_on_and_changes_no_greedy_text(ours, harness):
    from mtp_jax.eval.lm_eval_model import MtpJaxLM

    settings = {"until": ["q"], "max_gen_toks": 20, "do_sample": False}
    requests = instances("generate_until", *((word, settings) for word in WORDS))

    plain = MtpJaxLM(model(), decoder="plain")
    drafts = [
        len(lm._generator.generate(["x"], max_new_tokens=8, decoder=lm._decoder)[0]
            .accepted_by_head)
        for lm in (ours, plain)
    ]  # fmt: skip

    assert drafts == [1, 0]
    assert ours.generate_until(requests) == plain.generate_until(requests)


def test_repeats_are_drawn_apart_and_again(ours):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = instances("generate_until", *[("seed", settings)] * 6)

    texts = ours.generate_until(requests)

    assert len(set(texts)) == 6
    assert ours.generate_until(requests) == texts


def test_long_contexts_are_cut_from_the_left(ours):
    settings = {"until": [], "max_gen_toks": 8}
    long = "x" * 300 + "the end of it"
    room = ours.max_length - 8 - 1

    cut, same = ours.generate_until(
        instances("generate_until", (long, settings), (long[-room:], settings))
    )

    assert cut == same


def test_the_harness_runs_as_a_command(harness, files, tmp_path):
    command = [
        sys.executable, "-m", "mtp_jax.eval.lm_eval_model", "run",
        "--model", "mtp_jax", "--model_args", f"workdir={OLD_RUN}",
        "--tasks", "piqa_here", "--include_path", str(files),
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(file.read_text())["results"]["piqa_here"]
