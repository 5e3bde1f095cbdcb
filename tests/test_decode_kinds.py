"""Decoding with heads of every kind: texts, drafts, laws and caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_cases import OPTIONS, model_of
from models import all_logits, mesh_of, placed_params, random_params
from test_decode import Letters, on_mesh
from test_decode_beam import slow_beams

from mtp_jax.decode.batch import DecodeBatch
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.beam import Beam
from mtp_jax.decode.decoders.dynamo import Dynamo
from mtp_jax.decode.decoders.dynamo_exact import DynamoExact
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.fitting import fitting
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.programs import Programs
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import keep_heads, model_builder
from mtp_jax.verification.exact_distribution import (
    decoder_distribution,
    distance,
    head_one,
    head_one_distribution,
)

NEW, N, VOCAB = 20, 4, 16
PROMPTS = [[1, 5, 9], [], [3, 3, 7, 2, 8, 8, 1]]
LONGEST = 40


def config_of(name):
    return model_of(name, N, trunk=1, vocab_size=VOCAB)


def params_of(cfg):
    """Random parameters with which heads agree now and then: small trunk and heads."""
    params = random_params(cfg, seed=3)

    def smaller(path, w):
        is_layer = path[0].key in ("trunk", "heads") and path[-1].key in (
            "w_o",
            "w_down",
        )
        return 0.3 * w if is_layer else w

    return jax.tree.map_with_path(smaller, params)


@functools.cache
def forward(cfg):
    """`f(params, rows) -> logits [N, B, T, V]` of training, of rows of LONGEST."""
    _, build = model_builder(cfg)

    @jax.jit
    def run(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] + 0 * tokens_BT
        return all_logits(build(params), tokens_BT, 0 * tokens_BT, positions_BT)

    return run


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the greedy texts of its head 1 by the forward pass of training."""

    cfg: object
    params: object
    generator: Generator
    texts: list


@functools.cache
def case(name):
    cfg = config_of(name)
    with jax.set_mesh(mesh_of()):
        params = placed_params(cfg, params_of(cfg))
        rows = [[0, *prompt] for prompt in PROMPTS]
        for _ in range(NEW):
            logits_NBTV = forward(cfg)(params, on_mesh(padded(rows)))
            for b, row in enumerate(rows):
                row.append(int(np.argmax(logits_NBTV[0, b, len(row) - 1])))
    texts = [row[1 + len(p) :] for row, p in zip(rows, PROMPTS, strict=True)]
    tokenizer = Letters(eos_id=VOCAB)
    return Case(cfg, params, Generator(cfg, params, tokenizer, mesh_of()), texts)


def padded(rows):
    return np.array([[*row, *[0] * (LONGEST - len(row))] for row in rows], np.int32)


def prompts():
    return [np.array(prompt, np.int32) for prompt in PROMPTS]


FEW = [
    "serial",
    "serial, shared, one cache",
    "anticausal, shared, bias",
    "linear, own tables, bias",
]
EXACT = {
    "blockwise": {"decoder": "blockwise"},
    "speculative": {"decoder": "speculative"},
    "tree": {"decoder": "tree"},
    "dynamo_exact": {"decoder": DynamoExact(alpha=0.0)},
    "depths": {"decoder": "blockwise", "adaptive": (1, 4, 1, 1, 2, 3, 4)},
    "three heads": {"decoder": "blockwise", "heads": 3},
    "adaptive tree": {"decoder": "tree", "adaptive": True},
}


def texts_cases():
    for i, name in enumerate(OPTIONS):
        for j, how in enumerate(EXACT):
            usual = (name in FEW and j == 2) or (i + j) % 7 == 0
            yield pytest.param(name, how, marks=[] if usual else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "how"), list(texts_cases()))
def test_greedy_texts_are_those_of_head_1(name, how):
    c = case(name)

    results = c.generator.generate(prompts(), max_new_tokens=NEW, **EXACT[how])

    assert [r.tokens for r in results] == c.texts


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_decoding_is_head_1_of_training(name):
    c = case(name)

    results = c.generator.generate(prompts(), max_new_tokens=NEW, decoder="plain")

    assert [r.tokens for r in results] == c.texts
    assert len(set(c.texts[0])) > 2


