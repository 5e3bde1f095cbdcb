"""The Python interface of decoding: streams, batches of a size, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from models import mesh_of, placed_params, random_params
from test_decode import NEW, Letters, case, tiny

from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError

SAMPLED = Sampling(temperature=1.0, seed=5)


def collect(pieces):
    """The pieces of a stream, and what it returns."""
    parts = []
    while True:
        try:
            parts.append(next(pieces))
        except StopIteration as end:
            return parts, end.value


def timeless(result):
    return dataclasses.replace(result, tokens_per_s=0.0)


@pytest.mark.parametrize("decoder", ["plain", "blockwise", "speculative"])
def test_a_stream_gives_what_generate_gives(decoder):
    c = case(4, 5)
    [whole] = c.generator.generate(c.prompts[4:5], max_new_tokens=NEW, decoder=decoder)
    stops = [(), (whole.text[6:9], "zz")]
    for stop in stops:
        options = {"max_new_tokens": NEW, "decoder": decoder, "stop": stop}
        [result] = c.generator.generate(c.prompts[4:5], **options)
        parts, streamed = collect(c.generator.stream(c.prompts[4], **options))
        assert "".join(parts) == result.text and all(parts)
        assert timeless(streamed) == timeless(result)
        assert streamed.tokens_per_s > 0
        assert len(parts) > 1, "a text in one piece is no stream"
    assert result.finish == "stop"


def test_between_pieces_no_mesh_is_left_set():
    c = case(2, 3)
    before = jax.sharding.get_mesh()
    pieces = c.generator.stream(c.prompts[1], max_new_tokens=4)
    next(pieces)
    assert jax.sharding.get_mesh() == before
    pieces.close()


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_texts_do_not_depend_on_the_size_of_the_batch(sampling):
    c = case(2, 3)
    options = {"max_new_tokens": NEW, "sampling": sampling}
    whole = c.generator.generate(c.prompts, **options)
    split = c.generator.generate(c.prompts, batch_size=4, **options)
    tail = c.generator.generate(c.prompts[4:], first=4, **options)
    assert [r.tokens for r in split] == [r.tokens for r in whole]
    assert [r.tokens for r in tail] == [r.tokens for r in whole[4:]]


def test_draws_depend_on_seed_and_number():
    c = case(2, 3)
    same = [c.prompts[3]] * 8
    options = {"max_new_tokens": NEW, "decoder": "plain"}
    one = c.generator.generate(same, sampling=SAMPLED, **options)
    two = c.generator.generate(
        same, sampling=dataclasses.replace(SAMPLED, seed=6), **options
    )
    texts = {tuple(r.tokens) for r in one}
    assert len(texts) > 4, "texts of one prompt are drawn independently"
    assert texts != {tuple(r.tokens) for r in two}


def test_every_token_has_its_head_and_forward_pass():
    c = case(4, 5)
    for result in c.generator.generate(c.prompts, max_new_tokens=NEW):
        for i, (head, forward) in enumerate(
            zip(result.heads, result.passes, strict=True)
        ):
            first = result.passes.index(forward)
            last = i + 1 == len(result.passes) or result.passes[i + 1] != forward
            # Drafts first, in the order of their heads; what head 1 says ends a pass.
            assert head == i - first + 2 or (head == 1 and last)
        assert len(set(result.passes)) <= result.forwards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [""]}, "a prompt is empty"),
        ({"prompts": ["bcdefgh"]}, "has 8 tokens.*at most 7"),
        ({"decoder": "blockwise"}, "blockwise drafts .* the model has 1: use plain"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_compiled(
    arguments, message
):
    mesh, cfg = mesh_of(1, 1, 1), tiny(1, 2)
    with jax.set_mesh(mesh):
        params = placed_params(cfg, random_params(cfg))
    generator = Generator(cfg, params, Letters(1), mesh, max_prompt_tokens=7)
    arguments = {"prompts": ["b"], "max_new_tokens": 2, **arguments}
    with pytest.raises(UserError, match=message):
        generator.generate(arguments.pop("prompts"), **arguments)
    assert generator._params is None and generator._programs.compile_s == 0


def test_a_prompt_of_the_greatest_length_is_continued():
    c = case(2, 3)
    prompt = np.full(6, 3, np.int32)
    assert c.generator.prompt_length(prompt) == 7
    c.generator.max_prompt_tokens = 7
    try:
        [result] = c.generator.generate([prompt], max_new_tokens=3)
    finally:
        c.generator.max_prompt_tokens = None
    assert result.tokens or result.finish == "eos"
