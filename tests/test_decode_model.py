"""The model as decoding reads it: in panels and not, and without copies of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import decode_model
from mtp_jax.cache import chain, make_cache, run_head, run_trunk
from mtp_jax.config import ModelConfig
from mtp_jax.decode_batch import Batch, put
from mtp_jax.decode_model import build, unstack
from mtp_jax.decode_program import Programs
from mtp_jax.decoders.blockwise import Blockwise
from mtp_jax.decoders.sampling import Sampling
from mtp_jax.panels import Panels, are_served
from mtp_jax.train_step import model_builder


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
    layers = [*params["trunk"], *params["heads"]]
    found = [w for layer in layers for w in (*layer.values(), *layer["mlp"].values())]
    return [w for w in found if not isinstance(w, dict) and getattr(w, "ndim", 2) > 1]


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_the_same_in_panels_and_not(one_device, monkeypatch, tied):
    if not are_served("float32"):
        pytest.skip("no C++ compiler here")
    cfg = config(tie_embeddings=tied)
    stacked = jax.jit(model_builder(cfg)[0])(jax.random.key(0))
    tokens_BW = put(np.arange(2 * 11, dtype=np.int32).reshape(2, 11))
    start_B = put(np.zeros(2, np.int32))

    @jax.jit
    def scores(params, tokens_BW, start_B):
        model, new = build(cfg, params), chain(tokens_BW, start_B)
        cache = make_cache(cfg, 3, 2, 16)
        trunk_BWD, cache = run_trunk(model, new, cache)
        heads = [run_head(model, i, trunk_BWD, new, cache)[0] for i in range(2)]
        return jnp.stack([model.logits(head_BWD) for head_BWD in heads])

    packed = unstack(cfg, stacked)
    monkeypatch.setattr(decode_model, "are_served", lambda dtype: False)
    whole = unstack(cfg, stacked)

    assert len(matrices(packed)) == 3 * 7 == len(matrices(whole))
    assert all(isinstance(w, Panels) for w in matrices(packed))
    assert not any(isinstance(w, Panels) for w in matrices(whole))
    np.testing.assert_allclose(
        scores(packed, tokens_BW, start_B),
        scores(whole, tokens_BW, start_B),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("in_panels", [True, False])
def test_no_program_copies_the_weights(one_device, monkeypatch, in_panels):
    if in_panels and not are_served("float32"):
        pytest.skip("no C++ compiler here")
    if not in_panels:
        monkeypatch.setattr(decode_model, "are_served", lambda dtype: False)
    cfg = config(d_model=256, d_head=64, d_ff=1024)
    params = unstack(cfg, jax.jit(model_builder(cfg)[0])(jax.random.key(0)))
    layer = sum(x.nbytes for x in jax.tree.leaves(params["trunk"][0]))

    programs = Programs(cfg, -1)
    # Short prompts and one of more tokens than a product of few takes.
    for tokens in (9, 150):
        rows = [np.arange(tokens, dtype=np.int32) % 40]
        # With adaptive depth all programs that there are get compiled.
        Batch(programs, params, Blockwise(), rows, 40, Sampling(), adaptive=True)

    kinds = set()
    for (kind, *_), made in programs._compiled.items():
        if kind == "chooser":
            continue
        compiled = made[0] if kind == "begin" else made
        kinds.add(kind)
        # Of all three layers, if it did; activations are about one.
        assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * layer, kind
    assert kinds == {"begin", "catch up", "advance"}
