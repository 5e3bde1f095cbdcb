"""Saving and restoring: what is kept, what is refused, on which mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from models import mesh_of, tiny_config

from mtp_jax.checkpoint.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    abstract_items,
    restore_newest,
    state_from_items,
)
from mtp_jax.config import CheckpointConfig
from mtp_jax.errors import UserError
from mtp_jax.training.train_step import make_init

KEY = jax.random.key(0)


def saved(folder, cfg, steps, heldout=None, **retention):
    """Checkpoints of a fresh state at every step, all finished."""
    checkpoints = Checkpoints(folder, CheckpointConfig(**retention))
    state = make_init(cfg)(KEY)
    for step in steps:
        loss = None if heldout is None else heldout.get(step)
        checkpoints.save(step, state, {"config": dataclasses.asdict(cfg)}, loss)
        checkpoints.wait()
    return checkpoints, state


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        ({"keep_latest": 2}, [5, 6]),
        ({"keep_latest": 1, "keep_every": 3}, [3, 6]),
        ({"keep_latest": 1, "keep_best": 1}, [2, 6]),
    ],
)
def test_old_checkpoints_go_and_the_chosen_ones_stay(
    one_device, tmp_path, retention, kept
):
    heldout = {1: 3.0, 2: 1.0, 4: 2.0}  # some steps are never evaluated

    checkpoints, _ = saved(tmp_path, tiny_config(), range(1, 7), heldout, **retention)

    assert checkpoints.steps() == kept
    checkpoints.close()


def test_a_state_comes_back_bit_by_bit_on_another_mesh(tmp_path):
    cfg = tiny_config()
    with jax.set_mesh(mesh_of(1, 4, 2)):
        checkpoints, state = saved(tmp_path, cfg, [7])
        checkpoints.close()
        wanted = jax.device_get(jax.tree.leaves((state.params, state.opt_state)))

    mesh = mesh_of(2, 2, 1)
    with jax.set_mesh(mesh):
        abstract = abstract_items(jax.eval_shape(make_init(cfg), KEY))
        step, items, damaged = restore_newest(Checkpoints(tmp_path), abstract)
        found = state_from_items(items)

    leaves = jax.tree.leaves((found.params, found.opt_state))
    assert (step, damaged) == (7, [])
    assert all(leaf.sharding.mesh == mesh for leaf in leaves)
    for a, b in zip(wanted, jax.device_get(leaves), strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.key.tolist() == state.key.tolist()


def test_another_model_is_refused_with_the_difference(one_device, tmp_path):
    checkpoints, _ = saved(tmp_path, tiny_config(), [1])
    wider = tiny_config(d_ff=96)
    abstract = abstract_items(jax.eval_shape(make_init(wider), KEY))

    with pytest.raises(UserError, match=r"w_up is float32\[.*\] there, .*96\] here"):
        restore_newest(checkpoints, abstract)

    checkpoints.close()


def test_a_step_that_is_not_there_is_refused(one_device, tmp_path):
    checkpoints, _ = saved(tmp_path, tiny_config(), [1, 2])

    with pytest.raises(UserError, match=r"no checkpoint of step 5; there are \[1, 2\]"):
        restore_newest(checkpoints, {}, step=5)

    checkpoints.close()


def test_a_save_that_was_cut_short_is_cleared_away(one_device, tmp_path):
    checkpoints, _ = saved(tmp_path, tiny_config(), [1])
    checkpoints.close()
    part = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    part.mkdir()

    again = Checkpoints(tmp_path, CheckpointConfig())

    assert again.steps() == [1] and not part.exists()
    again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "deed",
    [
        "flip",
        *(pytest.param(deed, marks=pytest.mark.slow) for deed in ("cut", "delete")),
    ],
)
def test_damage_anywhere_is_noticed_or_harmless(one_device, tmp_path, deed):
    """In every file of a checkpoint, at its ends and in between."""
    cfg = tiny_config()
    checkpoints, state = saved(tmp_path, cfg, [1])
    abstract = abstract_items(jax.eval_shape(make_init(cfg), KEY))
    wanted = jax.device_get(jax.tree.leaves((state.params, state.opt_state)))
    noticed = []

    for path in sorted(
        p for p in (tmp_path / "checkpoints/1").rglob("*") if p.is_file()
    ):
        content = path.read_bytes()
        size = len(content)
        for at in {0} if deed == "delete" else {0, size // 3, size // 2, size - 9}:
            damage(path, content, max(at, 0), deed)
            try:
                found = state_from_items(checkpoints.restore(1, abstract))
            except DamagedCheckpoint:
                noticed.append(path.name)
            else:
                leaves = jax.device_get(
                    jax.tree.leaves((found.params, found.opt_state))
                )
                for a, b in zip(wanted, leaves, strict=True):
                    np.testing.assert_array_equal(a, b)
        path.write_bytes(content)

    assert {"_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"} <= set(noticed)
    checkpoints.close()


def damage(path, content, at, deed):
    if deed == "delete":
        path.unlink(missing_ok=True)
    elif deed == "cut":
        path.write_bytes(content[:at])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
