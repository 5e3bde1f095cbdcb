"""tokenizer.json: its ids, its bytes, and what files beside it say of begin and end."""

import json

import json_tokenizers
import numpy as np
import pytest
from json_tokenizers import BEGIN, END, TURN, byte_level, loaded, sentencepiece_like
from runs import SHARED

from mtp_jax.data import json_tokenizer, tokenizer
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare
from mtp_jax.decode.text_stream import Continuation, settled, token_texts
from mtp_jax.errors import UserError

WORDS = "def add(a, b):\n    return a + b  # naïve\n\nprint(add(12, 345))\n" * 20
TEXTS = [
    "Hello world",
    "  two  spaces",
    "naïve café 日本語 🙂",
    "\n\n\ttab",
    "x=1;y=22",
]


@pytest.fixture(scope="module")
def made():
    return byte_level([WORDS])


def test_ids_are_those_of_the_library_without_its_frame(made):
    framed = json_tokenizers.with_begin(byte_level([WORDS]))
    for text in [*TEXTS, f"{TURN}and {END} inside"]:
        expected = made.encode(text, add_special_tokens=False).ids
        assert loaded(made).encode(text).tolist() == expected
        assert loaded(framed).encode(text).tolist() == expected


def test_what_is_in_front_of_a_prompt_is_what_the_files_put_there(made):
    begin = made.token_to_id(BEGIN)
    framed = json_tokenizers.with_begin(byte_level([WORDS]))

    assert loaded(made).prompt_begin == ()
    assert loaded(framed).prompt_begin == (begin,)
    assert loaded(made, add_bos_token=True).prompt_begin == (begin,)
    assert loaded(framed, add_bos_token=False).prompt_begin == ()


def test_begin_and_end_come_from_the_file_that_names_them(made):
    begin, end, turn = map(made.token_to_id, (BEGIN, END, TURN))
    rules = {"tokenizer.json": made.to_str().encode()}

    def of(**files):
        contents = {f"{k}.json": json.dumps(v).encode() for k, v in files.items()}
        found = json_tokenizer.JsonTokenizer({**rules, **contents}, "x")
        return found.bos_id, found.end_ids

    named = {"bos_token": {"content": BEGIN}, "eos_token": END}
    assert of(tokenizer_config=named) == (begin, (end,))
    assert of(special_tokens_map=named) == (begin, (end,))
    assert of(generation_config={"eos_token_id": turn}) == (turn, (turn,))
    stops = {"bos_token_id": begin, "eos_token_id": [turn, end]}
    assert of(generation_config=stops) == (begin, (turn, end))
    assert of(tokenizer_config=named, generation_config=stops) == (begin, (end, turn))