def expected_drafts(c, text):
    """Best tokens of heads 2 to n after a text, each given those before it."""
    row = list(text)
    for i in range(1, N):
        logits_NBTV = forward(c.cfg)(c.params, on_mesh(padded([row])))
        row.append(int(np.argmax(logits_NBTV[i, 0, len(text) - 2])))
    return row[len(text) :]


@pytest.mark.parametrize("name", [*FEW, pytest.param("causal"), "residual"])
def test_drafts_are_those_of_the_forward_pass_of_training(name):
    """After every pass, whatever was accepted and refused before."""
    c = case(name)
    if c.cfg.heads.draft_cache == "shared":
        pytest.skip("only its first draft is that of training")
    rows = [np.array([0, *p], np.int32) for p in PROMPTS]
    with jax.set_mesh(mesh_of()):
        params = unstack(c.cfg, c.params)
        programs, accepted = Programs(c.cfg, eos_id=VOCAB), set()
        batch = DecodeBatch(
            programs, params, DECODERS["blockwise"](), rows, NEW,
            Sampling(temperature=0.9, seed=1),
        )  # fmt: skip
        batch.begin()
        for _ in range(8):
            state = batch._at()
            length_B, tokens_BE = (
                np.asarray(state.length_B),
                np.asarray(state.tokens_BE),
            )
            for b in range(len(PROMPTS)):
                text = tokens_BE[b, : length_B[b]].tolist()
                found = np.asarray(state.carry)[b].tolist()
                assert found == expected_drafts(c, text), (b, text)
            accepted |= set(np.flatnonzero(np.asarray(state.passes_BN).sum(0)).tolist())
            batch.advance(1)
    assert len(accepted) > 1


@pytest.mark.parametrize("name", ["serial", "causal"])
def test_heads_that_were_left_alone_read_what_came_to_stand_where_they_drafted(name):
    c = case(name)
    rows = [np.array([0, *p], np.int32) for p in PROMPTS]
    with jax.set_mesh(mesh_of()):
        params, programs = unstack(c.cfg, c.params), Programs(c.cfg, eos_id=VOCAB)
        how = DECODERS["blockwise"](), Sampling(temperature=0.9, seed=1)
        depths = (4, 4, *[1] * 6, 4, 4)  # the first reads the prompts
        batch = DecodeBatch(
            programs, params, how[0], rows, NEW, how[1], adaptive=depths
        )
        batch.begin()
        texts = batch.advance(len(depths) - 1)
        made = jax.device_get(batch._at().cache)
        read = [
            x[: n - 1] for x, n in zip(texts.tokens_BE, texts.length_B, strict=True)
        ]
        again = DecodeBatch(programs, params, how[0], read, 1, how[1])
        again.begin()
        fresh = jax.device_get(again._at().cache)
    pairs = zip(made.k_BGSK + made.v_BGSK, fresh.k_BGSK + fresh.v_BGSK, strict=True)
    for ours, theirs in pairs:
        for b, row in enumerate(read):
            # At the last slots of a text heads have read drafts after it.
            known = (b, slice(None), slice(len(row) - N))
            np.testing.assert_allclose(ours[known], theirs[known], atol=1e-5)


def test_the_first_of_drafts_that_share_a_cache_is_that_of_training():
    c = case("serial, shared, one cache")
    rows = [np.array([0, *p], np.int32) for p in PROMPTS]
    with jax.set_mesh(mesh_of()):
        batch = DecodeBatch(
            Programs(c.cfg, eos_id=VOCAB), unstack(c.cfg, c.params),
            DECODERS["blockwise"](), rows, NEW, Sampling(temperature=0.9, seed=1),
        )  # fmt: skip
        batch.begin()
        for _ in range(8):
            state = batch._at()
            for b in range(len(PROMPTS)):
                text = np.asarray(state.tokens_BE)[b, : int(state.length_B[b])].tolist()
                expected = expected_drafts(c, text)[0]
                assert int(np.asarray(state.carry)[b, 0]) == expected, (b, text)
            batch.advance(1)


