"""Decoding against slow references that share none of its code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from models import all_logits, mesh_of

from mtp_jax.config import MeshConfig, ModelConfig
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import make_mesh, spec

NEW = 24
VOCAB = 16
LENGTHS = (0, 1, 3, 4, 7, 9, 2, 6)


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of VOCAB letters; the first of them begins a text."""

    eos_id: int
    bos_id: int = 0
    fingerprint: str = "letters"
    vocab_size: int = VOCAB

    @property
    def end_ids(self):
        return (self.eos_id,)

    @property
    def prompt_begin(self):
        return (self.bos_id,)

    def unfinished(self, ids):
        return 0

    def encode(self, text):
        return np.array([ord(c) - ord("a") for c in text], np.int32)

    def decode(self, ids):
        special = (self.bos_id, self.eos_id)
        return "".join(chr(ord("a") + int(i)) for i in ids if i not in special)


def one_device():
    return mesh_of()


def tiny(n, layers, **changes):
    return ModelConfig(
        **{
            "vocab_size": VOCAB,
            "d_model": 16,
            "num_layers": layers,
            "n_future_tokens": n,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "d_head": 4,
            "d_ff": 32,
            **changes,
        }
    )


def on_mesh(rows):
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", None))
    return jax.device_put(np.asarray(rows, np.int32), sharding)


def init(cfg, mesh):
    """Random parameters, all heads nearly the first.

    Where a text repeats a token such heads draft it, so every number of drafts is right
    somewhere.
    """

    def make(key):
        params = model_builder(cfg)[0](key)
        params["heads"] = jax.tree.map(
            lambda w: w[:1] + 0.1 * (w - w[:1]), params["heads"]
        )
        return params

    with jax.set_mesh(mesh):
        return jax.jit(make)(jax.random.key(1))


