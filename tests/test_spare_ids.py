"""Ids that no token has: a model may have them, and nothing ever writes one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import mesh_of, placed_params, random_params
from test_decode import VOCAB, Letters
from usual_cases import cases

from mtp_jax.config import ModelConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.decode_model import build, unstack
from mtp_jax.decode.decoders.beam import Beam
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.dynamo import Dynamo
from mtp_jax.decode.decoders.dynamo_exact import DynamoExact
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.speculative import Speculative
from mtp_jax.decode.decoders.tree import Tree
from mtp_jax.decode.decoders.typical import Typical
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.verification.exact_distribution import head_one, next_distribution

SPARE = 48
MODEL = ModelConfig(
    vocab_size=VOCAB + SPARE,
    d_model=16,
    num_layers=4,
    n_future_tokens=3,
    num_query_heads=4,
    num_kv_heads=2,
    d_head=4,
    d_ff=24,
)
ALL = [
    Plain(),
    Blockwise(),
    Speculative(),
    Tree(),
    Typical(epsilon=0.0, delta=0.0),
    Dynamo(alpha=0.0, threshold=0.0, otsu=False),
    DynamoExact(alpha=0.0),
    Beam(beams=12, lookahead=0.5),  # more continuations than there are tokens
]
NAMED = {type(decoder).__name__.lower(): decoder for decoder in ALL}
PROMPTS = [np.array([1, 2, 3], np.int32), np.array([5], np.int32)]


def keep_tokens(params):
    """The parameters without the ids to spare."""
    names = ("w_embedding", "w_unembedding")
    cut = {k: params[k][:VOCAB] for k in names if k in params}
    return {**params, **cut}


@pytest.fixture(scope="module")
def generators():
    """A model with ids to spare, all likelier than its tokens, and it without them."""
    mesh = mesh_of()
    small = dataclasses.replace(MODEL, vocab_size=VOCAB)
    with jax.set_mesh(mesh):
        params = random_params(MODEL, seed=1)
        for name in ("w_embedding", "w_unembedding"):
            if name in params:
                params[name][VOCAB:] *= 4
        with_spare = placed_params(MODEL, params)
        without = placed_params(small, keep_tokens(params))
    letters = Letters(eos_id=VOCAB - 1)
    return (
        Generator(MODEL, with_spare, letters, mesh),
        Generator(small, without, letters, mesh),
        with_spare,
    )


@pytest.mark.parametrize("decoder", cases(NAMED, ["speculative", "tree"]))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_have_no_id_that_no_token_has(generators, decoder, temperature):
    if temperature and isinstance(decoder, Beam):
        pytest.skip("beam search draws nothing")
    options = {
        "max_new_tokens": 16,
        "decoder": decoder,
        "sampling": Sampling(temperature=temperature, top_k=30 if temperature else 0),
    }

    made = generators[0].generate(PROMPTS, **options)

    assert all(max(r.tokens, default=0) < VOCAB for r in made)
    if not temperature:  # as if they were not there
        for ours, theirs in zip(
            made, generators[1].generate(PROMPTS, **options), strict=True
        ):
            assert (ours.tokens, ours.text) == (theirs.tokens, theirs.text)
            assert ours.passes == theirs.passes


def test_logits_of_tokens_are_the_same_bits_and_those_of_other_ids_nothing(generators):
    generator, _, params = generators
    with jax.set_mesh(generator.mesh):
        ready = unstack(MODEL, params)
        x_BWD = jax.random.normal(jax.random.key(0), (2, 3, MODEL.d_model))
        x_BWD = jax.device_put(x_BWD, jax.NamedSharding(generator.mesh, jax.P()))

        def logits(ids):
            model = build(MODEL, ready, ids)
            return jax.jit(model.logits)(x_BWD)

        whole, masked = np.asarray(logits(None)), np.asarray(logits(VOCAB))
    np.testing.assert_array_equal(masked[..., :VOCAB], whole[..., :VOCAB])
    assert np.all(masked[..., VOCAB:] == -np.inf)


def test_the_reference_of_verify_has_no_spare_ids_either(generators):
    generator, _, params = generators
    with jax.set_mesh(generator.mesh):
        whole = head_one(MODEL, params)([[0, 1, 2]])[0]
        masked = head_one(MODEL, params, VOCAB)([[0, 1, 2]])[0]
    np.testing.assert_array_equal(masked[:VOCAB], whole[:VOCAB])
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=30)):
        target_V = next_distribution(masked, [0, 1, 2], sampling)
        assert target_V[VOCAB:].sum() == 0 and target_V.sum() == pytest.approx(1)


def test_a_prompt_with_such_an_id_is_refused(generators):
    with pytest.raises(UserError, match=f"ids from 0 to {VOCAB}; .* 0 to {VOCAB - 1}"):
        generators[0].generate([np.array([VOCAB])], max_new_tokens=1)


def test_texts_of_bytes_can_be_read(generators):
    cfg = dataclasses.replace(MODEL, vocab_size=384)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        params = placed_params(cfg, random_params(cfg))
    generator = Generator(cfg, params, ByteTokenizer(), mesh)

    [made] = generator.generate(["hello"], max_new_tokens=20)

    assert made.text == bytes(made.tokens).decode(errors="replace")
    assert jnp.asarray(made.tokens).max() < 256
