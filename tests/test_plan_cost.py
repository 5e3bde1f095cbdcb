"""Names under which clouds sell slices, and the cost of a run by the planner."""

import json

import pytest
from runs import TINY_FILE

from mtp_jax.cli import plan as verb
from mtp_jax.cli.plan_table import table
from mtp_jax.errors import UserError
from mtp_jax.planning import plan
from mtp_jax.planning.costs import run_cost
from mtp_jax.planning.topology_names import topology_of


# docs.cloud.google.com/tpu/docs: tables of v5e, v6e, v4 and v5p.
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v6e-1", "v6e:1x1"),
        ("v6e-4", "v6e:2x2"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-16", "v6e:4x4"),
        ("v6e-32", "v6e:4x8"),
        ("v6e-64", "v6e:8x8"),
        ("v6e-128", "v6e:8x16"),
        ("v6e-256", "v6e:16x16"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-32", "v5e:4x8"),
        ("v4-8", "v4:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-4096", "v5p:8x16x16"),
        ("2xv5p-128", "2xv5p:4x4x4"),
        ("4xv6e-256", "4xv6e:16x16"),
        ("v5p:4x4x4", "v5p:4x4x4"),
        ("moon", "moon"),
    ],
)
def test_a_slice_is_known_by_the_name_of_the_cloud(name, topology):
    assert topology_of(name) == topology


@pytest.mark.parametrize("name", ["v5p-3072", "v6e-2", "v6e-12", "v4-4", "v5p-9"])
def test_a_number_that_tells_no_shape_is_refused(name):
    with pytest.raises(UserError, match="tells no shape; give the shape, as in"):
        topology_of(name)


def test_a_run_costs_what_its_tokens_take_at_the_least_time_of_a_step():
    row = {"tokens_per_s_per_chip": 1000.0, "chips": 16}

    cost = run_cost(row, 36e9, 1.5)

    assert cost == {
        "tokens": 36e9,
        "chip_hours": 10_000.0,
        "hours": 625.0,
        "dollars": 15_000.0,
    }
    assert run_cost(row, 36e9, None)["dollars"] is None


ROW = {
    "topology": "v6e:4x4",
    "chips": 16,
    "devices": 16,
    "heads": 1,
    "params": 10**9,
    "argument_bytes": 2**30,
    "temp_bytes": 2**30,
    "hbm_limit_bytes": 2**35,
    "fits": True,
    "step_s": 0.5,
    "bound_by": "compute",
    "tokens_per_s_per_chip": 1000.0,
    "overhead_vs_n1": 0.0,
    "breakeven_accept_length": 1.5,
    "flops_per_step": 4e15,
    "flops_trunk": 2e15,
    "flops_heads": 1e15,
    "flops_unembedding": 1e15,
    "collectives": {},
    "remedy": None,
}


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(plan, "_check", lambda cfg, name: None)
    monkeypatch.setattr(
        plan, "plan_topology", lambda cfg, name, *rest: [{**ROW, "topology": name}]
    )


def test_the_verb_tells_chip_hours_days_and_dollars(planned, capsys):
    argv = [f"--config={TINY_FILE}", "--topology=v6e-16", "--tokens=36B"]

    assert verb.main([*argv, "--price=1.5"]) == 0
    out = capsys.readouterr().out
    assert verb.main([*argv, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)

    assert (row["topology"], row["chip_hours"], row["dollars"]) == (
        "v6e:4x4",
        10_000.0,
        None,
    )
    last = out.splitlines()[-3:]
    assert last[0].startswith("36B tokens") and "a lower bound" in last[0]
    assert last[1].split() == ["topology", "heads", "chip-hours", "days", "dollars"]
    assert last[2].split() == ["v6e:4x4", "1", "10,000", "26", "15,000"]
    assert "dollars" not in table([{**ROW, **row}], [1])


def test_without_tokens_it_is_the_run_of_the_config(planned, capsys):
    options = ["--config.train.steps=100", "--json"]

    assert verb.main([f"--config={TINY_FILE}", "--topology=v6e-16", *options]) == 0

    (row,) = json.loads(capsys.readouterr().out)
    assert row["tokens"] == 100 * 8 * 64
    assert row["chip_hours"] == pytest.approx(100 * 8 * 64 / 1000 / 3600)


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf", "", "B"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(UserError, match="is not a number above 0"):
        verb.main([f"--config={TINY_FILE}", "--topology=v6e-16", f"--tokens={text}"])


@pytest.mark.parametrize(
    ("text", "count"), [("36B", 36e9), ("2T", 2e12), ("1.5e3", 1500.0), ("7k", 7000.0)]
)
def test_tokens_are_written_as_people_do(text, count):
    assert verb._count(text) == count
