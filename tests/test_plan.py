"""The planner: its arithmetic, its search for a remedy, its table."""

import dataclasses
import json
import re
import types

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from models import TINY, placed_params, random_params
from runs import ROOT, TINY_FILE

from mtp_jax.cli import plan as verb
from mtp_jax.cli.args import config_from
from mtp_jax.cli.plan_table import table
from mtp_jax.config import Config, DataConfig, LossConfig, TrainConfig
from mtp_jax.errors import UserError
from mtp_jax.model.attention import RowContext
from mtp_jax.model.flops import (
    executed_flops,
    train_flops,
    train_flops_per_token,
)
from mtp_jax.model.heads.base import layer_entries
from mtp_jax.model.language_model import model_builder, run_trunk
from mtp_jax.model.layers import unembed
from mtp_jax.parallel.chips import device_figures
from mtp_jax.parallel.sharding import spec, spec_like
from mtp_jax.planning import costs, plan, remedies
from mtp_jax.planning.aot import Compiled
from mtp_jax.planning.hlo import HloProgram, Traffic

CONFIGURED = ("jax_platforms", "jax_enable_compilation_cache")


def dot_flops(jaxpr):
    """FLOPs of all matrix products of a jaxpr, loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = [left[axis] for axis in contracted]
            total += 2 * eqn.outvars[0].aval.size * int(jnp.prod(jnp.array(inner)))
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner_jaxpr in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * dot_flops(inner_jaxpr)
    return total


@pytest.fixture
def cfg():
    return Config(
        model=dataclasses.replace(TINY, num_layers=5, n_future_tokens=2),
        data=DataConfig(seq_len=8, batch_size=8),
        train=TrainConfig(steps=1),
    )


def trunk_flops(cfg, remat):
    """FLOPs a position, counted in the jaxpr of the trunk's gradient."""
    params = placed_params(cfg.model, random_params(cfg.model))
    _, build = model_builder(cfg.model)
    rows, t = 3, cfg.data.seq_len
    positions_BT = jnp.zeros((rows, t), jnp.int32, out_sharding=spec("batch", None))

    def loss(params, x_BTD):
        model = build(params)
        context = RowContext(model.angles(positions_BT), positions_BT)
        return jnp.sum(run_trunk(model, x_BTD, context, "xla", remat))

    whole = spec("batch", None, None)
    x_BTD = jnp.ones((rows, t, cfg.model.d_model), out_sharding=whole)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x_BTD)
    return dot_flops(jaxpr.jaxpr) / (rows * t)


def test_trunk_flops_are_those_of_its_matrix_products(cfg, one_device):
    # XLA's attention computes what the mask hides, too: twice the causal half.
    hidden = 3 * 6 * cfg.data.seq_len * cfg.model.d_model

    assert trunk_flops(cfg, "none") == train_flops(cfg).trunk + hidden


def test_executed_flops_follow_remat(cfg, one_device):
    by_remat = {}
    for remat in ("none", "dots", "full"):
        compute = dataclasses.replace(cfg.compute, remat=remat)
        by_remat[remat] = executed_flops(dataclasses.replace(cfg, compute=compute))

    assert by_remat["none"] == train_flops(cfg)
    again = by_remat["full"].trunk - by_remat["none"].trunk
    counted = trunk_flops(cfg, "full") - trunk_flops(cfg, "none")
    # The last product of a layer need not be computed again.
    last = 3 * 2 * cfg.model.d_model * cfg.model.d_ff
    hidden = 3 * 2 * cfg.data.seq_len * cfg.model.d_model
    assert counted == again + hidden - last
    assert by_remat["none"].trunk < by_remat["dots"].trunk < by_remat["full"].trunk


def test_flops_of_heads_and_unembedding(cfg, one_device):
    _, build = model_builder(cfg.model)
    params = random_params(cfg.model)
    x_BTD = jnp.ones((1, 8, cfg.model.d_model))

    def logits(params, x_BTD):
        model = build(params)
        out = spec_like(x_BTD, "vocab")
        return jnp.sum(unembed(x_BTD, model.unembedding_param(), out))

    jaxpr = jax.make_jaxpr(jax.grad(logits, argnums=(0, 1)))(params, x_BTD)
    parts = train_flops(cfg)
    assert parts.unembedding == 2 * dot_flops(jaxpr.jaxpr) / 8
    assert parts.heads == parts.trunk * 2 / 3  # two heads, three trunk layers
    assert parts.total == train_flops_per_token(cfg)


