"""The model as decoding reads it: in panels and not, and without copies of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import ModelConfig
from mtp_jax.decode.batch import DecodeBatch, put
from mtp_jax.decode.cache import chain, decode_trunk, make_cache
from mtp_jax.decode.cpu import native
from mtp_jax.decode.cpu.packed_weights import PackedWeight
from mtp_jax.decode.decode_model import build, unstack
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.head_passes import at_all, read_first
from mtp_jax.decode.programs import Programs
from mtp_jax.model.language_model import model_builder


def config(**changes):
    return ModelConfig(
        **{
            "vocab_size": 40,
            "d_model": 48,
            "num_layers": 3,
            "n_future_tokens": 2,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "d_head": 12,
            "d_ff": 80,
            **changes,
        }
    )


def matrices(params):
    layers = [*params["trunk"], *(x for h in params["heads"] for x in h["bodies"])]
    named = [item for x in layers for item in (*x.items(), *x["mlp"].items())]
    return [w for name, w in named if name.startswith("w_")]


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_the_same_in_panels_and_not(one_device, monkeypatch, tied):
    if not native.serves("float32"):
        pytest.skip("no C++ compiler here")
    cfg = config(tie_embeddings=tied)
    stacked = jax.jit(model_builder(cfg)[0])(jax.random.key(0))
    tokens_BW = put(np.arange(2 * 11, dtype=np.int32).reshape(2, 11))
    start_B = put(np.zeros(2, np.int32))

    @jax.jit
    def scores(params, tokens_BW, start_B):
        model, new = build(cfg, params), chain(tokens_BW, start_B)
        cache = make_cache(cfg, 2, 2, 16)
        trunk_BWD, cache = decode_trunk(model, new, cache)
        head_BWD, source_BWX, cache = read_first(model, trunk_BWD, new, cache)
        heads = [head_BWD, *at_all(model, source_BWX, new, cache)[0]]
        return jnp.stack([model.logits(head_BWD) for head_BWD in heads])

    packed = unstack(cfg, stacked)
    monkeypatch.setattr(native, "serves", lambda dtype: False)
    whole = unstack(cfg, stacked)

    assert len(matrices(packed)) == 3 * 7 == len(matrices(whole))
    assert all(isinstance(w, PackedWeight) for w in matrices(packed))
    assert not any(isinstance(w, PackedWeight) for w in matrices(whole))
    np.testing.assert_allclose(
        scores(packed, tokens_BW, start_B),
        scores(whole, tokens_BW, start_B),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("heads", "groups", "d_head", "d_model"),
    [(4, 2, 12, 48), (8, 8, 32, 256), (2, 1, 128, 256)],
)
def test_a_token_gives_the_same_bits_whatever_is_read_with_it(
    one_device, heads, groups, d_head, d_model
):
    if not native.serves("float32"):
        pytest.skip("no C++ compiler here")
    cfg = config(
        vocab_size=256,
        d_model=d_model,
        num_query_heads=heads,
        num_kv_heads=groups,
        d_head=d_head,
        d_ff=3 * d_model,
    )
    params = unstack(cfg, jax.jit(model_builder(cfg)[0])(jax.random.key(0)))
    length = 40
    tokens_BE = np.random.default_rng(0).integers(0, 256, (3, length), np.int32)

    # Of what these tests leave out to compile faster: without it XLA adds in any order.
    emitters = {"xla_cpu_use_fusion_emitters": True}
    is_default = jax.__version_info__ >= (0, 11)

    @jax.jit(compiler_options={} if is_default else emitters)
    def read(params, tokens_BW, start_B, cache):
        model, new = build(cfg, params), chain(tokens_BW, start_B)
        trunk_BWD, cache = decode_trunk(model, new, cache)
        head_BWD, source_BWX, cache = read_first(model, trunk_BWD, new, cache)
        others, cache = at_all(model, source_BWX, new, cache)
        return [trunk_BWD, *map(model.logits, [head_BWD, *others])], cache

    def in_pieces(rows, width):
        """All there is to know of some texts, read so many tokens at a time."""
        cache, found = make_cache(cfg, 2, len(rows), 512), []
        for at in range(0, length, width):
            tokens_BW = tokens_BE[rows, at : at + width]
            start_B = np.full(len(rows), at, np.int32)
            new, cache = read(params, put(tokens_BW), put(start_B), cache)
            found.append(np.concatenate(new, axis=2))
        stores = [np.asarray(x)[:, :, :length] for x in jax.tree.leaves(cache)]
        return np.concatenate(found, axis=1), *stores

    one_by_one = [in_pieces([row], 1) for row in range(3)]
    for rows, width in [([0], 2), ([0], 3), ([0], 4), ([1], 8), ([1], 40),
                        ([1, 2], 1), ([0, 1, 2], 4), ([0, 1, 2], 40)]:  # fmt: skip
        for among, alone in zip(
            in_pieces(rows, width),
            zip(*(one_by_one[row] for row in rows), strict=True),
            strict=True,
        ):
            np.testing.assert_array_equal(among, np.concatenate(alone))


@pytest.mark.parametrize(
    "in_panels", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_no_program_copies_the_weights(one_device, monkeypatch, in_panels):
    if in_panels and not native.serves("float32"):
        pytest.skip("no C++ compiler here")
    if not in_panels:
        monkeypatch.setattr(native, "serves", lambda dtype: False)
    cfg = config(d_model=256, d_head=64, d_ff=1024)
    params = unstack(cfg, jax.jit(model_builder(cfg)[0])(jax.random.key(0)))
    layer = sum(x.nbytes for x in jax.tree.leaves(params["trunk"][0]))

    programs = Programs(cfg, -1)
    # Short prompts and one of more tokens than a product of few takes.
    for tokens in (9, 150):
        rows = [np.arange(tokens, dtype=np.int32) % 40]
        # With adaptive depth all programs that there are get compiled.
        DecodeBatch(programs, params, Blockwise(), rows, 40, Sampling(), adaptive=True)

    kinds = set()
    for (kind, *_), made in programs._compiled.items():
        if kind == "chooser":
            continue
        compiled = made[0] if kind == "begin" else made
        kinds.add(kind)
        # Of all three layers, if it did; activations are about one.
        assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * layer, kind
    assert kinds == {"begin", "leave heads", "catch up", "advance"}
