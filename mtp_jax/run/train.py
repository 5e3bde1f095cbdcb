"""Training, from a config and a workdir: checks, the start of JAX, lock and loop."""

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

import jax
from etils import epath

from mtp_jax import __version__
from mtp_jax.checkpoint.workdir import lock_for_all
from mtp_jax.config import (
    PARTS_OF_MODEL,
    Config,
    ModelConfig,
    as_tree,
    config_from_json,
)
from mtp_jax.config.learning import check_learning, idle_options
from mtp_jax.data.batches import cut_conversations, open_sources
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import save_tokenizer
from mtp_jax.data.workers import check_workers
from mtp_jax.distributed import hosts
from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.errors import UserError, disk_errors_told, say
from mtp_jax.growth.grow import check_init
from mtp_jax.model.attention import check_attention
from mtp_jax.parallel.sharding import check_divisible, make_mesh
from mtp_jax.run.loop import run
from mtp_jax.run.scalar_logs import check_scalar_logs
from mtp_jax.run.teacher import load_teacher
from mtp_jax.storage import workdir_at


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    cluster: ProcessInfo | None = None,
) -> None:
    """Trains a model, or goes on where the workdir's newest checkpoint stands.

    Checks everything that can be checked before it changes anything, but for the
    secret of several hosts, which process 0 writes into the workdir. To be called in
    the main thread, as until it returns SIGTERM, SIGHUP and Ctrl-C mean: save and stop.
    It turns on JAX's compilation cache, by `config.train.compilation_cache`. In a
    process that is one of several, it can be called once: the processes part at the
    end, and if one fails, all end.

    Args:
      config: the run, from `mtp_jax.config.freeze`.
      workdir: folder of the run, here or in an object store; made if it is not there.
      cluster: which process of how many this is; None: what a TPU pod, GKE, Slurm or
        Open MPI says, or one process alone.

    Raises:
      UserError: the config, the corpora, the devices and the workdir do not go
        together, another process trains there, or the disk is full or read-only.
      RunFailed: the run cannot go on, as after too many non-finite steps in a row.
    """
    with hosts.heeding_signals():
        try:
            with disk_errors_told(workdir):
                _train(config, os.fspath(workdir), cluster)
            hosts.leave()
        except BaseException as error:
            hosts.fail(error)  # of several hosts, all end
            raise


def _train(cfg: Config, name: str, cluster: ProcessInfo | None) -> None:
    workdir = workdir_at(name)
    check_workers("config.data.workers", cfg.data.workers)
    check_scalar_logs(cfg)
    _start_jax(cfg, cluster, workdir)
    mesh = make_mesh(cfg.mesh)
    check_divisible(cfg, mesh)
    check_attention(cfg, mesh)
    check_learning(cfg)
    part = (jax.process_index(), jax.process_count())
    tokenizer = _tokenizer_of_run(cfg.model, workdir)
    if tokenizer is None:
        check_init(cfg)
    corpora = open_sources(cfg, part=part, tokenizer=tokenizer)
    _refuse_nothing_held_out(cfg, corpora)
    if jax.process_index() == 0:
        for line in (*idle_options(cfg), *cut_conversations(cfg, corpora)):
            say(f"mtp-jax: {line}")
    teacher = load_teacher(cfg, mesh, corpora[0].tokenizer)
    _prepare_workdir(workdir, corpora)
    held = lock_for_all(workdir, f"--workdir={workdir}")
    with held or contextlib.nullcontext(), jax.set_mesh(mesh):
        run(cfg, workdir, mesh, corpora, teacher)


def _start_jax(cfg: Config, where: ProcessInfo | None, workdir: epath.Path) -> None:
    """Starts the runtime of this process, alone or with the other hosts."""
    if cfg.train.compilation_cache:
        cache = os.path.expanduser(cfg.train.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    text = json.dumps(as_tree(cfg), sort_keys=True)
    about = {
        "mtp_jax": __version__,
        "jax": jax.__version__,
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
    }
    limits_s = cfg.train.join_timeout_s, cfg.train.host_timeout_s
    hosts.join(where, *limits_s, about, workdir)


def _refuse_nothing_held_out(cfg: Config, corpora: list[Corpus]) -> None:
    """Raises UserError if evaluations are asked for and there is nothing to measure."""
    if cfg.eval.every and not any(len(c.documents("heldout")) for c in corpora):
        raise UserError(
            "config.data.sources have no held-out documents; run prepare with "
            "--heldout above 0, or set config.eval.every=0."
        )


def _tokenizer_of_run(model: ModelConfig, workdir: epath.Path) -> str | None:
    """The fingerprint of the tokenizer of the workdir's run, None if it holds no run.

    Raises:
      UserError: it is a run of another model.
    """
    path = workdir / "run.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder.")
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        written, fingerprint = run["config"], run["tokenizer"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's; choose another workdir.") from error
    saved = _of_model(config_from_json(written, str(path)).model)
    wanted = _of_model(model)
    rows = [
        f"{name} is {saved.get(name)} there and {wanted.get(name)} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if rows:
        raise UserError(
            f"--workdir={workdir} holds a run of another model: {'; '.join(rows)}. "
            "Choose another workdir, or the config of that run."
        )
    return fingerprint


def _of_model(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model by name, those of its parts as `heads.kind`."""
    fields = dataclasses.asdict(model)
    for part in PARTS_OF_MODEL:
        own = fields.pop(part)
        fields |= {f"{part}.{name}": value for name, value in own.items()}
    return fields


def _prepare_workdir(workdir: epath.Path, corpora: list[Corpus]) -> None:
    """Makes the folder, with the tokenizer, so that a run can be moved as a whole."""
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        save_tokenizer(corpora[0].tokenizer, workdir)
    except OSError as error:
        message = f"--workdir={workdir} cannot be written: {error.strerror}."
        raise UserError(message) from error
