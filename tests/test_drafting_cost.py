"""Which number of heads pays on a chip, against passes counted by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled_dots import dot_flops
from models import TINY, mesh_of
from usual_cases import cases

from mtp_jax.config import HeadsConfig, ModelConfig
from mtp_jax.decode.batch import _prompts
from mtp_jax.decode.calibrate import choose
from mtp_jax.decode.decode_model import build, unstack
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.programs import Programs
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.chips import Chip, chip_named
from mtp_jax.planning.drafting import by_heads, least_pass_s, pass_products, pays_most

LARGE = ModelConfig(
    vocab_size=32_000,
    d_model=4096,
    num_layers=32,
    num_query_heads=32,
    num_kv_heads=32,
    d_head=128,
    d_ff=11_008,
    compute_dtype="bfloat16",
)
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11_008
TABLE = 32_000 * 4096


def by_hand(batch_size, n, chip):
    """Seconds of a pass of the large model with the first n of four heads."""
    trunk, head = 28 * LAYER, LAYER
    entries = trunk + n * head + TABLE + (TABLE if n > 1 else 0)
    flops = 2 * batch_size * (n * (trunk + head + TABLE))
    # Of a drafting head keys and values are made at all positions, the rest at one.
    of_keys, rest = 2 * 4096 * 4096, 2 * 4096 * 4096 + 3 * 4096 * 11_008
    flops += 2 * batch_size * (n - 1) * (n * of_keys + rest + TABLE)
    return max(2 * entries / chip.hbm_bytes_per_s, flops / chip.peak_flops)


@pytest.mark.parametrize("batch_size", [1, 16, 64, 256, 4096])
def test_passes_take_the_time_of_weights_or_of_arithmetic(batch_size):
    chip, accepted = chip_named("v5p"), [0.7, 0.45, 0.3]

    found = by_heads(LARGE, accepted, chip, batch_size)

    assert [each.n for each in found] == [1, 2, 3, 4]
    for each in found:
        seconds = by_hand(batch_size, each.n, chip)
        assert each.pass_s == pytest.approx(seconds)
        assert each.tokens == pytest.approx(1 + sum(accepted[: each.n - 1]))
        plain = by_hand(batch_size, 1, chip)
        assert each.speed_up == pytest.approx(each.tokens * plain / seconds)
    best = max(found, key=lambda each: each.tokens / each.pass_s)
    assert pays_most(found) == best


def test_drafts_pay_for_few_texts_and_not_for_many():
    chip = chip_named("h100")

    few, many = (by_heads(LARGE, [0.7, 0.45, 0.3], chip, b) for b in (1, 100_000))

    assert pays_most(few).n == 4 and pays_most(few).speed_up > 1.8
    assert pays_most(many).n == 1 and many[-1].speed_up < 1


def test_heads_that_read_each_other_are_kept_as_far_as_they_can_be():
    cfg = dataclasses.replace(TINY, heads=HeadsConfig(kind="anticausal"))

    found = by_heads(cfg, [0.5], Chip(1e12, 1e9, 1e9, 1e9), 1)

    assert [each.n for each in found] == [2]
    assert least_pass_s(cfg, Chip(1e12, 1e9, 1e9, 1e9), 1) > 0


@pytest.mark.parametrize("nodes", [1, 24])
def test_what_a_pass_accepts_is_the_share_of_right_first_candidates(nodes):
    ranks = np.array([[0, 0], [1, 5], [0, 3], [0, 0], [1, 0]] * 20)

    measured = choose(ranks, nodes)

    np.testing.assert_allclose(measured.accepted, [0.6, 0.4])
    assert measured.chain == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["TPU v5e", "v5e", "V5E", "tpu v5 lite"])
def test_chips_are_found_by_their_names(name):
    assert chip_named(name).peak_flops == 197e12


@pytest.mark.parametrize("name", ["", "v", "TPU", "v99", "nvidia"])
def test_what_is_no_chip_is_refused(name):
    with pytest.raises(UserError, match="is not a chip; there are TPU v4"):
        chip_named(name)


HEADS = {
    "parallel of two layers": {"layers": 2},
    "own tables": {"unembedding": "own"},
    "bias": {"markov_rank": 8},
    "linear": {"kind": "linear"},
    "residual": {"kind": "residual", "layers": 2},
    "causal": {"kind": "causal"},
    "causal, shared": {"kind": "causal", "shared": True},
    "anticausal": {"kind": "anticausal"},
    "serial": {"kind": "serial"},
    "serial of two layers": {"kind": "serial", "layers": 2},
    "one cache": {"kind": "serial", "shared": True, "draft_cache": "shared"},
}


@pytest.mark.parametrize(
    "heads", cases(HEADS, ["residual", "causal, shared", "serial of two layers"])
)
def test_arithmetic_of_a_pass_is_that_of_its_program(heads):
    of_heads = HeadsConfig(**heads)
    cfg = dataclasses.replace(
        TINY, vocab_size=96, d_model=32, d_head=8, d_ff=80, heads=of_heads,
        num_layers=1 + of_heads.counted_layers(3), n_future_tokens=3,
    )  # fmt: skip
    # What attention multiplies grows with the cache, and is not counted.
    short, long = (flops_of_a_pass(cfg, slots) for slots in (32, 64))

    assert 2 * short - long == 2 * pass_products(cfg)


def flops_of_a_pass(cfg, slots):
    """FLOPs of the products in a compiled pass, of one text."""
    decoder = Blockwise()
    with jax.set_mesh(mesh_of(replica=2)):  # a text on each of them
        params = unstack(cfg, model_builder(cfg)[0](jax.random.key(0)))
        rows = [np.zeros(8, np.int32)] * 2
        prompts = _prompts(rows, 8, Sampling(), 0, params)
        programs = Programs(cfg, eos_id=0)
        _, (state, _) = programs.begin(decoder, params, prompts, 32, slots)
        step = jax.jit(
            lambda params, state: decoder.step(build(cfg, params), state, depth=3)
        )
        return dot_flops(step.lower(params, state).compile().as_text())
