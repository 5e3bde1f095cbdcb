"""Exported folders in Hugging Face's transformers: as plain models, and drafting."""

import copy
import itertools
import json
import logging
import os
import sys
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
pytestmark = [pytest.mark.packages, pytest.mark.timeout(900)]
AutoModel = transformers.AutoModelForCausalLM


def loaded(folder, **options):
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def in_silence(folder, text_T, caplog):
    """A folder's plain model and its logits [T, V]; a warning of any kind fails."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_propagation()
        plain = loaded(folder)
        with torch.no_grad():
            found_TV = plain(torch.tensor(text_T[None])).logits[0].numpy()
    assert caplog.records == []
    return plain, found_TV


class Few(ByteTokenizer):
    """Begin and end of text among the first ids, for small vocabularies."""

    bos_id, eos_id = 0, 3


def of_few_words(words, size, **fields):
    """A random model of so small a vocabulary that drafts are right now and then."""
    of_model = {**fields.pop("of_model", {}), "vocab_size": words}
    return random_model(tokenizer=Few(), size=size, of_model=of_model, **fields)


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
@pytest.mark.parametrize("family", FAMILIES)
def test_without_trust_it_is_a_plain_model_of_its_family(
    tmp_path, family, tied, caplog
):
    of_model = {**FAMILIES[family], "tie_embeddings": tied}
    model = random_model(norm="own", of_model=of_model)
    export(model, tmp_path / "out", positions=64)
    text_T = ids(40)  # longer than windows, and than the context before a stretch

    plain, found_TV = in_silence(tmp_path / "out", text_T, caplog)

    assert plain.config.model_type == family
    assert type(plain).__name__ == plain.config.architectures[0]
    expected_TV = np.asarray(head_outputs(model, text_T[None]).logits_NBTV)[0, 0]
    np.testing.assert_allclose(found_TV, expected_TV, atol=1e-4)


_QWEN_WINDOWS = {
    "layer": LayerConfig(qk_norm="head", windows=(0, 4, 4)),
    "d_head": 8,
}
DRAFTING = {
    "parallel": {},
    "llama": {"of_model": FAMILIES["llama"]},
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
    "qwen2 residual": {
        "of_model": FAMILIES["qwen2"],
        "kind": "residual",
        "layers": 2,
    },
    "qwen3": {"of_model": FAMILIES["qwen3"]},
    "qwen3 windows": {"of_model": _QWEN_WINDOWS},
    "qwen3 linear": {"of_model": FAMILIES["qwen3"], "kind": "linear"},
    "qwen3 residual": {
        "of_model": FAMILIES["qwen3"],
        "kind": "residual",
        "markov_rank": 2,
    },
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
                np.testing.assert_allclose(found, expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DRAFTING)
def test_each_kind_drafts_its_own_text_in_as_few_passes_as_here(tmp_path, name):
    """Of random weights, whose drafts are now right and now wrong."""
    model = of_few_words(8, 1.0, **DRAFTING[name])
    export(model, tmp_path / "out", positions=64)
    plain = loaded(tmp_path / "out")
    drafting = loaded(tmp_path / "out", trust_remote_code=True)
    texts = [ids(4, seed, vocab=8) for seed in range(12)]
    generator = Generator(model.config.model, model.params, model.tokenizer, model.mesh)
    ours = generator.generate(texts, max_new_tokens=30)
    calls, tokens = passes_of(drafting), 0
    for text, result in zip(texts, ours, strict=True):
        start = torch.tensor([[model.tokenizer.bos_id, *text]])

        expected = plain.generate(start, max_new_tokens=30)
        found = drafting.generate(start, max_new_tokens=30, use_mtp=True)

        assert torch.equal(found, expected)
        end = [] if result.ended_by is None else [result.ended_by]
        new = found[0, start.shape[1] :].tolist()
        assert new == [*result.tokens, *end]
        tokens += len(new)
    here = sum(result.forwards for result in ours)
    assert abs(len(calls) - here) <= 0.01 * here
    assert 1.05 < tokens / len(calls) < 2.5  # of at most 3
    assert type(drafting).__name__ == f"MTP{type(plain).__name__}"


# Lines of code, of which the model learned some.
NAMES = ("read", "save", "of", "run", "main", "load", "find", "close", "parse", "size")
LINES = (
    "def {}(self, x):\n",
    "class {}:\n    ",
    "import {}\n",
    "    for {} in ",
    "    return {}(",
)
PROMPTS = [line.format(name) for line in LINES for name in NAMES]


def test_drafting_gives_the_same_text_in_as_few_passes_as_here(folder):
    workdir, output = folder
    generator = Generator.from_checkpoint(workdir)
    plain = loaded(output)
    drafting = loaded(output, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    ours = generator.generate(PROMPTS, max_new_tokens=48)
    calls, tokens, here = passes_of(drafting), 0, 0

    for text, result in zip(PROMPTS, ours, strict=True):
        of_text = tokenizer(text, return_tensors="pt")
        expected = plain.generate(**of_text, max_new_tokens=48)
        found = drafting.generate(**of_text, max_new_tokens=48, use_mtp=True)
        assert torch.equal(found, expected)
        new = found[0, of_text["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == result.text
        tokens += len(new)
        here += result.forwards

    assert len(PROMPTS) == 50
    assert tokens / len(calls) > 1.2
    assert tokens / len(calls) >= 0.97 * tokens / here


START, LENGTH, WORDS = torch.tensor([[0, 1, 2]]), 3, 4
TEXTS = list(itertools.product(range(WORDS), repeat=LENGTH))


def law_of(llama):
    """The probability of each of `TEXTS` after `START`, by one pass each."""
    whole = torch.tensor([[*START[0].tolist(), *text] for text in TEXTS])
    with torch.no_grad():
        laws = llama(whole).logits.log_softmax(-1).numpy()
    scores = [
        sum(laws[i, 2 + j, x] for j, x in enumerate(text))
        for i, text in enumerate(TEXTS)
    ]
    return np.exp(scores)


def drawn(llama, count):
    """How often each of `TEXTS` is written, of so many that are sampled."""
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "use_mtp": True}
    seen = np.zeros(len(TEXTS))
    with torch.no_grad():
        for _ in range(count):
            found = llama.generate(START, max_new_tokens=LENGTH, **options)
            seen[TEXTS.index(tuple(found[0, START.shape[1] :].tolist()))] += 1
    return seen


def chance(seen, law):
    """The p-value of counts, cells of few expected ones taken together."""
    expected = law * seen.sum()
    few = expected < 5
    joined = [np.append(x[~few], x[few].sum()) for x in (seen, expected)]
    ok = joined[1] > 0
    return scipy.stats.chisquare(joined[0][ok], joined[1][ok]).pvalue


def test_sampled_drafts_have_the_law_of_the_model(tmp_path, monkeypatch):
    export(of_few_words(WORDS, 0.6), tmp_path / "out")
    llama = loaded(tmp_path / "out", trust_remote_code=True)
    llama.generation_config.eos_token_id = None
    law, count = law_of(llama), 1000
    torch.manual_seed(1)
    torch.set_num_threads(1)  # for so small a model more are in each other's way
    calls = passes_of(llama)

    seen = drawn(llama, count)

    assert len(calls) < count * LENGTH  # drafts were accepted
    assert chance(seen, law) > 1e-3

    # The negative control: drafts are said to be drawn from another law than they are.
    code = sys.modules[type(llama).__module__]
    right = code.HeadDrafts.get_candidates

    def wrong(*args, **kwargs):
        found, laws = right(*args, **kwargs)
        return found, None if laws is None else 0 * laws

    monkeypatch.setattr(code.HeadDrafts, "get_candidates", wrong)
    control = chance(drawn(llama, count), law)
    assert control < 1e-9


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
