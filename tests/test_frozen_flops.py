"""FLOPs and memory of runs that freeze parts, by what the compiler makes of them."""

import dataclasses

import jax
import pytest
from compiled_dots import dot_flops
from test_configs import load

from mtp_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mtp_jax.model.flops import executed_flops, train_flops
from mtp_jax.model.sizes import equal_models
from mtp_jax.parallel.sharding import abstract_tree, make_mesh
from mtp_jax.planning import aot
from mtp_jax.training.train_step import make_init, make_step

_ROWS, _T = 8, 16
_BASE = ModelConfig(
    vocab_size=256, d_model=64, num_layers=5, n_future_tokens=3, num_query_heads=4,
    num_kv_heads=2, d_head=16, d_ff=160,
)  # fmt: skip
_ALL_BUT_HEADS = ("trunk", "embedding", "unembedding")
_REST = ("embedding", "unembedding", "norms", "heads")


def config_of(
    frozen=(), heads=None, tied=False, remat="none", head_loss="fused", **optim
):
    """A run that freezes groups; `heads` are fields of config.heads."""
    of_heads = HeadsConfig(**(heads or {}))
    model = dataclasses.replace(_BASE, heads=of_heads, tie_embeddings=tied)
    return Config(
        model=model,
        data=DataConfig(seq_len=_T, batch_size=_ROWS),
        train=TrainConfig(steps=10),
        optim=OptimConfig(frozen=frozen, **optim),
        compute=ComputeConfig(remat=remat, head_loss=head_loss),
    )


def compiled(cfg):
    """The step of a run, compiled for one CPU device, and the shapes of its state."""
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = abstract_tree(jax.eval_shape(make_init(cfg), key), mesh)
        lowered = make_step(cfg).lower(state, aot.abstract_batch(cfg, mesh))
        return lowered.compile(), state


def predicted(cfg):
    """FLOPs of a step; XLA's attention computes what the mask hides, too."""
    twice = dataclasses.replace(cfg.data, seq_len=2 * _T)
    found = executed_flops(dataclasses.replace(cfg, data=twice)).total
    if cfg.model.heads.kind == "causal" and "heads" not in cfg.optim.frozen:
        # The last product of what is computed again need not be.
        found -= 3 * 2 * _BASE.d_model * _BASE.d_ff
    return found * _ROWS * _T


CASES = {
    "nothing": {},
    "all but the heads": {"frozen": _ALL_BUT_HEADS},
    "all but heads of a tied model": {"frozen": ("trunk", "embedding"), "tied": True},
}  # fmt: skip
MORE = {
    "the trunk alone": {"frozen": ("trunk",)},
    "tables": {"frozen": ("embedding", "unembedding")},
    "all but the trunk": {"frozen": _REST},
    "all but the norms": {"frozen": ("heads", *_ALL_BUT_HEADS)},
    "all but low-rank updates": {"frozen": ("trunk", *_REST), "lora_rank": 1},
    "all but linear heads": {
        "frozen": (*_ALL_BUT_HEADS, "norms"), "heads": {"kind": "linear"}
    },
    "all but residual heads": {
        "frozen": _ALL_BUT_HEADS, "heads": {"kind": "residual", "layers": 2}
    },
    "all but causal heads": {"frozen": _ALL_BUT_HEADS, "heads": {"kind": "causal"}},
    "all but the output": {
        "frozen": ("trunk", "embedding", "heads", "norms"), "heads": {"kind": "causal"}
    },
    "computed again": {"frozen": _ALL_BUT_HEADS, "remat": "full"},
    "heads computed again": {"frozen": _ALL_BUT_HEADS, "head_loss": "remat"},
}  # fmt: skip


def check(fields):
    cfg = config_of(**fields)
    program, _ = compiled(cfg)

    found = dot_flops(program.as_text())

    assert found == pytest.approx(predicted(cfg), rel=0.03)
    whole = predicted(dataclasses.replace(cfg, optim=OptimConfig()))
    # The tolerance is less than what freezing saves.
    if cfg.optim.frozen and not cfg.optim.lora_rank:
        assert found < 0.95 * whole


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_flops_are_those_of_the_compiled_step(fields):
    check(fields)


@pytest.mark.slow
@pytest.mark.parametrize("fields", MORE.values(), ids=MORE)
def test_flops_of_other_groups_are_those_of_the_compiled_step(fields):
    check(fields)


def test_memory_of_what_is_frozen_is_its_parameters_alone():
    cfg = config_of(_ALL_BUT_HEADS)
    program, state = compiled(cfg)
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(tree))
        for name, tree in state.params.items()
    }
    learning = sizes["heads"] + sizes["norm"]
    batch = 4 * _ROWS * (3 * (_T + 3) + 2)

    arguments = program.memory_analysis().argument_size_in_bytes

    assert arguments == pytest.approx(
        4 * (sum(sizes.values()) + 2 * learning) + batch, abs=64
    )
    frozen = sum(sizes.values()) - learning
    assert aot._frozen_bytes(cfg, state) == 4 * frozen
    assert aot._frozen_bytes(config_of(), state) == 0


def test_a_model_that_is_as_costly_learns_whole():
    frozen, whole = (equal_models(config_of(x)) for x in (_ALL_BUT_HEADS, ()))

    assert 0 < frozen.training < whole.training
    assert frozen.params == whole.params


@pytest.mark.parametrize(
    ("name", "of_trunk", "of_table"), [("-heads", 1, 2), ("", 3, 3)]
)
def test_an_8b_model_costs_two_flops_a_weight_and_a_pass(name, of_trunk, of_table):
    """Forward, and backward to inputs and to weights, of what is not frozen."""
    d, f, v, t, keys = 4096, 14_336, 128_256, 4096, 1024
    layer = 2 * d * d + 2 * d * keys + 3 * d * f
    forward = 2 * layer + 2 * 2 * (t / 2) * d  # and scores and sums of half the row

    found = train_flops(load("llama", f"8b-n4{name}"))

    assert found.trunk == pytest.approx(31 * forward * of_trunk, rel=1e-9)
    assert found.heads == pytest.approx(4 * forward * 3, rel=1e-9)
    assert found.unembedding == pytest.approx(4 * 2 * v * d * of_table, rel=1e-9)
