"""Every random draw has a key of its own, and texts their distribution, at any depth.

The distribution is worked out here from logits that a forward pass over the whole text
makes, token by token, without a cache.
"""

import collections

import jax
import numpy as np
import pytest
import scipy.stats
from models import all_logits, mesh_of, placed_params, random_params
from test_decode import Letters

from mtp_jax.config import ModelConfig
from mtp_jax.decode.batch import put
from mtp_jax.decode.decoders import sampling as draws
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.dynamo_exact import DynamoExact
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.decoders.speculative import Speculative
from mtp_jax.decode.decoders.tree import Tree
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder

V, N, NEW = 4, 3, 3
PROMPT = np.array([2, 1, 3], np.int32)
MODEL = ModelConfig(
    vocab_size=V,
    d_model=16,
    num_layers=4,
    n_future_tokens=N,
    num_query_heads=4,
    num_kv_heads=2,
    d_head=4,
    d_ff=24,
)
WARM = Sampling(temperature=1.0, seed=5)
DRAFTING = [Blockwise(), Speculative(), Tree(), DynamoExact(alpha=0.0)]


@pytest.fixture(scope="module")
def model():
    """A generator whose texts never end early, and the parameters."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        params = placed_params(MODEL, random_params(MODEL, seed=3))
    return Generator(MODEL, params, Letters(eos_id=V), mesh), params


def expected(model):
    """The probability of each text of NEW tokens after the prompt, of head 1."""
    generator, params = model
    texts = list(np.ndindex((V,) * NEW))
    tokens_BT = np.array([[0, *PROMPT, *text] for text in texts], np.int32)
    zeros_BT = np.zeros_like(tokens_BT)
    positions_BT = zeros_BT + np.arange(tokens_BT.shape[1], dtype=np.int32)
    with jax.set_mesh(generator.mesh):
        build = model_builder(MODEL)[1]
        rows = map(put, (tokens_BT, zeros_BT, positions_BT))
        logits_NBTV = all_logits(build(params), *rows)
    log_p_BTV = jax.nn.log_softmax(np.asarray(logits_NBTV)[0])
    start = len(PROMPT)
    return {
        text: float(np.exp(sum(log_p_BTV[b, start + i, x] for i, x in enumerate(text))))
        for b, text in enumerate(texts)
    }


def drawn(generator, decoder, adaptive, count, batch_size):
    results = generator.generate(
        [PROMPT] * count,
        max_new_tokens=NEW,
        decoder=decoder,
        sampling=WARM,
        adaptive=adaptive,
        batch_size=batch_size,
    )
    return [tuple(r.tokens) for r in results]


def named(decoder):
    return type(decoder).__name__.lower()


@pytest.mark.parametrize("decoder", DRAFTING[1::2], ids=named)
def test_texts_of_changing_depths_have_head_ones_distribution(model, decoder):
    distribution = expected(model)
    count = 4096

    texts = drawn(model[0], decoder, (1, N), count, 2048)

    seen = collections.Counter(texts)
    assert seen.keys() <= distribution.keys()
    wanted = np.array(list(distribution.values())) * count
    found = np.array([seen[text] for text in distribution])
    common = wanted >= 5
    cells = [*zip(found[common], wanted[common], strict=True)]
    if not common.all():
        cells.append((found[~common].sum(), wanted[~common].sum()))
    found, wanted = np.array(cells).T
    assert scipy.stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > (
        1e-3
    )


@pytest.mark.parametrize("adaptive", [False, (1, N, 1, 1, 2), (N, 1)])
@pytest.mark.parametrize("decoder", DRAFTING, ids=named)
def test_no_key_is_drawn_with_twice(model, monkeypatch, decoder, adaptive):
    generator, params = model
    used = []
    gumbel = jax.random.gumbel

    def told(key, shape):
        jax.debug.callback(lambda k: used.append(k.tobytes()), jax.random.key_data(key))
        return gumbel(key, shape)

    monkeypatch.setattr(draws.jax.random, "gumbel", told)
    fresh = Generator(MODEL, params, Letters(eos_id=V), generator.mesh)

    fresh.generate(
        [PROMPT],
        max_new_tokens=20,
        decoder=decoder,
        sampling=WARM,
        adaptive=adaptive,
    )

    jax.effects_barrier()
    assert len(used) >= 7
    assert len(set(used)) == len(used)


def test_seed_number_and_depths_decide_a_text(model):
    generator, _ = model
    some = drawn(generator, Speculative(), (1, N, 2), 12, 12)

    assert drawn(generator, Speculative(), (1, N, 2), 12, 5) == some
    [text] = generator.generate(
        PROMPT,
        max_new_tokens=NEW,
        decoder=Speculative(),
        sampling=WARM,
        adaptive=(1, N, 2),
        first=7,
    )
    assert tuple(text.tokens) == some[7]
    assert len(set(some)) > 1


def test_depths_that_the_model_does_not_have_are_refused(model):
    with pytest.raises(UserError, match=r"adaptive is \[1, 4\]; .* from 1 to 3"):
        drawn(model[0], Blockwise(), (1, N + 1), 1, 1)
