"""The account of a run's wall time, by a clock that the test sets."""

import pytest

from mtp_jax.run.goodput import KINDS, Goodput, straggler


class Clock:
    def __init__(self, at):
        self.at = at

    def __call__(self):
        return self.at


def seconds(**kinds):
    return {**dict.fromkeys(KINDS, 0.0), **kinds}


def test_every_second_is_counted_once():
    clock = Clock(105.0)
    goodput = Goodput(clock, began=100.0)

    goodput.now_in("step")
    clock.at += 10
    with goodput.spent("evaluate"):
        clock.at += 3
        with goodput.spent("save"):
            clock.at += 2
        clock.at += 1
    clock.at += 4

    assert goodput.seconds() == seconds(start=5.0, step=14.0, evaluate=4.0, save=2.0)
    assert goodput.share() == pytest.approx(14 / 25)
    state = goodput.state()
    assert sum(state["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert state["at"] == 125.0 and not state["finished"]


def test_what_a_fault_costs_is_lost():
    """Saved after 30 s of steps, killed after 50, begun again 7 s later."""
    last = {"seconds": seconds(step=50.0, save=2.0), "at": 200.0, "finished": False}
    clock = Clock(209.0)
    goodput = Goodput(clock, began=207.0)

    goodput.go_on(seconds(step=30.0, save=1.0), last)

    wanted = seconds(step=30.0, save=1.0, lost=21.0 + 7.0, start=2.0)
    assert goodput.seconds() == wanted


def test_a_finished_run_that_goes_on_has_lost_nothing():
    last = {"seconds": seconds(step=50.0), "at": 200.0, "finished": True}
    goodput = Goodput(Clock(9000.0), began=9000.0)

    goodput.go_on(seconds(step=49.0), last)

    assert goodput.seconds() == seconds(step=50.0)


def window(own_s, step=10):
    return {"step": step, "own_s": own_s, "data_s": 0.1}


@pytest.mark.parametrize(
    ("windows", "found"),
    [
        ({0: window(0.1), 1: window(0.1), 2: window(0.5)}, 2),
        ({0: window(0.9), 1: window(0.1)}, 0),
        ({0: window(0.1), 1: window(0.11), 2: window(0.12)}, None),  # alike
        ({0: window(0.001), 1: window(0.02)}, None),  # a small part of a step
        ({0: window(0.1), 1: window(0.9, step=5)}, None),  # of another window
        ({0: window(0.1), 1: {}}, None),
        ({}, None),
    ],
)
def test_the_slowest_host_is_named_where_it_stands_out(windows, found):
    slowest = straggler(windows, step=10, step_s=1.0)

    assert slowest == (None if found is None else (found, windows[found]))