def test_a_rematerialized_head_loss_computes_heads_twice(cfg):
    compute = dataclasses.replace(cfg.compute, remat="none", head_loss="remat")
    found = executed_flops(dataclasses.replace(cfg, compute=compute))

    useful = train_flops(cfg)
    assert found.trunk == useful.trunk
    assert found.heads == pytest.approx(useful.heads * 4 / 3)
    assert found.unembedding == pytest.approx(useful.unembedding * 4 / 3)


def device(kind, **attributes):
    return types.SimpleNamespace(device_kind=kind, **attributes)


def test_figures_are_those_of_a_device_not_of_a_chip():
    assert device_figures(device("TPU v5", num_cores=2)).peak_flops == 459e12
    assert device_figures(device("TPU v4", num_cores=1)).peak_flops == 275e12 / 2
    assert device_figures(device("TPU v4")).hbm_bytes == 32 * 2**30
    assert device_figures(device("TPU7x")).peak_flops == 2307e12 / 2
    assert device_figures(device("TPU v5 lite")).hbm_bytes_per_s == 819e9
    assert device_figures(device("cpu")) is None


def test_breakeven_is_the_ratio_of_weights_read():
    model = dataclasses.replace(TINY, num_layers=3, n_future_tokens=2)
    layer, table = layer_entries(model), model.vocab_size * model.d_model

    # The table is read by head 1, and again by the head that drafts after it.
    assert costs.breakeven(model) == (3 * layer + 2 * table) / (2 * layer + table)
    assert costs.breakeven(dataclasses.replace(model, n_future_tokens=1)) == 1.0


def test_overhead_compares_what_both_have():
    base = {"compute_s": 2.0, "hbm_s": 1.0, "links_s": 4.0, "dcn_s": 3.0}

    assert costs.overhead({**base, "links_s": 5.0}, base) == 0.25
    assert costs.overhead({**base, "dcn_s": 6.0}, base) == 0.5
    refused = {"compute_s": 3.0, "hbm_s": 1.0, "links_s": None, "dcn_s": None}
    assert costs.overhead(refused, base) == 0.5
    assert costs.overhead(base, refused) == pytest.approx(2 / 3 - 1)


def test_other_numbers_of_heads_drop_the_weights(cfg):
    cfg = dataclasses.replace(cfg, loss=LossConfig(head_weights=(1.0, 0.5)))

    assert plan.same_size_with_heads(cfg, 2) == cfg
    assert plan.same_size_with_heads(cfg, 4).loss.head_weights == ()
    assert plan.same_size_with_heads(cfg, 4).model.num_layers == 5


FITS = Compiled(
    100,
    10,
    5,
    7,
    15,
    None,
    HloProgram({"all-gather": Traffic(3, 8e9, 2, 5e9)}, (), 1, ()),
)
TOO_LARGE = Compiled(100, 10, 50, 50, 60, 40, None)


