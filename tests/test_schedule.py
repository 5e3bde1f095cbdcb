"""Learning rates: warm-up, stable, decay; and what more steps change."""

import dataclasses

import numpy as np
import pytest

from mtp_jax.config import OptimConfig
from mtp_jax.errors import UserError
from mtp_jax.training.optim import learning_rate

WSD = OptimConfig(
    peak_lr=0.02, warmup_steps=5, schedule="wsd", decay_share=0.25, decay_ratio=0.1
)


def rates(cfg, steps, count=None):
    schedule = learning_rate(cfg, steps)
    return np.array([float(schedule(i)) for i in range(count or steps)])


def test_warm_up_stable_and_decay():
    found = rates(WSD, 40, 45)

    expected = [0.02 * k / 5 for k in range(1, 6)]  # steps 1 to 5
    expected += [0.02] * 25  # to step 30
    expected += [0.02 - 0.018 * k / 10 for k in range(1, 11)]  # to step 40
    expected += [0.002] * 5
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_more_steps_change_no_rate_before_the_decay():
    short, long = rates(WSD, 40), rates(WSD, 400)

    np.testing.assert_array_equal(short[:30], long[:30])
    cosine = dataclasses.replace(WSD, schedule="cosine")
    assert (rates(cosine, 40)[6:30] < 0.9 * rates(cosine, 400)[6:30]).sum() > 10


@pytest.mark.parametrize(
    ("warmup", "share", "steps"), [(0, 0.25, 8), (0, 1.0, 4), (7, 0.9, 8), (9, 0.5, 4)]
)
def test_odd_lengths_fall_to_the_end_or_are_still_warming_up(warmup, share, steps):
    cfg = dataclasses.replace(WSD, warmup_steps=warmup, decay_share=share)

    found = rates(cfg, steps)

    assert np.isfinite(found).all() and (found > 0).all()
    assert found.max() <= 0.02 * 1.000001
    last = 0.002 if steps > warmup else 0.02 * steps / warmup
    assert found[-1] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"config\.optim\.decay_share"):
        OptimConfig(decay_share=share)
