"""Every file of configs/: it freezes, and its model has the shape it promises."""

import dataclasses
import importlib.util
import math

import jax
import pytest
from runs import ROOT

from mtp_jax.config import freeze
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import check_divisible

# Millions of parameters, embeddings included, recomputed by hand from table S14 of
# arXiv:2404.19737 with Llama's feed-forward width and 32,000 tokens.
PAPER = {
    "1m": 9.5,
    "3m": 19.8,
    "10m": 35.2,
    "30m": 66.9,
    "100m": 148,
    "300m": 387,
    "1b": 1118,
    "0.3b": 297,
    "0.6b": 630,
    "1.3b": 1364,
    "3b": 3019,
    "7b": 6738,
    "13b": 13016,
}


def load(name, *argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return freeze(module.get_config(*argument))


def parameters(cfg):
    init, _ = model_builder(cfg.model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "name",
    # finetune.py needs the workdir of a run.
    sorted({p.stem for p in (ROOT / "configs").glob("*.py")} - {"finetune"}),
)
def test_a_config_freezes_and_makes_a_model(one_device, name):
    cfg = load(name)

    assert parameters(cfg) > 0


@pytest.mark.parametrize(("shape", "millions"), PAPER.items())
def test_a_model_of_the_paper_has_its_size_with_any_n(one_device, shape, millions):
    sizes = {n: parameters(load("paper", f"{shape}-n{n}")) for n in (1, 2, 4)}

    assert sizes[1] == sizes[2] == sizes[4]
    assert sizes[1] / 1e6 == pytest.approx(millions, rel=0.005)


def test_the_recipes_are_those_of_the_paper():
    seven, byte = load("paper", "7b-n4"), load("paper", "7b-bytes-n8")

    assert seven.data.batch_size * seven.data.seq_len == 8 * 2**20
    assert (seven.train.steps, seven.optim.warmup_steps) == (25_000, 2000)
    assert (seven.optim.b1, seven.optim.b2, seven.optim.weight_decay) == (
        0.9,
        0.95,
        0.1,
    )
    assert seven.model.num_trunk_layers == 28
    assert byte.data.batch_size * byte.data.seq_len == 12 * 2**20
    assert (byte.model.vocab_size, byte.data.seq_len) == (256, 8192)
    assert byte.model.n_future_tokens == 8


@pytest.mark.parametrize(
    "argument", ["7b", "7b-n", "7b-nx", "8b-n4", "7b-n0", "7b-n33"]
)
def test_an_unknown_model_of_the_paper_is_refused(argument):
    with pytest.raises(UserError):
        load("paper", argument)


def test_llama_has_its_size_and_a_layer_for_each_further_head(one_device):
    sizes = {n: parameters(load("llama", f"8b-n{n}")) for n in (1, 4)}

    assert sizes[1] == 8_030_261_248  # as its weights on Hugging Face count
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
    assert sizes[4] - sizes[1] == 3 * layer


# Layers of trunk and head 1, parameters by hand from arXiv:2407.21783, table 3, with
# three layers more; and the devices of the pods that the file names.
LLAMAS = {
    "8b-n4-long": (32, 8_684_597_248, {"sequence": 16}, 64),
    "70b-n4": (80, 73_120_669_696, {"tensor": 8}, 512),
    "405b-n4": (126, 415_416_500_224, {"tensor": 8}, 512),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_larger_llamas_have_their_sizes_and_split_over_pods(one_device, name):
    layers, params, axes, devices = LLAMAS[name]
    cfg = load("llama", name)

    assert parameters(cfg) == params
    assert cfg.model.num_trunk_layers == layers - 1
    sizes = {"replica": 1, "sequence": 1, "tensor": 1} | axes
    fsdp = devices // math.prod(sizes.values())
    names = tuple(sizes | {"fsdp": fsdp})
    check_divisible(cfg, jax.sharding.AbstractMesh((*sizes.values(), fsdp), names))
    assert dataclasses.asdict(cfg.mesh) == sizes | {"fsdp": -1}


@pytest.mark.parametrize(
    "argument", ["8b", "8b-n0", "7b-n4", "8b-nx", "8b-n2-", "8b-n1-heads"]
)
def test_an_unknown_llama_is_refused(argument):
    with pytest.raises(UserError):
        load("llama", argument)


_D, _V, _LAYER = 4096, 32_000, 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
_PLAIN = 32 * _LAYER + 2 * _V * _D + _D
KINDS = {
    "s4-next-token": _PLAIN,
    "s4-linear": _PLAIN + 3 * _D**2,
    "s4-anticausal": _PLAIN,
    "s4-causal": _PLAIN,
    "s4-parallel": _PLAIN,
    "s4-parallel-plus3": _PLAIN + 3 * _LAYER,
    "deepseek": _PLAIN + _LAYER + 2 * _D**2 + 2 * _D,
    "repeated": _PLAIN + _LAYER + 2 * _D**2 + 2 * _D,
    "medusa": _PLAIN + 4 * (_D**2 + _D) + 4 * _V * _D,
    "markov": _PLAIN + 2 * 256 * _V,
}


# Layers of the trunk; the others have 28.
TRUNKS = {"s4-next-token": 31} | dict.fromkeys(
    ("s4-linear", "s4-parallel-plus3", "deepseek", "repeated", "medusa"), 32
)
TRUNKS["s4-parallel-plus3"] = 31


@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_heads_of_a_kind_has_its_size(one_device, name):
    cfg = load("head_kinds", name)

    assert parameters(cfg) == KINDS[name]
    assert cfg.model.num_trunk_layers == TRUNKS.get(name, 28)


def test_an_unknown_model_with_heads_of_a_kind_is_refused():
    with pytest.raises(UserError, match="the names are s4-next-token"):
        load("head_kinds", "s4-serial")
