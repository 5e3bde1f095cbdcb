"""Weights of heads over steps: names, tables, their formulas, and what is refused."""

import math

import jax
import numpy as np
import pytest
from models import tiny_config

from mtp_jax.cli.overrides import plain_overrides
from mtp_jax.config import HeadsConfig, LossConfig, default, freeze
from mtp_jax.errors import UserError
from mtp_jax.loss.weights import at_step, weights_at

STEPS, N = 1000, 4


def rows(schedule, n=N, steps=STEPS, **fields):
    cfg = LossConfig(schedule=schedule, **fields)
    run = jax.jit(lambda step: weights_at(cfg, n, steps, step))
    return np.stack([run(k) for k in range(0, steps + 50, 7)]), np.arange(
        0, steps + 50, 7
    )


def others(value):
    return lambda i, s: 1.0 if i == 0 else value(s)


FORMULAS = {
    ("constant", 0.3): others(lambda s: 0.3),
    ("decay", 0.6): lambda i, s: 0.6**i,
    ("share", 0.3): others(lambda s: 0.1),
    ("linear", 0.3, 0.1): others(lambda s: 0.3 - 0.2 * s),
    ("cosine", 0.3, 0.1): others(lambda s: 0.1 + 0.2 * (1 + math.cos(math.pi * s)) / 2),
    ("two_phase", 0.3, 0.1, 0.7): others(lambda s: 0.3 if s < 0.7 else 0.1),
    ("sine", 2.0): others(lambda s: 2 * math.sin(math.pi * s / 2)),
    ("forward",): lambda i, s: float(i < min(N, math.floor(s * N) + 1)),
    ("reverse",): lambda i, s: float(i < max(1, N - math.floor(s * N))),
    ("warmup", 100.0): others(lambda s: min(1.0, s * STEPS / 100)),
    (1.0, 0.0, 0.5, 2.0): lambda i, s: (1.0, 0.0, 0.5, 2.0)[i],
}


@pytest.mark.parametrize("schedule", FORMULAS, ids=str)
def test_every_schedule_is_its_formula(schedule):
    found, steps = rows(schedule)

    expected = [
        [FORMULAS[schedule](i, min(k / STEPS, 1.0)) for i in range(N)] for k in steps
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_table_is_lines_between_its_rows_times_the_weights_of_heads():
    table = ((0, 1, 0, 1), (10, 1, 1, 1), (20, 1, 1, 0))
    cfg = LossConfig(schedule=table, head_weights=(1.0, 2.0, 4.0))

    at = {k: np.asarray(weights_at(cfg, 3, 100, k)) for k in (0, 5, 10, 15, 99)}

    np.testing.assert_allclose(at[0], [1, 0, 4])
    np.testing.assert_allclose(at[5], [1, 1, 4])
    np.testing.assert_allclose(at[10], [1, 2, 4])
    np.testing.assert_allclose(at[15], [1, 2, 2])
    np.testing.assert_allclose(at[99], [1, 2, 0])


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["forward", "reverse", "two_phase", "cosine"])
def test_runs_shorter_than_the_stages_have_a_table_too(name, steps):
    table = LossConfig(schedule=(name,)).weights(4, steps)

    assert table.steps[0] == 0 and list(table.steps) == sorted(set(table.steps))
    assert np.isfinite(np.asarray(at_step(table, steps - 1))).all()


def test_a_schedule_is_named_on_the_command_line_as_in_a_config():
    assert plain_overrides(["--config.loss.schedule=forward"]) == [
        "--config.loss.schedule=('forward',)"
    ]
    as_it_is = ["--config.loss.trunk_gradient=(1,0,0,0)"]
    assert plain_overrides(as_it_is) == as_it_is
    tree = default()
    tree.loss.schedule = ("linear", 0.3, 0.1)
    assert freeze(tree).loss.schedule == ("linear", 0.3, 0.1)


