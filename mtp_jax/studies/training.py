"""Trials that are training runs: their shape, their text, their run."""

import dataclasses
import pathlib
import sysconfig

import jax

from mtp_jax.checkpoint.restore import Restored, restore_model
from mtp_jax.config import Config, default, freeze
from mtp_jax.data.prepare import prepare
from mtp_jax.errors import RunFailed
from mtp_jax.run.train import train
from mtp_jax.studies.study import Size, Trial

# Width, feed-forward width, positions of a row and steps; the full one is that of
# configs/bytes_small.py.
_SHAPES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (12, 16, 32, 2),
    "quick": (48, 128, 192, 250),
    "full": (96, 256, 320, 4500),
}
WITHOUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")


def byte_model(trial: Trial) -> Config:
    """A run of four heads on bytes of text, of the size of the trial.

    0.64 million parameters and 4,500 steps of 640 positions in full: minutes on two
    CPU cores.
    """
    width, d_ff, seq_len, steps = _SHAPES[trial.size]
    c = default()
    c.model.update(
        vocab_size=256,
        d_model=width,
        num_layers=6,
        n_future_tokens=4,
        num_query_heads=3,
        num_kv_heads=1,
        d_head=width // 3,
        d_ff=d_ff,
    )
    c.data.update(sources=python_text(trial), seq_len=seq_len, batch_size=2)
    c.optim.update(peak_lr=5e-3, warmup_steps=100 if trial.size == "full" else 20)
    c.train.steps = trial.steps or steps
    c.checkpoint.update(every=1500, keep_latest=2)
    c.eval.every = 0
    c.log.update(every=50, tensorboard=False)
    return freeze(c)


def python_text(trial: Trial) -> tuple[str, ...]:
    """Corpora of the trial, or bytes of the library of this Python, made once."""
    if trial.data:
        return trial.data
    folder = trial.shared / "python"
    if not (folder / "manifest.json").exists():
        library = pathlib.Path(sysconfig.get_path("stdlib"))
        source = library / "json" if trial.size == "tiny" else library
        heldout = 0.3 if trial.size == "tiny" else 0.05
        prepare(source, folder, exclude=WITHOUT, heldout=heldout, workers=1)
    return (str(folder),)


def with_seed(cfg: Config, seed: int) -> Config:
    """The run with this seed, of parameters and of the order of the data."""
    train_part = dataclasses.replace(cfg.train, seed=seed)
    data = dataclasses.replace(cfg.data, seed=seed)
    return dataclasses.replace(cfg, train=train_part, data=data)


def trained(trial: Trial, cfg: Config) -> Restored:
    """The model of a run with the seed of the trial, trained where it is not yet.

    Seeds are of parameters and of the order of the data, so that the arms of a seed
    see the same rows.

    Raises:
      RunFailed: the run was told to stop.
    """
    cfg = with_seed(cfg, trial.seed)
    train(cfg, trial.folder)
    jax.clear_caches()  # every arm has programs of its own
    restored = restore_model(trial.folder)
    if restored.step < cfg.train.steps:
        raise RunFailed(
            f"{trial.folder} was told to stop at step {restored.step} of "
            f"{cfg.train.steps}; the same command goes on."
        )
    return restored