@pytest.fixture
def four_chips(monkeypatch):
    """Any topology has four v5e chips, and libtpu is not needed."""
    devices = [device("TPU v5 lite", num_cores=1)] * 4
    mesh = types.SimpleNamespace(
        shape={"replica": 1, "vocab": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    )
    for module in (plan, remedies):
        monkeypatch.setattr(module, "topology_devices", lambda name: devices)
    for module in (plan, costs, remedies):
        monkeypatch.setattr(module, "make_mesh", lambda cfg, devices: mesh)


def test_remedies_are_tried_in_order(cfg, four_chips):
    compute = dataclasses.replace(cfg.compute, remat="none", chunk_tokens=8192)
    data = DataConfig(seq_len=1024, batch_size=48)  # 12 rows a chip
    cfg = dataclasses.replace(cfg, compute=compute, data=data)
    tried, told = [], []

    def compile_(changed, topology):
        tried.append((changed, topology))
        return TOO_LARGE

    assert remedies.find_remedy(cfg, "v5e:2x2", compile_, told.append) is None
    options = [option for option, _, _ in remedies.remedies(cfg, "v5e:2x2")]
    assert options == [
        "--config.compute.remat=full",
        "--config.compute.chunk_tokens=2048",
        "--config.train.accumulation=2",
        "--config.train.accumulation=4",
        "--config.compute.remat=offload",
        "--topology=v5e:2x4",
    ]
    assert told == [f"trying {option}" for option in options]
    assert tried[0][0].compute.remat == "full"
    assert tried[0][0].compute.chunk_tokens == 8192  # one change at a time
    assert tried[3][0].train.accumulation == 4
    assert tried[-1] == (cfg, "v5e:2x4")


def test_the_first_remedy_that_fits_is_told(cfg, four_chips):
    told = []

    def compile_(changed, topology):
        if changed.compute.remat == "offload":
            raise UserError("not on this mesh")
        return FITS if topology == "v5e:2x4" else TOO_LARGE

    assert (
        remedies.find_remedy(cfg, "v5e:2x2", compile_, told.append)
        == "--topology=v5e:2x4"
    )


def test_a_naive_head_loss_is_the_first_to_go(cfg, four_chips):
    compute = dataclasses.replace(cfg.compute, head_loss="naive")
    cfg = dataclasses.replace(cfg, compute=compute)

    options = [option for option, _, _ in remedies.remedies(cfg, "v5e:2x2")]
    assert options[:2] == [
        "--config.compute.head_loss=fused",
        "--config.train.accumulation=2",
    ]


def test_larger_topologies():
    assert remedies.larger_topology("v5e:2x2") == "v5e:2x4"
    assert remedies.larger_topology("v5e:4x8") == "v5e:8x8"
    assert remedies.larger_topology("v5p:2x2x1") == "v5p:2x2x2"
    assert remedies.larger_topology("v5p:4x4x8") == "v5p:4x8x8"
    assert remedies.larger_topology("2xv5p:2x2x1") == "2xv5p:2x2x2"


def test_rows_and_table(four_chips):
    cfg = config_from(f"{ROOT}/configs/paper.py:7b-n4", ["--config.data.batch_size=64"])

    def compile_(changed, topology):
        n = changed.model.n_future_tokens
        large = n == 4 and changed.train.accumulation == 1
        return TOO_LARGE if large else FITS

    rows = plan.plan_topology(cfg, "v5e:16x16", [1, 2, 4], compile_, print)

    assert [row["heads"] for row in rows] == [1, 2, 4]
    assert [row["fits"] for row in rows] == [True, True, False]
    assert [row["remedy"] for row in rows] == [
        None,
        None,
        "--config.train.accumulation=2",
    ]
    first, _, last = rows
    positions = cfg.data.batch_size * cfg.data.seq_len
    assert first["links_s"] == 8e9 / 200e9
    assert first["bound_by"] == "compute" and first["overhead_vs_n1"] == 0.0
    assert first["tokens_per_s_per_chip"] == positions / first["step_s"] / 4
    work = executed_flops(plan.same_size_with_heads(cfg, 4)).total * positions
    assert last["compute_s"] == work / 4 / 197e12
    assert last["hbm_bytes"] == 60 and last["hbm_limit_bytes"] == 40
    text = table(rows, [1, 2, 4])
    assert "v5e:16x16, n = 4: fits with --config.train.accumulation=2" in text
    assert max(map(len, text.splitlines())) <= 100
    counts = first["collectives"]["all-gather"]
    assert counts == {"count": 3, "bytes": 8e9, "hidden": 2, "hidden_bytes": 5e9}
    overlap = text.partition("Collectives of a step")[2].splitlines()[1:5]
    assert overlap[0].split() == ["topology", "heads", "all-gather", "exposed"]
    assert overlap[1].split() == ["v5e:16x16", "1", "2", "of", "3", "3"]
    assert overlap[3].split() == ["v5e:16x16", "4", "?", "?"]
    assert json.loads(json.dumps(rows)) == rows


def test_plan_from_python_gives_the_rows_of_the_verb(four_chips, monkeypatch, capsys):
    def compile_(cfg, devices):
        large = cfg.model.n_future_tokens == 4 and cfg.compute.remat != "full"
        return TOO_LARGE if large else FITS

    monkeypatch.setattr(plan, "compile_step", compile_)
    monkeypatch.setattr(plan, "check_attention", lambda cfg, mesh: None)
    options = ["--config.compute.remat=none"]
    cfg = config_from(str(TINY_FILE), options)
    names = ["v5e:2x2", "v5e:2x4"]
    kept = {name: getattr(jax.config, name) for name in CONFIGURED}
    progress = []

    rows = plan.plan(cfg, names, heads=[4, 2, 4], progress=progress.append)

    topologies = f"--topology={','.join(names)}"
    argv = [f"--config={TINY_FILE}", topologies, "--heads=2,4", *options]
    assert verb.main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert rows == json.loads(printed.out)
    assert [(row["topology"], row["heads"]) for row in rows] == [
        (name, n) for name in names for n in (1, 2, 4)
    ]
    assert rows[2]["remedy"] == rows[5]["remedy"] == "--config.compute.remat=full"
    done = [line for line in progress if "compiling" not in line]
    assert [re.sub(r"\d+ s\)", "0 s)", line) for line in done[:6]] == [
        "6 programs to compile; one of a large model takes minutes",
        "v5e:2x2, n = 1: compiled (0 s)",
        "v5e:2x2, n = 2: compiled (0 s)",
        "v5e:2x2, n = 4: does not fit (0 s)",
        "trying --config.compute.remat=full",
        "v5e:2x2, n = 4: compiled (0 s)",
    ]
    assert progress[1] == "v5e:2x2, n = 1: compiling ..."
    assert re.fullmatch(r"planned in \d+ s", progress[-1])
    assert printed.err.splitlines() == progress
    assert kept == {name: getattr(jax.config, name) for name in CONFIGURED}
    assert plan.plan(cfg, names[0], heads=[4])[0] == rows[0]
    assert verb.main(argv) == 0
    assert capsys.readouterr().out == table(rows, [2, 4]) + "\n"


def test_more_heads_than_layers_are_refused_from_python(cfg):
    with pytest.raises(UserError, match="--heads=6 is more than config"):
        plan.plan(cfg, "v5e:2x2", heads=[1, 6])
    with pytest.raises(UserError, match="0 is not a whole number above 0"):
        plan.plan(cfg, "v5e:2x2", heads=[0])


def test_hbm_traffic(cfg):
    compiled = dataclasses.replace(FITS, params=1000, argument_bytes=64)
    trunk = 3 * layer_entries(cfg.model)  # three layers, of two heads none
    for remat, read in (
        ("none", 2000),
        ("dots", 2000),
        ("full", 2000 + trunk),
        ("offload", 2000 + trunk),
    ):
        compute = dataclasses.replace(cfg.compute, remat=remat)
        changed = dataclasses.replace(
            cfg, compute=compute, train=TrainConfig(accumulation=2)
        )
        traffic = costs.hbm_traffic(changed, compiled, tensor=2)
        assert traffic == 128 + 2 * read * 4 / 2


def test_hbm_traffic_of_what_is_frozen(cfg):
    compiled = dataclasses.replace(
        FITS, params=1000, argument_bytes=64, frozen_bytes=24
    )
    layer = layer_entries(cfg.model)
    for frozen, read in (
        (("trunk", "embedding"), 2000 - 3 * layer),  # and nothing is computed again
        (("trunk",), 2000 + 3 * layer),
        (("trunk", "embedding", "heads"), 2000 - 5 * layer),
    ):
        optim = dataclasses.replace(cfg.optim, frozen=frozen)
        compute = dataclasses.replace(cfg.compute, remat="full")
        changed = dataclasses.replace(cfg, optim=optim, compute=compute)
        traffic = costs.hbm_traffic(changed, compiled, tensor=1)
        assert traffic == 128 - 24 + read * 4