def reference(cfg, params):
    """What each head says at each position, by the training path, [N, B, T]."""
    _, build = model_builder(cfg)

    @jax.jit
    def said(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        logits = all_logits(build(params), tokens_BT, 0 * tokens_BT, positions_BT)
        return jnp.argmax(logits, axis=-1)

    def call(rows):
        tokens_BT = np.zeros((len(rows), 48), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
        return np.asarray(said(params, on_mesh(tokens_BT)))

    return call


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, prompts, and what decoding them has to give."""

    cfg: ModelConfig
    prompts: list[np.ndarray]
    generator: Generator
    texts: list[list[int]]  # NEW + n greedy tokens of each prompt; end of text ignored
    drafts: list[
        list[list[int]]
    ]  # what heads 2..n say with the first j new tokens read
    eos_id: int


@functools.cache
def case(n, layers):
    cfg, mesh = tiny(n, layers), one_device()
    params = init(cfg, mesh)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCAB, k).astype(np.int32) for k in LENGTHS]
    rows = [[0, *map(int, p)] for p in prompts]
    texts, drafts = [[] for _ in rows], [[] for _ in rows]
    with jax.set_mesh(mesh):
        said = reference(cfg, params)
        for _ in range(NEW + n):
            predicted_NBT = said(rows)
            for b, row in enumerate(rows):
                here_N = predicted_NBT[:, b, len(row) - 1].tolist()
                drafts[b].append(here_N[1:])
                texts[b].append(here_N[0])
                row.append(here_N[0])

    def balance(token):  # texts that this end of text would cut and would not cut
        cut = sum(token in text[2 : NEW - 2] for text in texts)
        return min(cut, len(texts) - cut)

    eos_id = max(range(1, VOCAB), key=balance)
    generator = Generator(cfg, params, Letters(eos_id), mesh)
    return Case(cfg, prompts, generator, texts, drafts, eos_id)


def expected(text, eos_id, limit=NEW):
    """Tokens without end of text, and how they end."""
    text = text[:limit]
    if eos_id in text:
        return text[: text.index(eos_id)], "eos"
    return text, "length"


def slow_blockwise(text, drafts, made):
    """Forward passes, and right drafts of each but the first, for `made` tokens."""
    done, accepted = 1, []
    while done < made:
        right = 0
        # The heads drafted when the last committed token was not read yet.
        for draft, token in zip(drafts[done - 1], text[done:], strict=False):
            if draft != token:
                break
            right += 1
        accepted.append(right)
        done += right + 1
    return 1 + len(accepted), accepted


CASES = [(1, 2), (2, 3), (4, 5), (4, 4)]


@pytest.mark.parametrize("n,layers", CASES)
@pytest.mark.parametrize("decoder", ["plain", "blockwise"])
def test_decoders_say_what_the_training_path_says(n, layers, decoder):
    c = case(n, layers)
    decoder = decoder if n > 1 else "plain"
    results = c.generator.generate(c.prompts, max_new_tokens=NEW, decoder=decoder)
    for result, text in zip(results, c.texts, strict=True):
        assert (result.tokens, result.finish) == expected(text, c.eos_id)
        assert result.text == Letters(c.eos_id).decode(result.tokens)


def test_the_cases_end_in_both_ways_and_accept_every_number_of_drafts():
    c = case(4, 5)
    assert {expected(text, c.eos_id)[1] for text in c.texts} == {"eos", "length"}
    counts = [
        slow_blockwise(t, d, NEW)[1] for t, d in zip(c.texts, c.drafts, strict=True)
    ]
    assert {a for count in counts for a in count} == {0, 1, 2, 3}


@pytest.mark.parametrize("n,layers", CASES)
def test_counts_are_those_of_a_slow_blockwise_decoder(n, layers):
    c = case(n, layers)
    results = c.generator.generate(c.prompts, max_new_tokens=NEW)
    for result, text, drafts in zip(results, c.texts, c.drafts, strict=True):
        made = len(result.tokens) + (result.finish == "eos")
        forwards, accepted = slow_blockwise(text, drafts, made)
        assert result.forwards == forwards
        assert result.tokens_per_forward == made / forwards
        shares = [np.mean([a > i for a in accepted] or [0]) for i in range(n - 1)]
        np.testing.assert_allclose(result.accepted_by_head, shares)


def test_plain_makes_one_token_a_forward_pass_however_a_text_ends():
    c = case(4, 5)
    for result in c.generator.generate(
        c.prompts, max_new_tokens=NEW, decoder="plain", stop=("dd", "k")
    ):
        assert result.tokens_per_forward == 1.0
        assert result.accepted_by_head == []


@pytest.mark.parametrize("limit", [1, 2, 5, NEW])
def test_no_decoder_goes_past_the_limit(limit):
    c = case(4, 5)
    for decoder in ("plain", "blockwise"):
        results = c.generator.generate(c.prompts, max_new_tokens=limit, decoder=decoder)
        for result, text in zip(results, c.texts, strict=True):
            assert (result.tokens, result.finish) == expected(text, c.eos_id, limit)


def test_fewer_heads_draft_less_and_say_the_same():
    c = case(4, 5)
    results = c.generator.generate(c.prompts, max_new_tokens=NEW, heads=2)
    for result, text, drafts in zip(results, c.texts, c.drafts, strict=True):
        assert (result.tokens, result.finish) == expected(text, c.eos_id)
        assert len(result.accepted_by_head) == 1
        made = len(result.tokens) + (result.finish == "eos")
        first = [d[:1] for d in drafts]
        assert result.forwards == slow_blockwise(text, first, made)[0]


@pytest.mark.parametrize("decoder", ["plain", "blockwise"])
def test_a_text_ends_before_the_first_stop_string(decoder):
    c = case(4, 5)
    letters = Letters(c.eos_id)
    whole = [letters.decode(expected(t, c.eos_id)[0]) for t in c.texts]
    stops = (whole[0][5:7], whole[3][10:13], whole[-1][3:5])
    results = c.generator.generate(
        c.prompts, max_new_tokens=NEW, decoder=decoder, stop=[s for s in stops if s]
    )
    stopped = 0
    for result, text, tokens, drafts in zip(
        results, whole, c.texts, c.drafts, strict=True
    ):
        # Of the stop strings in the text, the one that is complete first.
        ends = {text.find(s) + len(s): s for s in stops if s and s in text}
        if not ends:
            assert (result.text, result.finish == "stop") == (text, False)
            continue
        assert result.text == text[: text.find(ends[min(ends)])]
        assert letters.decode(result.tokens) == result.text
        # Begin of text has no letter, so tokens may be more than letters.
        stop = ends[min(ends)]
        end = next(k for k in range(NEW + 1) if stop in letters.decode(tokens[:k]))
        stopped += 1
        assert result.finish == "stop"
        if decoder == "blockwise":
            assert result.forwards == slow_blockwise(tokens, drafts, end)[0]
        assert result.tokens_per_forward == end / result.forwards
    assert stopped >= 2


@pytest.mark.parametrize(
    "mesh_cfg",
    [
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.slow),
        MeshConfig(fsdp=2, tensor=2, sequence=2),
    ],
    ids=["fsdp8", "fsdp4-tensor2", "fsdp2-tensor2-sequence2"],
)
def test_the_mesh_does_not_change_the_text(mesh_cfg):
    c, mesh = case(4, 5), make_mesh(mesh_cfg)
    generator = Generator(c.cfg, init(c.cfg, mesh), Letters(c.eos_id), mesh)
    # Five prompts: rows have to be added for the batch to fill the mesh.
    results = generator.generate(c.prompts[:5], max_new_tokens=NEW)
    one = c.generator.generate(c.prompts[:5], max_new_tokens=NEW)
    assert [r.tokens for r in results] == [r.tokens for r in one]
    assert [r.forwards for r in results] == [r.forwards for r in one]


def test_bfloat16_and_tied_embeddings():
    cfg = tiny(2, 3, compute_dtype="bfloat16", tie_embeddings=True)
    mesh = one_device()
    generator = Generator(cfg, init(cfg, mesh), Letters(1), mesh)
    results = generator.generate(["bcd", "e"], max_new_tokens=8)
    assert all(r.finish == "eos" or len(r.tokens) == 8 for r in results)


def test_long_prompts_are_read_in_pieces(monkeypatch):
    c = case(2, 3)
    monkeypatch.setattr("mtp_jax.decode.programs._PROMPT_CHUNK", 4)
    mesh = one_device()
    generator = Generator(c.cfg, init(c.cfg, mesh), Letters(c.eos_id), mesh)
    results = generator.generate(c.prompts, max_new_tokens=NEW)
    assert [r.tokens for r in results] == [
        expected(text, c.eos_id)[0] for text in c.texts
    ]


def test_equal_shapes_share_what_was_compiled():
    c = case(2, 3)
    c.generator.generate(c.prompts, max_new_tokens=NEW)
    compiled = c.generator._programs.compile_s
    c.generator.generate(c.prompts[::-1], max_new_tokens=NEW - 3, stop=("zz",))
    assert c.generator._programs.compile_s == compiled


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"heads": 3}, "heads 1 to 2"),
        ({"heads": 0}, "heads 1 to 2"),
        ({"decoder": "magic"}, "plain"),
        ({"stop": [""]}, "stop string is empty"),
        ({"prompts": [np.array([VOCAB])]}, "knows 0 to 15"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    c = case(2, 3)
    arguments = {"prompts": ["b"], "max_new_tokens": 2, **changes}
    with pytest.raises(UserError, match=message):
        c.generator.generate(arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize("decoder", ["plain", "blockwise"])
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(decoder):
    c = case(2, 3)
    [result] = c.generator.generate(c.prompts[:1], max_new_tokens=NEW, decoder=decoder)
    assert result.tokens == expected(c.texts[0], c.eos_id)[0]


def test_no_prompts_give_no_texts():
    assert case(2, 3).generator.generate([], max_new_tokens=2) == []
