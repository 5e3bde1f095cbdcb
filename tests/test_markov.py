"""Heads on a Markov chain: what they are accepted is known beforehand."""

import dataclasses
import functools
import itertools

import jax
import markov
import numpy as np
import pytest
from models import TINY, mesh_of, placed_batch

from mtp_jax.config import ComputeConfig, Config, LossConfig, OptimConfig, TrainConfig
from mtp_jax.loss.batch_loss import head_sums
from mtp_jax.loss.metrics import summarize
from mtp_jax.model.language_model import model_builder
from mtp_jax.training.train_step import make_init, make_step

N, ROWS, T, STEPS = 3, 64, 32, 1500
P_VV, LAW_V = markov.chain()
EXACT = {i: markov.acceptance(P_VV, LAW_V, i, best=False) for i in (2, 3)}
BEST = {i: markov.acceptance(P_VV, LAW_V, i, best=True) for i in (2, 3)}
MODEL = dataclasses.replace(TINY, vocab_size=4, num_layers=N + 1, n_future_tokens=N)


def rows(rng, count=ROWS):
    shape = (count, T + N)
    return {
        "tokens": markov.text(P_VV, LAW_V, rng, *shape),
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (count, 1)),
        "hash": np.zeros((count, 2), np.uint32),
    }


def test_the_chain_and_its_floors_are_those_of_enumeration():
    assert EXACT[2] == pytest.approx(0.712, abs=0.003)
    assert BEST[2] == pytest.approx(0.786, abs=0.003)
    # No law of a fine grid is accepted more than the one that is said to be best.
    reach = P_VV
    for a in range(4):
        found = markov.filled(P_VV, reach[a])
        value = (reach[a] * np.minimum(P_VV, found[None]).sum(1)).sum()
        assert found.sum() == pytest.approx(1)
        for q in itertools.product(np.arange(0, 1.01, 0.05), repeat=3):
            if sum(q) <= 1:
                other = np.array([*q, 1 - sum(q)])
                assert (reach[a] * np.minimum(P_VV, other[None]).sum(1)).sum() <= (
                    value + 1e-9
                )


@functools.cache
def trained(kind):
    """Figures of a model that is trained with a loss, on new text of the chain."""
    cfg = Config(
        model=MODEL,
        loss=LossConfig(kind=kind),
        optim=OptimConfig(peak_lr=0.01, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=STEPS),
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        state, step = make_init(cfg)(jax.random.key(1)), make_step(cfg)
        for _ in range(STEPS):
            state, _ = step(state, placed_batch(rows(rng), 1))
        _, build = model_builder(cfg.model)
        run = jax.jit(lambda p, b: head_sums(build(p), b, ComputeConfig()))
        new = {k: x[0] for k, x in placed_batch(rows(rng, 2048), 1).items()}
        return jax.device_get(summarize(run(state.params, new)))


@pytest.mark.slow
def test_heads_of_hard_targets_are_accepted_as_their_exact_laws():
    means = trained("hard")

    entropy = markov.entropy_rate(P_VV, LAW_V)
    assert means["loss_N"][0] == pytest.approx(entropy, abs=0.01)
    assert means["alpha_N"][1] == pytest.approx(EXACT[2], abs=0.01)


@pytest.mark.slow
def test_heads_of_total_variation_are_accepted_more_than_exact_laws():
    means = trained("tv")

    assert 0.5 * (EXACT[2] + BEST[2]) < means["alpha_N"][1] < BEST[2] + 0.005
    assert 0.5 * (EXACT[3] + BEST[3]) < means["alpha_N"][2] < BEST[3] + 0.005


@pytest.mark.slow
def test_the_end_to_end_loss_takes_at_least_as_many_tokens_a_pass():
    whole, each = trained("e2e"), trained("tv")

    assert whole["sampled_length"] >= each["sampled_length"]
