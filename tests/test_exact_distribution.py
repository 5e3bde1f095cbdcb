"""Distributions of decoders by enumeration, against ones by hand and by sampling."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from models import mesh_of, placed_params, random_params
from naive import all_logits as naive_logits

from mtp_jax.config import ModelConfig
from mtp_jax.decode.decode_model import unstack
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.programs import Programs
from mtp_jax.verification.exact_distribution import (
    TooManyDraws,
    decoder_distribution,
    distance,
    head_one,
    head_one_distribution,
    next_distribution,
)
from mtp_jax.verification.sampling_tests import Trusting, WithoutRest

PROMPT = (0, 3, 1, 1)
EOS = 4
TINY = ModelConfig(
    vocab_size=5,
    d_model=8,
    num_layers=4,
    n_future_tokens=3,
    num_query_heads=2,
    num_kv_heads=1,
    d_head=4,
    d_ff=8,
)
TWO = Sampling(temperature=0.8, top_k=2)


@functools.cache
def model():
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        params = random_params(TINY)
        placed = placed_params(TINY, params)
        return mesh, params, unstack(TINY, placed), Programs(TINY, EOS)


def distribution_of_decoder(decoder, sampling=TWO, **options):
    mesh, _, unstacked, programs = model()
    heads = unstacked["heads"][: decoder.heads(TINY.n_future_tokens)]
    with jax.set_mesh(mesh):
        return decoder_distribution(
            programs,
            {**unstacked, "heads": heads},
            decoder,
            PROMPT,
            3,
            sampling,
            **options,
        )


def distribution_of_head_one(sampling=TWO):
    mesh, params, _, _ = model()
    with jax.set_mesh(mesh):
        next_logits = head_one(TINY, placed_params(TINY, params))
        return head_one_distribution(next_logits, PROMPT, 3, sampling, EOS)


@functools.cache
def slow_distribution(sampling):
    """Head 1's distribution from the naive model, one text at a time."""
    _, params, _, _ = model()
    distribution = {}
    for text in itertools.product(range(TINY.vocab_size), repeat=3):
        text = text[: text.index(EOS) + 1] if EOS in text else text
        prob = 1.0
        for t in range(len(text)):
            row = np.array([[*PROMPT, *text[:t]]])
            positions = np.arange(row.shape[1])[None]
            logits = naive_logits(TINY, params, row, 0 * row, positions)[0, 0, -1]
            prob *= slow_next(logits, row[0], sampling)[text[t]]
        if prob:
            distribution[text] = prob
    return distribution


def slow_next(logits, text, sampling):
    """A token at a time, as the documentation of Hugging Face's generate has it."""
    scores = {}
    for token, x in enumerate(map(float, logits)):
        if token in text:
            penalty = sampling.repetition_penalty
            x = x / penalty if x > 0 else x * penalty
        scores[token] = x / sampling.temperature
    ranked = sorted(scores, key=lambda token: -scores[token])
    ranked = ranked[: sampling.top_k or None]
    total = sum(np.exp(scores[token]) for token in ranked)
    kept, share = [], 0.0
    for token in ranked:
        if share >= sampling.top_p:
            break
        kept.append(token)
        share += np.exp(scores[token]) / total
    total = sum(np.exp(scores[token]) for token in kept)
    distribution = np.zeros(len(logits))
    for token in kept:
        distribution[token] = np.exp(scores[token]) / total
    return distribution


LAWS = [
    TWO,
    Sampling(temperature=1.3, top_k=3, top_p=0.9),
    Sampling(temperature=1.0, repetition_penalty=1.4, top_k=3),
]


@pytest.mark.parametrize("sampling", LAWS, ids=["top_k", "top_p", "penalty"])
def test_head_one_law_is_that_of_the_naive_model(sampling):
    assert (
        distance(distribution_of_head_one(sampling), slow_distribution(sampling)) < 1e-5
    )


def test_the_next_law_is_that_of_one_token_at_a_time():
    rng = np.random.default_rng(0)
    for sampling in [*LAWS, Sampling(temperature=0.5, top_p=0.6, top_k=0)]:
        logits = rng.normal(size=40) * 3
        got = next_distribution(logits.copy(), [1, 5, 5], sampling)
        np.testing.assert_allclose(got, slow_next(logits, [1, 5], sampling), atol=1e-6)


# Drafts take many draws, and their distribution does not depend on how p was made.
@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("blockwise", TWO),
        ("speculative", TWO),
        pytest.param("plain", TWO, marks=pytest.mark.slow),
        *(
            pytest.param(name, sampling, marks=pytest.mark.slow)
            for name, sampling in itertools.product(["plain", "blockwise"], LAWS[1:])
        ),
    ],
)
def test_exact_decoders_have_the_law_of_head_one(name, sampling):
    distribution = distribution_of_decoder(DECODERS[name](), sampling)
    assert abs(sum(distribution.values()) - 1) < 1e-5
    assert any(len(text) < 3 for text in distribution), "no text ends before the limit"
    assert distance(distribution, distribution_of_head_one(sampling)) < 1e-6


@pytest.mark.parametrize("broken", [Trusting(), WithoutRest()])
def test_a_broken_rule_has_another_law(broken):
    distribution = distribution_of_decoder(broken)
    # It is a distribution, but not the right one.
    assert abs(sum(distribution.values()) - 1) < 1e-5
    assert distance(distribution, distribution_of_head_one()) > 1e-3


def test_greedy_laws_are_one_text():
    distribution = distribution_of_decoder(DECODERS["blockwise"](), Sampling(top_k=2))
    assert len(distribution) == 1
    assert distance(distribution, distribution_of_head_one(Sampling())) == 0


def test_what_would_take_too_long_is_not_begun():
    with pytest.raises(TooManyDraws):
        distribution_of_decoder(
            DECODERS["speculative"](),
            dataclasses.replace(TWO, top_k=0),
            most_rows=100,
        )
