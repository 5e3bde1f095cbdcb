"""Optimizers of runs whose heads become others: what goes on, by formulas."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from grown_models import ONE, Text, heads_of
from models import placed_batch, placed_params, random_params
from runs import complete, hashes, losses, train_args

from mtp_jax.config import Config, DataConfig, HeadsConfig, OptimConfig, TrainConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.growth.starts import started
from mtp_jax.growth.states import carried, new_state
from mtp_jax.training.train_step import make_step

OPTIM = OptimConfig(peak_lr=0.02, warmup_steps=2)
STEPS = 10


def run_of(model):
    """A run of ten steps."""
    train = TrainConfig(steps=STEPS)
    return Config(model=model, optim=OPTIM, train=train, data=DataConfig(seq_len=24))


def stepped(cfg, state, count, first=0):
    """A state after more steps on the text of its model, and the last figures."""
    step, batches = make_step(cfg), list(Text(cfg.model).rows())
    for i in range(first, first + count):
        rows = batches[i % len(batches)] | {"hash": np.zeros((8, 2), np.uint32)}
        state, metrics = step(state, placed_batch(rows, 1))
    return state, metrics


def grown_to(cfg, state, n, heads):
    """Config and state after `grow --keep_optimizer --start=copy`."""
    after = dataclasses.replace(cfg, model=regrown_config(cfg.model, n, heads))
    params = started(cfg.model, after.model, state.params, "copy", None, 0)
    return after, carried(cfg, after, (state, {"rows": 8}), params)[0]


def trained(count=3):
    cfg = run_of(ONE)
    state = new_state(cfg, placed_params(ONE, random_params(ONE)))
    return cfg, stepped(cfg, state, count)[0]


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("fields", [{}, {"kind": "serial"}])
def test_a_run_that_was_grown_and_cut_again_goes_on_as_if_it_never_was(
    one_device, fields
):
    cfg, state = trained()
    whole = jax.device_get(state)
    now, there = cfg, state
    for n, heads in (
        (4, heads_of(**fields)),
        (2, heads_of(**fields)),
        (1, HeadsConfig()),
    ):
        now, there = grown_to(now, there, n, heads)

    assert now.model == cfg.model
    same(jax.device_get(there.opt_state), whole.opt_state)
    same(jax.device_get(there), whole)
    assert any(np.any(x) for x in jax.tree.leaves(whole.opt_state))
    on = stepped(now, there, 2, 3)[0]
    cfg, state = trained()
    same(jax.device_get(on), jax.device_get(stepped(cfg, state, 2, 3)[0]))


def rate_after(steps):
    """The learning rate of the step after so many: a warm-up of 2, then a cosine."""
    done = (steps + 1 - 2) / (STEPS - 2)
    low = OPTIM.peak_lr * OPTIM.decay_ratio
    return low + (OPTIM.peak_lr - low) * (1 + math.cos(math.pi * done)) / 2


def test_new_heads_take_the_step_of_adam_at_the_count_that_was_reached(one_device):
    """Their moments were 0 for three steps: Adam's formula, arXiv:1412.6980."""
    cfg, state = trained(3)
    cfg, state = grown_to(cfg, state, 4, heads_of())
    before = jax.device_get(state)

    after = jax.device_get(stepped(cfg, state, 1, 3)[0])

    adam, was = after.opt_state[1][0], before.opt_state[1][0]
    assert int(was.count) == int(before.step) == 3
    assert int(adam.count) == int(after.step) == 4
    for name in ("w_q", "norm_attention"):
        m, v, x, new = (
            np.asarray(tree["heads"][name], float)
            for tree in (adam.mu, adam.nu, before.params, after.params)
        )
        old_m, old_v = (np.asarray(y["heads"][name], float) for y in (was.mu, was.nu))
        assert not old_m[1:].any() and not old_v[1:].any()
        assert old_m[0].any() and old_v[0].any()
        g = (m - 0.9 * old_m) / 0.1  # what the step saw
        np.testing.assert_allclose(
            v, 0.95 * old_v + 0.05 * g * g, rtol=1e-4, atol=1e-12
        )
        hat_m, hat_v = m / (1 - 0.9**4), v / (1 - 0.95**4)
        decay = 0.1 * x if name == "w_q" else 0
        expected = x - rate_after(3) * (hat_m / (np.sqrt(hat_v) + 1e-8) + decay)
        np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(new - x)[1:].max() > 1e-3


def test_moments_of_frozen_parts_begin_at_0_where_they_learn_again(one_device):
    cfg, state = trained()
    frozen = dataclasses.replace(OPTIM, frozen=("trunk", "embedding"))
    held = dataclasses.replace(cfg, optim=frozen)
    held, state = grown_to(held, state_of_frozen(cfg, held, state), 3, heads_of())
    assert "trunk" not in state.opt_state[1][0].mu
    again = dataclasses.replace(held, optim=OPTIM)

    found, _ = carried(held, again, (state, {}), state.params)

    adam, was = found.opt_state[1][0], state.opt_state[1][0]
    assert not any(np.any(x) for x in jax.tree.leaves(adam.mu["trunk"]))
    same(jax.device_get(adam.mu["heads"]), jax.device_get(was.mu["heads"]))
    assert np.any(adam.mu["heads"]["w_q"][0]) and int(adam.count) == 3


def state_of_frozen(cfg, held, state):
    """The state of a run that goes on with frozen parts."""
    return carried(cfg, held, (state, {}), state.params)[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_by_verbs_go_on_with_the_losses_of_one_that_was_never_grown(
    tmp_path, corpus_dir
):
    one = ["--config.model.n_future_tokens=1", "--config.train.steps=8"]
    whole = [*one, "--config.checkpoint.every=4"]
    complete(train_args(tmp_path / "whole", corpus_dir, *whole))
    last, step = tmp_path / "whole", ["--step=4"]
    for n in (4, 2, 1):
        where = [f"--workdir={last}", f"--output={tmp_path / f'n{n}'}", f"--heads={n}"]
        heads = ["--config.heads.norm=shared"] if n == 1 else []
        options = ["--start=copy", "--keep_optimizer", *heads, *step]
        assert "step 4" in complete(["grow", *where, *options])
        last, step = tmp_path / f"n{n}", []

    complete(train_args(last, corpus_dir, *one))

    assert hashes(last) == hashes(tmp_path / "whole")[4:]
    np.testing.assert_array_equal(losses(last), losses(tmp_path / "whole")[4:])
