"""Which checkpoint is the best: of finite losses, whenever they were measured."""

import jax
import pytest
from models import tiny_config

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.config import CheckpointConfig
from mtp_jax.training.train_step import make_init

KEEP = CheckpointConfig(keep_latest=1, keep_best=1)


@pytest.fixture
def state(one_device):
    return make_init(tiny_config())(jax.random.key(0))


def save(checkpoints, state, **losses):
    """Saves steps: step_1=loss, in order."""
    for name, loss in losses.items():
        checkpoints.save(int(name.removeprefix("step_")), state, {}, loss)
        checkpoints.wait()


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(state, tmp_path, loss):
    checkpoints = Checkpoints(tmp_path, KEEP)

    save(checkpoints, state, step_1=1.0, step_2=2.0, step_3=loss, step_4=None)
    assert checkpoints.steps() == [1, 4]
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path, KEEP)
    save(checkpoints, state, step_5=loss, step_6=loss)
    assert checkpoints.steps() == [1, 6]
    save(checkpoints, state, step_7=0.5, step_8=0.7)
    assert checkpoints.steps() == [7, 8]
    checkpoints.close()


def test_a_loss_that_is_measured_later_counts(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, KEEP)
    save(checkpoints, state, step_1=2.0, step_2=None)

    checkpoints.measured({2: 1.0})
    save(checkpoints, state, step_3=1.5, step_4=None)

    assert checkpoints.steps() == [2, 4]
    checkpoints.close()