def test_ends_of_the_model_count_where_there_is_no_other_file(made, tmp_path):
    turn = made.token_to_id(TURN)
    folder = json_tokenizers.write(tmp_path, made, eos_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": turn}))

    assert tokenizer.load_tokenizer(folder).end_ids == (turn,)


def test_special_tokens_that_only_the_configuration_names_become_ids(made):
    entry = {"content": "<|new|>", "special": True, "lstrip": False}
    config = {"additional_special_tokens": ["<|more|>"], "pad_token": "<|pad|>"}
    found = loaded(made, added_tokens_decoder={"400": entry}, **config)

    ids = found.encode("a<|new|>b<|pad|>c<|more|>")
    last = found.vocab_size
    assert ids[1::2].tolist() == [last - 3, last - 2, last - 1]
    assert found.decode(ids) == "abc"
    assert found.piece_bytes()[ids].tolist() == [1, 0] * 3


def test_truncation_and_padding_of_the_file_do_not_change_ids(made):
    other = byte_level([WORDS])
    other.enable_truncation(3)
    other.enable_padding(length=8)

    assert loaded(other).encode(WORDS).tolist() == loaded(made).encode(WORDS).tolist()


def made_by(kind):
    return kind([WORDS])


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
def test_a_stream_of_tokens_is_the_text_and_never_half_a_character(kind):
    found = loaded(kind([WORDS]))
    for text in TEXTS:
        ids = found.encode(text)
        shown = token_texts(found, ids.tolist())

        assert "".join(shown) == found.decode(ids) == text
        assert found.decode(ids) == made_by(kind).decode(ids.tolist())
        assert not any("\ufffd" in part for part in shown)
        sizes = found.piece_bytes()[ids]
        extra = kind is sentencepiece_like  # the space that it puts in front
        assert sizes.sum() == len(text.encode()) + extra
        for cut in range(1, len(ids)):
            held = found.unfinished(ids[:cut])
            whole = found.decode(ids[: cut - held])
            assert text.startswith(whole) and settled(whole, ()) == whole
            after = Continuation(found, ids[:cut])
            assert after.prompt + after.decode(ids[cut:]) == text


def test_the_bytes_of_a_piece_tell_what_decoding_it_gives(made):
    found = loaded(made)
    for i in range(found.vocab_size):
        text = found.decode([i])
        if "\ufffd" not in text:
            assert found.piece_bytes()[i] == len(text.encode())
    assert found.piece_bytes()[[found.bos_id, found.eos_id]].tolist() == [0, 0]


def test_a_corpus_and_its_copy_have_the_same_tokenizer(made, tmp_path):
    template = "{{ messages }}"
    folder = json_tokenizers.write(tmp_path / "t", made, template)
    (tmp_path / "text.txt").write_text(WORDS)
    for spec, output in ((folder, "a"), (f"{folder}/tokenizer.json", "b")):
        manifest = prepare(
            tmp_path / "text.txt", tmp_path / output, tokenizer=spec, heldout=0,
            split_bytes=200, workers=2,
        )  # fmt: skip
        assert manifest["tokenizer"]["kind"] == "tokenizer.json"

    corpora = [Corpus.open(tmp_path / name) for name in "ab"]
    tokenizer.save_tokenizer(corpora[0].tokenizer, tmp_path)
    again = tokenizer.tokenizer_from_dir(tmp_path, "tokenizer.json")
    expected = loaded(made)
    for found in (*[corpus.tokenizer for corpus in corpora], again):
        assert found.fingerprint == expected.fingerprint
        assert found.chat_template == template
        assert dict(found.files) == json_tokenizers.files_of(made, template.encode())
    documents = corpora[0].documents("train")
    texts = [documents.tokens(i) for i in range(len(documents))]
    assert "".join(again.decode(ids[1:-1]) for ids in texts) == WORDS
    assert {(ids[0], ids[-1]) for ids in texts} == {(again.bos_id, again.eos_id)}


def test_another_end_is_another_tokenizer_and_another_template_is_not(made):
    found = loaded(made)
    others = [loaded(made, eos_token=TURN), loaded(made, bos_token=None)]

    assert found.fingerprint == loaded(made, "{{ 1 }}").fingerprint
    assert len({found.fingerprint, *(x.fingerprint for x in others)}) == 3


def test_one_more_end_is_kept_with_the_files(made):
    found = loaded(made).with_end(made.token_to_id(TURN))

    assert found.end_ids == (made.token_to_id(END), made.token_to_id(TURN))
    again = tokenizer.tokenizer_of(found.kind, found.files, "again")
    assert again.end_ids == found.end_ids
    assert again.fingerprint == loaded(made).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json is not a JSON object"),
        ("tokenizer.json", b"{}", "tokenizer.json is not one of a tokenizer"),
        ("tokenizer_config.json", b"{}", "no file beside tokenizer.json names the"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON"),
        ("generation_config.json", b'{"eos_token_id": 999}', "mend generation_config"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "is 'x'; it must"),
        ("generation_config.json", b'{"eos_token_id": [1, true]}', "1, True.; it must"),
        ("tokenizer_config.json", b'{"eos_token": "<|end|>", "added_tokens_decoder": '
         b'{"x": 1}}', "its added tokens are damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(made, tmp_path, name, content, message):
    folder = json_tokenizers.write(tmp_path, made)
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=message) as found:
        tokenizer.load_tokenizer(folder)
    assert str(found.value).startswith(f"tokenizer {folder}: ")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without tokenizer\.json or tokenizer\.model"):
        tokenizer.load_tokenizer(str(tmp_path))


def test_pieces_whose_bytes_are_not_known_are_refused(made):
    rules = json.loads(made.to_str())
    rules["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    files = {**json_tokenizers.files_of(made), "tokenizer.json": json.dumps(rules)}
    with pytest.raises(UserError, match="decoder WordPiece; known are ByteLevel"):
        json_tokenizer.JsonTokenizer(files, "x")


def gpt2():
    """GPT-2's vocabulary under the pattern of Llama 3's, with ChatML's tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    folder = SHARED / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    vocabulary = (str(folder / f"gpt2_{x}") for x in ("vocab.json", "merges.txt"))
    made = tokenizers.Tokenizer(models.BPE.from_file(*vocabulary))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(json_tokenizers.SPECIALS))
    return made


def hundred_texts():
    """Texts of several languages, code, and special tokens written out."""
    stories = SHARED / "tinystories" / "tinystories_cased_train.jsonl"
    code = (SHARED / "wikitext2" / "valid.txt").read_text()[:20000]
    lines = stories.read_text().split("\n")[:60]
    found = [json.loads(line)["text"] for line in lines if line]
    found += [code[i : i + 500] for i in range(0, 15000, 500)]
    found += [*TEXTS, WORDS, f"{TURN}user\nhi{END}", f"{BEGIN} a {BEGIN}b", " ", "é"]
    return found[:100]


def test_real_text_round_trips_and_counts_its_bytes():
    found = loaded(gpt2())
    texts = hundred_texts()
    assert len(texts) == 100
    for text in texts[:90]:
        ids = found.encode(text)
        assert found.decode(ids) == text
        assert found.piece_bytes()[ids].sum() == len(text.encode())


@pytest.mark.packages
@pytest.mark.parametrize("framed", [False, True])
def test_ids_of_a_hundred_texts_are_those_of_transformers(tmp_path, framed):
    transformers = pytest.importorskip("transformers")
    made = json_tokenizers.with_begin(gpt2()) if framed else gpt2()
    folder = json_tokenizers.write(tmp_path, made)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer.load_tokenizer(folder)

    texts = hundred_texts()
    assert len(texts) == 100
    for text in texts:
        plain = ours.encode(text).tolist()
        assert plain == made.encode(text, add_special_tokens=False).ids
        assert plain == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.prompt_begin, *plain] == theirs(text)["input_ids"]
        assert [*ours.prompt_begin, *plain] == made.encode(text).ids
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)
    assert ours.bos_id == theirs.bos_token_id and ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    sizes = ours.piece_bytes()
    assert np.all(sizes[theirs.all_special_ids] == 0)
