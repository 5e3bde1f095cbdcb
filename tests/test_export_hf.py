"""Exported folders in Hugging Face's transformers: as a plain Llama, and drafting."""

import copy
import itertools
import json
import logging
import os
import warnings

import numpy as np
import pytest
import scipy.stats
from export_models import FAMILIES, ids, random_model
from runs import complete, train_args

from mtp_jax import Generator
from mtp_jax.config import LayerConfig
from mtp_jax.data.sentencepiece_tokenizer import train_sentencepiece
from mtp_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.exporting.export import export

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
AutoModel = transformers.AutoModelForCausalLM


def loaded(folder, **options):
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def passes_of(model):
    """Counts the calls of a model's forward pass, in the list that is returned."""
    calls, forward = [], model.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_dir):
    """A workdir of a model that learned a little, and its exported folder."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    steps = ["--config.train.steps=250", "--config.optim.peak_lr=0.005"]
    complete(train_args(workdir, corpus_dir, *steps))
    output = workdir.parent / "hf"
    complete(["export", f"--workdir={workdir}", f"--output={output}"])
    return workdir, output


@pytest.mark.parametrize("tied", [False, True])
def test_without_trust_it_is_a_plain_llama(tmp_path, tied, caplog):
    model = random_model(of_model={"tie_embeddings": tied}, norm="own")
    export(model, tmp_path / "out")

    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_propagation()
        llama = loaded(tmp_path / "out")
        with torch.no_grad():
            found = llama(torch.tensor(ids()[None])).logits[0].numpy()

    assert type(llama).__name__ == "LlamaForCausalLM"
    assert caplog.records == []
    expected_TV = np.asarray(head_outputs(model, ids()[None]).logits_NBTV)[0, 0]
    np.testing.assert_allclose(found, expected_TV, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_the_same_in_transformers(tmp_path, family):
    model = random_model(n=2, of_model=FAMILIES[family])
    export(model, tmp_path / "out", positions=64)
    text_T = ids(40)

    with torch.no_grad():
        plain = loaded(tmp_path / "out")
        found = plain(torch.tensor(text_T[None])).logits[0].numpy()

    assert plain.config.model_type == family
    expected_TV = np.asarray(head_outputs(model, text_T[None]).logits_NBTV)[0, 0]
    np.testing.assert_allclose(found, expected_TV, rtol=1e-4, atol=1e-3)


_QWEN_WINDOWS = {
    "layer": LayerConfig(qk_norm="head", windows=(0, 4, 4)),
    "d_head": 8,
}
DRAFTING = {
    "parallel": {},
    "bias": {"norm": "own", "markov_rank": 3},
    "causal": {"kind": "causal", "layers": 2, "of_model": {"num_layers": 5}},
    "linear": {"kind": "linear", "norm": "own"},
    "residual": {"kind": "residual", "unembedding": "own"},
    "mistral": {"of_model": FAMILIES["mistral"], "norm": "own"},
    "mistral causal": {"of_model": FAMILIES["mistral"], "kind": "causal"},
    "mistral linear": {"of_model": FAMILIES["mistral"], "kind": "linear"},
    "mistral residual": {"of_model": FAMILIES["mistral"], "kind": "residual"},
    "qwen2": {"of_model": FAMILIES["qwen2"], "markov_rank": 3},
    "qwen2 linear": {"of_model": FAMILIES["qwen2"], "kind": "linear"},
    "qwen2 residual": {"of_model": FAMILIES["qwen2"], "kind": "residual"},
    "qwen3": {"of_model": FAMILIES["qwen3"]},
    "qwen3 windows": {"of_model": _QWEN_WINDOWS},
    "qwen3 linear": {"of_model": FAMILIES["qwen3"], "kind": "linear"},
    "qwen3 residual": {"of_model": FAMILIES["qwen3"], "kind": "residual"},
    "olmo2": {"of_model": FAMILIES["olmo2"]},
}


@pytest.mark.parametrize("fields", DRAFTING.values(), ids=DRAFTING)
def test_heads_score_as_the_model_does(tmp_path, fields):
    model = random_model(**fields)
    export(model, tmp_path / "out", positions=64)
    family = loaded(tmp_path / "out", trust_remote_code=True)
    cache = transformers.DynamicCache(config=family.config)
    cache.layers += [
        copy.deepcopy(cache.layers[-1])
        for head in family.mtp.heads
        for _ in getattr(head, "layers", ())
    ]

    with torch.no_grad():
        family(torch.tensor(ids()[None]), cache=cache, run_heads=True)
        expected_NTV = np.asarray(head_outputs(model, ids()[None]).logits_NBTV)[:, 0]
        for number in (0, 1):
            for slot in (3, 7):
                before = torch.tensor(ids()[slot + number + 1][None])
                found = family.draft_scores(number, slot, before)[0].numpy()
                expected_V = expected_NTV[number + 1, slot]
                np.testing.assert_allclose(found, expected_V, rtol=1e-4, atol=1e-3)


# Whose drafts, of these random weights, are all wrong: their texts are compared alone.
NEVER_RIGHT = ("qwen2", "qwen2 linear")
OTHERS = [x for x in DRAFTING if x.startswith(("mistral", "qwen", "olmo2"))]


@pytest.mark.parametrize("name", OTHERS)
def test_families_draft_their_own_text_in_as_few_passes_as_here(tmp_path, name):
    """Of random weights, so small that drafts are often right, and sometimes not."""
    model = random_model(**DRAFTING[name], size=0.4)
    export(model, tmp_path / "out", positions=64)
    plain = loaded(tmp_path / "out")
    drafting = loaded(tmp_path / "out", trust_remote_code=True)
    texts = [bytes(ids(6, seed)).decode("latin-1")[:3] for seed in range(4)]
    calls = passes_of(drafting)
    for text in texts:
        start = torch.tensor([[254, *text.encode()]])

        expected = plain.generate(start, max_new_tokens=30)
        found = drafting.generate(start, max_new_tokens=30, use_mtp=True)

        assert torch.equal(found, expected)
    generator = Generator(model.config.model, model.params, model.tokenizer, model.mesh)
    ours = generator.generate(texts, max_new_tokens=30)
    here = sum(result.forwards for result in ours)
    assert abs(len(calls) - here) <= 0.03 * here
    assert len(calls) < 4 * 30 or name in NEVER_RIGHT
    assert type(plain).__name__ == drafting.config.architectures[0]
    assert type(drafting).__name__ == f"MTP{type(plain).__name__}"


def test_drafting_gives_the_same_text_in_as_few_passes_as_here(folder):
    workdir, output = folder
    generator = Generator.from_checkpoint(workdir)
    plain = loaded(output)
    drafting = loaded(output, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    texts = [
        f"def {name}(self, x):\n" for name in ("read", "save", "of", "run", "main")
    ]
    ours = generator.generate(texts, max_new_tokens=48)
    calls, tokens, here = passes_of(drafting), 0, 0

    for text, result in zip(texts, ours, strict=True):
        of_text = tokenizer(text, return_tensors="pt")
        expected = plain.generate(**of_text, max_new_tokens=48)
        found = drafting.generate(**of_text, max_new_tokens=48, use_mtp=True)
        assert torch.equal(found, expected)
        new = found[0, of_text["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == result.text
        tokens += len(new)
        here += result.forwards

    assert tokens / len(calls) > 1.2
    assert tokens / len(calls) >= 0.97 * tokens / here


def test_sampled_drafts_have_the_law_of_the_model(tmp_path):
    class Four(ByteTokenizer):
        bos_id, eos_id = 0, 3  # which the model has

    small = {"vocab_size": 4}
    model = random_model(tokenizer=Four(), size=0.6, of_model=small)
    export(model, tmp_path / "out")
    llama = loaded(tmp_path / "out", trust_remote_code=True)
    llama.generation_config.eos_token_id = None
    start, count, length = torch.tensor([[0, 1, 2]]), 1000, 3
    texts = list(itertools.product(range(4), repeat=length))
    whole = torch.tensor([[0, 1, 2, *text] for text in texts])
    with torch.no_grad():
        laws = llama(whole).logits.log_softmax(-1).numpy()
    p = np.array(
        [
            np.exp(sum(laws[i, 2 + j, x] for j, x in enumerate(text)))
            for i, text in enumerate(texts)
        ]
    )
    torch.manual_seed(1)
    torch.set_num_threads(1)  # for so small a model more are in each other's way
    calls, seen = passes_of(llama), np.zeros(len(texts))
    with torch.no_grad():
        for _ in range(count):
            options = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
            found = llama.generate(
                start, max_new_tokens=length, use_mtp=True, **options
            )[0, 3:].tolist()
            seen[texts.index(tuple(found))] += 1

    def chance(law):
        """The p-value of the counts, cells of few expected ones taken together."""
        few = law * count < 5
        joined = [np.append(x[~few], x[few].sum()) for x in (seen, law * count)]
        ok = joined[1] > 0
        return scipy.stats.chisquare(joined[0][ok], joined[1][ok]).pvalue

    assert len(calls) < count * length  # drafts were accepted
    assert chance(p) > 1e-3
    assert chance(np.roll(p, 7)) < 1e-9


def test_ids_of_texts_are_those_of_the_tokenizer(tmp_path):
    texts = [f"the {i} cat sat on a mat\n and ate {i * 37}" for i in range(400)]
    made = train_sentencepiece(iter(texts), 300)
    piece = SentencePieceTokenizer(made, "test")
    for tokenizer, size in ((ByteTokenizer(), 256), (piece, 300)):
        output = tmp_path / tokenizer.kind
        export(random_model(tokenizer=tokenizer, of_model={"vocab_size": size}), output)

        library = transformers.AutoTokenizer.from_pretrained(output)

        for text in [*texts[:40], "naïve 🙂 café", "  x\t y\n\n", "caté 12"]:
            expected = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
            assert library(text)["input_ids"] == expected
            assert library.decode(expected, skip_special_tokens=True) == text
        assert library.eos_token_id == tokenizer.eos_id


def test_a_card_has_the_figures_of_the_run(folder):
    workdir, output = folder
    complete(["evaluate", f"--workdir={workdir}", "--max_batches=16"])
    [written] = workdir.glob("eval*.json")
    figures = json.loads(written.read_text())

    card = (output / "README.md").read_text()

    assert f"{figures['heads'][1]['loss']:.4f}" in card
    assert f"accepts {figures['accept']['length']:.3f} tokens" in card


def test_llama_cpp_says_the_same(folder, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    workdir, _ = folder
    export(workdir, tmp_path / "out", format="gguf")
    generator = Generator.from_checkpoint(workdir)
    text = "def read(self):\n"
    [expected] = generator.generate([text], max_new_tokens=40)
    options = llama_cpp.CommonParams()
    options.model.path = str(tmp_path / "out" / "model.gguf")
    options.n_ctx, options.n_parallel, options.warmup = 128, 1, False
    options.verbosity = -1
    server = llama_cpp.Server(options)

    answer = server.handle_completions(
        {"prompt": [254, *text.encode()], "temperature": 0, "n_predict": 40}
    )

    if isinstance(answer, str | bytes):
        answer = json.loads(answer)
    assert answer["choices"][0]["text"] == expected.text