TABLES = [
    (((5, 1, 1, 1, 1),), "first row must be of step 0"),
    (((0, 1, 1),), "has 2 values for 4 heads"),
    (((0, 1, 1, 1, 1), (0, 1, 1, 1, 1)), "must be whole and rise"),
    (((0, 1, 1, 1, 1), (2.5, 1, 1, 1, 1)), "must be whole and rise"),
    (((0, 1, 1, -1, 1),), "must be 0 or more"),
    ((1.0, 1.0), "has 2 values for 4 heads"),
    ((1.0, 1.0, -0.5, 1.0), "must be 0 or more"),
    (("slowly",), "its names are constant"),
    (("linear", 1.0), "it takes 2 numbers"),
    (("linear", 1.0, -1.0), "it takes 2 numbers of 0 or more"),
    (("two_phase", 1.0, 0.5, 3.0), "at most 1"),
    ((1.0, (0, 1, 1, 1, 1)), "must be rows"),
    (((),), "must be rows"),
]


@pytest.mark.parametrize("field", ["schedule", "trunk_gradient"])
@pytest.mark.parametrize(("value", "words"), TABLES, ids=str)
def test_tables_that_are_none_are_refused(field, value, words):
    tree = default()
    tree.loss[field] = value

    with pytest.raises(UserError, match=words) as error:
        freeze(tree)

    assert f"config.loss.{field}" in str(error.value)
    assert "\n" not in str(error.value)


REFUSED = [
    ({"kind": "kl"}, {"n_future_tokens": 1}, "config.loss.kind is kl"),
    ({"balance": "occ"}, {"n_future_tokens": 1}, "config.loss.balance is occ"),
    ({"mask": "entropy"}, {"n_future_tokens": 1}, "config.loss.mask is entropy"),
    ({"balance": "occ", "trunk_gradient": (1.0, 0.0)}, {}, "nothing to balance"),
    (
        {"trunk_gradient": (1.0, 0.0)},
        {"heads": HeadsConfig(kind="anticausal")},
        "trunk_gradient detaches head 2, .* anticausal",
    ),
    (
        {"acceptance": True},
        {"heads": HeadsConfig(kind="anticausal")},
        "config.loss.acceptance is True, and anticausal",
    ),
    ({"extra_targets": (0.5,)}, {}, "extra_targets are of one head"),
    ({"extra_targets": ("linear",)}, {"n_future_tokens": 1}, "has no names"),
    ({"head_z_loss": (0.1,)}, {}, "head_z_loss has 1 values for 2"),
    ({"soft_mix": 1.5}, {}, "config.loss.soft_mix is 1.5"),
    ({"label_smoothing": 1.0}, {}, "config.loss.label_smoothing is 1.0"),
    ({"kind": "e2e", "mask": "entropy"}, {}, "keep one of them"),
]


@pytest.mark.parametrize(("fields", "of_model", "words"), REFUSED, ids=str)
def test_losses_that_the_heads_cannot_have_are_refused(fields, of_model, words):
    with pytest.raises(UserError, match=words) as error:
        cfg = tiny_config(**of_model)
        type(cfg)(model=cfg.model, loss=LossConfig(**fields))

    assert "\n" not in str(error.value)


def test_other_orders_of_work_refuse_what_only_fused_computes():
    tree = default()
    tree.loss.kind = "kl"
    tree.compute.head_loss = "remat"

    with pytest.raises(UserError, match=r"config\.compute\.head_loss is remat"):
        freeze(tree)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("anticausal", {"kind": "tv"}, "make head 1 last"),
        ("causal", {"gradient_meter": True}, "heads read each other"),
    ],
)
def test_heads_in_a_chain_refuse_what_a_chain_cannot_do(kind, fields, words):
    tree = default()
    tree.heads.kind = kind
    for name, value in fields.items():
        tree.loss[name] = value

    with pytest.raises(UserError, match=words):
        freeze(tree)


def test_fewer_heads_keep_their_columns():
    cfg = LossConfig(
        schedule=((0, 1, 2, 3), (5, 4, 5, 6)),
        trunk_gradient=(1.0, 0.5, 0.2),
        kind="tv",
        balance="occ",
    )

    two, one = cfg.keep_heads(2), cfg.keep_heads(1)

    assert two.schedule == ((0, 1, 2), (5, 4, 5)) and two.kind == "tv"
    assert two.trunk_gradient == (1.0, 0.5)
    assert one.kind == "hard" and one.balance == "none"
