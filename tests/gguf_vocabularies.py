"""Keys of tokenizers in GGUF files, texts for them, and llama.cpp to ask."""

import io
import json
import pathlib
import urllib.request

import numpy as np
import sentencepiece
import tokenizers
from json_tokenizers import byte_level
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from mtp_jax.data.json_tokenizer import JsonTokenizer
from mtp_jax.interop.gguf_tokenizer import gguf_tokenizer

DATA = pathlib.Path(__file__).parent / "data"
TURN = "<|turn|>"
_WORDS = [
    "we'll", "We'LL", "don\u2019t", "it's", "IT'S", "naïve", "Ärger", "straße",
    "你好吗",
    "мир", "مرحبا", "नमस्ते", "x_1", "snake_case", "CamelCaseHTTP", "f(x)", "a+=b;",
    "3.14159", "1234567", "²³½", "٣٤٥", "Ⅷ", "🙂", "👩‍👩‍👧", "--", "...", "///", "\\n",
    "http://a.b/c?d=e&f", "$9.99", "@me", "#tag", "e\u0301", "\u00a0", "\u3000",
]  # fmt: skip
_GAPS = [" ", "  ", "\n", "\n\n", "\t", " \n ", "", "\r\n", "    "]


def hundred_texts():
    """Texts of words, numbers, signs, scripts and white space of all kinds."""
    rng = np.random.default_rng(5)
    verses = (DATA / "verses.txt").read_text().splitlines()
    found = ["", " ", "\n", "a", "  lead", "trail  ", "\n\n\nlines\n\n", "x = 1\n\ty"]
    while len(found) < 100:
        parts = [verses[rng.integers(len(verses))][:40]] if rng.random() < 0.5 else []
        for _ in range(rng.integers(2, 9)):
            parts.append(_WORDS[rng.integers(len(_WORDS))])
            parts.append(_GAPS[rng.integers(len(_GAPS))])
        found.append("".join(parts))
    return found


def trained(pre_tokenizer, size=700):
    """A byte-level BPE of the library's own trainer, with a cut of the library's."""
    made = byte_level(hundred_texts() * 3, size)
    made.pre_tokenizer = pre_tokenizer
    return made


def merge_keys(made, pre, **more):
    """The keys of a byte-level BPE, as converters write them."""
    rules = json.loads(made.to_str())
    by_id = {i: text for text, i in made.get_vocab().items()}
    special = {token["id"] for token in rules["added_tokens"]}
    merges = rules["model"]["merges"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [by_id[i] for i in range(len(by_id))],
        "token_type": [3 if i in special else 1 for i in range(len(by_id))],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    return named(keys)


def piece_keys(model_bytes, **more):
    """The keys of a SentencePiece model."""
    messages = sentencepiece_model_pb2
    pieces = messages.ModelProto.FromString(model_bytes).pieces
    keys = {
        "model": "llama",
        "tokens": [p.piece for p in pieces],
        "scores": [p.score for p in pieces],
        "token_type": [int(p.type) for p in pieces],
        **more,
    }
    return named(keys)


def sentencepiece_model(size=420):
    """A model of byte pairs that puts a space in front, as Llama 2's does."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(hundred_texts() * 3),
        model_writer=made,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return made.getvalue()


def with_marks(fields, *marks):
    """The keys with control tokens besides."""
    more = {"tokens": list(marks), "scores": [-1e6] * len(marks)}
    more["token_type"] = [3] * len(marks)
    both = {name: fields[f"tokenizer.ggml.{name}"] + x for name, x in more.items()}
    return {**fields, **named(both)}


def named(keys):
    """Keys of a tokenizer under their whole names."""
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def tokenizer_of(fields):
    return JsonTokenizer(gguf_tokenizer(fields, "a.gguf", 64), "test")


def library_of(fields):
    """The same tokenizer as the library alone has it."""
    content = gguf_tokenizer(fields, "a.gguf", 64)["tokenizer.json"]
    return tokenizers.Tokenizer.from_str(content.decode())


def split(pattern):
    """Words by a regular expression, their bytes as letters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write_gguf(path, fields, name="test", layers=2):
    """A file of a small random Llama with the keys of a tokenizer."""
    import gguf

    size, d = len(fields["tokenizer.ggml.tokens"]), 32
    out = gguf.GGUFWriter(path, "llama")
    out.add_name(name)
    out.add_context_length(64)
    out.add_embedding_length(d)
    out.add_block_count(layers)
    out.add_feed_forward_length(d)
    out.add_head_count(1)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(size)
    for key, value in fields.items():
        kind = gguf.GGUFValueType.get_type(value)
        if key.endswith("_token_id"):
            kind = gguf.GGUFValueType.UINT32
        out.add_key_value(key, value, kind, sub_type=_kind_in(gguf, value))
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (size, d), "output_norm": (d,)}
    blocks = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
              "ffn_down")  # fmt: skip
    for i in range(layers):
        shapes |= {f"blk.{i}.{x}": (d, d) for x in blocks}
        shapes |= {f"blk.{i}.{x}": (d,) for x in ("attn_norm", "ffn_norm")}
    for tensor, shape in shapes.items():
        values = (rng.normal(size=shape) / 6).astype(np.float32)
        out.add_tensor(f"{tensor}.weight", values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _kind_in(gguf, value):
    if not isinstance(value, list):
        return None
    kinds = {str: "STRING", float: "FLOAT32", int: "INT32"}
    return gguf.GGUFValueType[kinds[type(value[0])]]


def llama_cpp_ids(path, texts):
    """Ids of texts by llama.cpp, as it begins prompts, of a GGUF file."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup = 64, 1, False
    options.verbosity, options.cpuparams.n_threads = -1, 1
    server = xllamacpp.Server(options)
    found = []
    for text in texts:
        asked = {"content": text, "add_special": True, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.loads(answer.read())["tokens"])
    return found
