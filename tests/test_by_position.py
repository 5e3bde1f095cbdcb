"""Accuracy by head and position, against logits, loops and `evaluate`."""

import numpy as np
import pytest
from runs import ROOT

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.data.batches import heldout_batches, open_sources
from mtp_jax.errors import UserError
from mtp_jax.eval.by_position import accuracy_by_position
from mtp_jax.eval.heldout import evaluate
from mtp_jax.eval.outputs import head_outputs

OLD_RUN = ROOT / "tests" / "data" / "run_format_0"
CORPUS = [str(OLD_RUN / "corpus")]


@pytest.fixture(scope="module")
def model():
    return restore_model(OLD_RUN / "run")


def by_hand(model, starts):
    """Right predictions and targets [N, K], a position at a time."""
    cfg, n = model.config, model.config.model.n_future_tokens
    correct, count = np.zeros((2, n, len(starts)))
    for batch in heldout_batches(cfg, open_sources(cfg, CORPUS)):
        logits_NBTV = head_outputs(model, batch["tokens"], batch["segments"])[1]
        said_NBT = np.argmax(np.asarray(logits_NBTV), axis=-1)
        tokens, segments = batch["tokens"], batch["segments"]
        for i, b, t in np.ndindex(n, len(tokens), cfg.data.seq_len):
            after = t + i + 1
            if segments[b, t] and segments[b, after] == segments[b, t]:
                k = sum(batch["positions"][b, t] >= start for start in starts) - 1
                count[i, k] += 1
                correct[i, k] += said_NBT[i, b, t] == tokens[b, after]
    return correct, count


@pytest.mark.parametrize(("heads", "bins"), [(2, 5), (1, 1)])
def test_accuracy_by_position_is_that_of_the_logits(model, heads, bins):
    model = model.keep_heads(heads)

    found = accuracy_by_position(model, data=CORPUS, bins=bins, max_batches=10**6)

    t = model.config.data.seq_len
    assert found.last == t - 1 and len(found.starts) == bins
    assert np.ptp(np.diff([*found.starts, t])) <= 1, "bins of equal width"
    correct, count = by_hand(model, found.starts.tolist())
    np.testing.assert_array_equal(found.count_NK, count)
    np.testing.assert_array_equal(found.correct_NK, correct)
    figures = evaluate(model, data=CORPUS)["heads"]
    wanted = [head["accuracy"] for head in figures]
    np.testing.assert_allclose(found.accuracy_N, wanted, rtol=1e-6)
    np.testing.assert_allclose(found.accuracy_NK, correct / count)


def test_few_batches_are_measured_of_a_long_text(model):
    whole = accuracy_by_position(model, data=CORPUS, max_batches=10**6)
    one = accuracy_by_position(model, data=CORPUS, max_batches=1)
    assert 0 < one.count_NK.sum() < whole.count_NK.sum()


def test_corpora_that_are_not_there_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        accuracy_by_position(model, data=[tmp_path / "nowhere"])
