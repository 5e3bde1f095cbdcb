"""Sizes of parts, and models of one head that equal others."""

import dataclasses

import jax
import pytest
from head_cases import OPTIONS, model_of
from models import random_params, tiny_config

from mtp_jax.config import Config, HeadsConfig, LossConfig, OptimConfig
from mtp_jax.config.learning import check_learning
from mtp_jax.errors import UserError
from mtp_jax.model.flops import train_flops
from mtp_jax.model.heads.base import layer_entries
from mtp_jax.model.sizes import (
    drafting_entries,
    equal_models,
    first_entries,
    sizes_of,
    told,
)
from mtp_jax.training.train_step import make_init


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_add_up_to_all_parameters(name, one_device):
    cfg = model_of(name)
    params = random_params(cfg)

    sizes = sizes_of(cfg)

    assert sizes.total == sum(x.size for x in jax.tree.leaves(params))
    layer = layer_entries(cfg) + 2 * cfg.d_model
    norm = cfg.d_model if cfg.heads.norm == "shared" else 0
    assert sizes.trunk == 2 * layer + norm
    tables = cfg.vocab_size * cfg.d_model
    own = 4 if cfg.heads.unembedding == "own" else 1
    count = 1 if cfg.tie_embeddings else 1 + own
    bias = 2 * cfg.heads.markov_rank * cfg.vocab_size
    assert sizes.tables == count * tables + bias


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_smallest_model_has_no_array_that_is_empty(name, n, one_device):
    """Checkpoints cannot hold one; a model without a trunk is refused for it."""
    taught = n > 1 and "anticausal" not in name
    loss = LossConfig(kind="kl", teacher="ema") if taught else LossConfig()
    optim = OptimConfig(frozen=("trunk", "norms"), lora_rank=2)
    cfg = Config(model=model_of(name, n, trunk=1), loss=loss, optim=optim)

    state = jax.eval_shape(make_init(cfg), jax.random.key(0))

    assert all(x.size for x in jax.tree.leaves(state))
    check_learning(cfg)
    if of_heads := cfg.heads.counted_layers(n):
        empty = dataclasses.replace(cfg, model=model_of(name, n, trunk=0))
        with pytest.raises(UserError, match=f"num_layers is {of_heads}, and heads"):
            check_learning(empty)


def config_of(**heads):
    cfg = tiny_config(num_layers=6, n_future_tokens=4)
    model = dataclasses.replace(cfg.model, heads=HeadsConfig(**heads))
    return dataclasses.replace(cfg, model=model)


def test_parallel_heads_are_as_large_as_the_layers_they_take():
    cfg = config_of()
    one = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, n_future_tokens=1)
    )

    assert equal_models(cfg).params == pytest.approx(6)
    assert equal_models(one).params == equal_models(one).training == pytest.approx(6)
    assert equal_models(one).drafting == pytest.approx(6)


def test_a_model_of_equal_training_costs_as_much():
    cfg = config_of(kind="serial", markov_rank=8)
    layers = equal_models(cfg).training

    below, above = (
        train_flops(
            dataclasses.replace(
                cfg,
                model=dataclasses.replace(
                    cfg.model, num_layers=k, n_future_tokens=1, heads=HeadsConfig()
                ),
            )
        ).total
        for k in (int(layers), int(layers) + 1)
    )

    expected = below + (layers - int(layers)) * (above - below)
    assert train_flops(cfg).total == pytest.approx(expected)


@pytest.mark.parametrize(
    ("heads", "bodies", "tables"),
    [
        ({}, 4, 2),
        ({"unembedding": "own"}, 4, 4),
        ({"kind": "serial"}, 3, 4),
        ({"kind": "serial", "shared": True}, 3, 4),
        ({"kind": "causal", "shared": True}, 4, 2),
        ({"kind": "anticausal"}, 4, 2),
    ],
)
def test_a_drafting_pass_reads_every_weight_that_it_needs(heads, bodies, tables):
    cfg = config_of(**heads).model
    layer, table = layer_entries(cfg), cfg.vocab_size * cfg.d_model
    join = 2 * cfg.d_model**2 if cfg.heads.kind == "serial" else 0

    found = drafting_entries(cfg)

    trunk = cfg.num_trunk_layers
    assert found == trunk * layer + bodies * (layer + join) + tables * table
    first = {"serial": 0, "anticausal": 4}.get(cfg.heads.kind, 1)
    assert first_entries(cfg) == (trunk + first) * layer + table


def test_the_line_for_people_names_all_parts():
    cfg = config_of(kind="residual")

    line = told(cfg)

    assert "trunk" in line and "heads" in line and "tables" in line
    assert "n = 1 is as large with" in line
