"""Lines for people: means since the last line; records: a step each."""

import dataclasses

import numpy as np
import pytest
from models import tiny_config

from mtp_jax.config import LogConfig
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.records import heldout_line, mean_of_steps
from mtp_jax.run.screen import Screen
from mtp_jax.run.step_log import StepLog


class Log:
    def __init__(self):
        self.lines, self.records = [], []
        self.screen = Screen(active=False)

    def say(self, line):
        self.lines.append(line)

    def write(self, name, record):
        self.records.append(record)


class NoFile:
    def write_sometimes(self):
        pass


def metrics(loss, bad=0, tokens=100):
    return {
        "loss": np.float32(2 * loss),
        "loss_N": np.float32([loss, loss + 1]),
        "accuracy_N": np.float32([0.5, 0.25]),
        "accept_length": np.float32(1.5),
        "grad_norm": np.float32(loss),
        "lr": np.float32(1e-3),
        "bad_steps": np.int32(bad),
        "tokens": np.float32(tokens),
        "hash": np.uint32([1, 2]),
    }


def log_of(steps, every=4):
    cfg = dataclasses.replace(tiny_config(), log=LogConfig(every=every))
    log = Log()
    step_log = StepLog(cfg, 0, log=log, run_file=NoFile(), goodput=Goodput())
    for step, of_step in enumerate(steps, 1):
        step_log.begun(step, of_step)
    step_log.catch_up()
    return log


def test_a_line_is_the_mean_since_the_last_line_and_a_record_its_step():
    losses = [1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 1.0]

    log = log_of([metrics(loss) for loss in losses])

    assert "loss by head 3.000 4.000 " in log.lines[0] and "grad 3.00" in log.lines[0]
    assert "loss by head 4.000 5.000 " in log.lines[1]
    assert [record["loss/head_1"] for record in log.records] == [6.0, 1.0]
    assert "heads agree 1.50 of 2" in log.lines[0]


def test_a_step_that_was_skipped_is_in_no_mean():
    nan = float("nan")

    log = log_of([metrics(1.0), metrics(3.0), metrics(nan, bad=1), metrics(5.0)])

    assert "loss by head 2.000 3.000 " in log.lines[0]
    assert "NOT FINITE" in log.lines[0] and "loss by head 5.000" in log.lines[1]
    assert "nan" in log_of([metrics(nan, bad=1)]).lines[0]


def test_a_step_counts_by_its_targets():
    mean = mean_of_steps([metrics(1.0, tokens=300), metrics(5.0, tokens=100)])

    assert mean["loss_N"].tolist() == pytest.approx([2.0, 3.0])


def test_an_evaluation_says_of_how_much_text_it_is():
    figures = {
        "heads": [{"loss": 1.0}, {"loss": 2.0}],
        "bits_per_byte": 1.9889,
        "accept": {"length": 1.99},
        "batches": 16,
    }

    line = heldout_line(figures, 20)

    assert "1.9889 bits per byte of 16 batches" in line
    assert "heads agree 1.99 of 2" in line