@pytest.mark.parametrize(
    ("name", "lookahead"),
    [
        ("causal", 0.5),
        ("serial", 0.0),
        pytest.param("anticausal", 0.5, marks=pytest.mark.slow),
        pytest.param("linear, own tables, bias", 0.0, marks=pytest.mark.slow),
        pytest.param("serial, shared, one cache", 0.0, marks=pytest.mark.slow),
    ],
)
def test_beam_search_is_the_slow_one(name, lookahead):
    c = case(name)

    @functools.cache
    def after(row):
        with jax.set_mesh(mesh_of()):
            logits_NBTV = forward(c.cfg)(c.params, on_mesh(padded([row])))
        logits_NV = np.asarray(logits_NBTV, np.float64)[:, 0, len(row) - 1]
        return logits_NV - np.log(np.exp(logits_NV).sum(-1, keepdims=True))

    results = c.generator.generate(
        prompts(), max_new_tokens=10, decoder=Beam(beams=2, lookahead=lookahead)
    )

    for result, prompt in zip(results, PROMPTS, strict=True):
        slow = slow_beams(after, prompt, 2, VOCAB, 10, 1.0, lookahead)
        assert result.tokens == slow


LAWS = [
    ("serial", "speculative"),
    ("linear, own tables, bias", "tree"),
    pytest.param("serial, shared, one cache", "speculative", marks=pytest.mark.slow),
    pytest.param("serial", "tree", marks=pytest.mark.slow),
    pytest.param("serial", "blockwise", marks=pytest.mark.slow),
    pytest.param("causal", "speculative", marks=pytest.mark.slow),
    pytest.param("anticausal", "speculative", marks=pytest.mark.slow),
    pytest.param("residual", "speculative", marks=pytest.mark.slow),
    pytest.param("linear, own tables, bias", "speculative", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "decoder"), LAWS)
def test_laws_are_those_of_head_1(name, decoder):
    """Enumerated, against the forward pass of training."""
    cfg = model_of(name, 3, trunk=1, vocab_size=VOCAB)
    sampling, prompt, eos = Sampling(temperature=0.8, top_k=2), (0, 3, 1, 1), 4
    with jax.set_mesh(mesh_of()):
        params = placed_params(cfg, params_of(cfg))
        right = head_one_distribution(head_one(cfg, params), prompt, 3, sampling, eos)
        found = decoder_distribution(
            Programs(cfg, eos), unstack(cfg, params), DECODERS[decoder](), prompt, 3,
            sampling,
        )  # fmt: skip

    assert distance(found, right) < 1e-6
    assert len(right) > 2


@pytest.mark.parametrize("decoder", [Dynamo(alpha=0.0), Beam(lookahead=0.5)])
@pytest.mark.parametrize("name", ["serial", "linear, own tables, bias"])
def test_what_asks_all_heads_at_once_is_refused_for_heads_that_wait(name, decoder):
    c = case(name)

    with pytest.raises(UserError, match=r"cannot run: it asks all heads at once"):
        c.generator.generate(prompts(), max_new_tokens=4, decoder=decoder)

    assert isinstance(fitting(c.cfg)["speculative"], DECODERS["speculative"])


def test_fewer_heads_are_kept_but_of_a_kind_that_needs_all():
    c = case("serial, normed, own norms")
    with jax.set_mesh(mesh_of()):
        cfg, params = keep_heads(c.cfg, c.params, 2)
    fewer = Generator(cfg, params, Letters(eos_id=VOCAB), mesh_of())

    results = fewer.generate(prompts(), max_new_tokens=NEW)

    assert [r.tokens for r in results] == c.texts
    assert cfg.num_trunk_layers == c.cfg.num_trunk_layers
    with pytest.raises(UserError, match="fewer than all 4 cannot be kept"):
        config_of("anticausal").keep_heads(3)


@pytest.mark.parametrize(
    "name",
    [
        "serial",
        "linear, own tables, bias",
        pytest.param("anticausal, shared, bias", marks=pytest.mark.slow),
        pytest.param("serial, shared, one cache", marks=pytest.mark.slow),
        pytest.param(
            "residual, 2 blocks, own tables and norms", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("decoder", ["blockwise", "tree"])
def test_texts_are_the_same_on_any_mesh(name, decoder):
    c, mesh = case(name), mesh_of(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = placed_params(c.cfg, params_of(c.cfg))
    generator = Generator(c.cfg, params, Letters(eos_id=VOCAB), mesh)

    results = generator.generate(prompts(), max_new_tokens=NEW, decoder=decoder)

    assert [r.tokens for r in results] == c.texts
