"""A pod on this machine, and everything that can happen to it.

A config is scaled down and trained by real processes on loopback. Faults are injected
one after another; after each of them the run must go on from the right checkpoint, and
its batches must be those of a run that nothing ever interrupted.
"""

import contextlib
import dataclasses
import os
import pathlib
import pprint
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from mtp_jax.config import Config, as_tree
from mtp_jax.errors import UserError, counted
from mtp_jax.rehearsal.corpora import corpora_for
from mtp_jax.rehearsal.faults import FAULTS, Fault, Outcome, host_counts
from mtp_jax.rehearsal.scale import differences, scale_down
from mtp_jax.rehearsal.storm import Broken, Storm

_HOST_TIMEOUT_S = 20
_JOIN_TIMEOUT_S = 240
_SAVE_TIMEOUT_S = 60
_REFERENCE_S = 600
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FaultResult:
    """A fault, how the hosts ended, and how the run went on."""

    fault: str
    outcome: Outcome
    not_recovered: str  # why the run did not go on as it had to; empty: it did
    hashes: tuple[str, ...]  # of the batches of all steps until it had recovered

    def same_batches(self, reference: Sequence[str]) -> bool:
        """True if the batches so far are those of the run without faults."""
        return self.hashes == tuple(reference[: len(self.hashes)])

    def held(self, reference: Sequence[str]) -> bool:
        """True if everything was as it had to be."""
        good = not self.not_recovered and not self.outcome.wrong
        return good and self.same_batches(reference)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal."""

    rows: tuple[FaultResult, ...]  # in the order of the faults
    reference: tuple[str, ...]  # hashes of the run without faults, by step
    folder: pathlib.Path  # of the run and its logs; gone if temporary and all held
    seconds: float
    broken: str = ""  # why it was given up before its end; empty: it was not

    @property
    def held(self) -> bool:
        """True if every fault held."""
        held = all(row.held(self.reference) for row in self.rows)
        return held and not self.broken


def rehearse(
    config: Config,
    *,
    hosts: int = 4,
    devices_per_host: int = 2,
    faults: int | None = None,
    only: Sequence[str] = (),
    seed: int = 0,
    workdir: str | os.PathLike[str] | None = None,
    report: Report = print,
) -> Rehearsal:
    """Trains a config, scaled down, on hosts of this machine, and breaks it.

    The hosts are processes of their own, on CPU devices; they end before this returns
    or raises. It takes minutes.

    Args:
      config: a production run.
      hosts: processes that train together, at least 2.
      devices_per_host: CPU devices of each.
      faults: how many are injected; by default each of `only`, or of all, once.
      only: names of faults, of `mtp_jax.rehearsal.faults.FAULTS`; by default all.
      seed: of the order of the faults and of everything else that is left to chance.
      workdir: new or empty folder for the run and its logs. By default a temporary one,
        which is kept if anything did not hold.
      report: gets lines about the scaled config, and about each fault when it is over.

    Returns:
      A row for each fault; `held` tells if all went as it had to.

    Raises:
      UserError: an unknown fault, too few or too many hosts, devices or faults, or a
        folder that is not empty.
    """
    if hosts < 2:
        raise UserError(f"--hosts={hosts}; a pod has at least 2.")
    if devices_per_host < 1 or (faults is not None and faults < 1):
        raise UserError("devices_per_host and faults are whole numbers above 0.")
    script = _script(only, faults, seed)
    with _folder(workdir) as folder:
        result = _rehearsed(
            config, hosts, devices_per_host, script, seed, folder, report
        )
    if result.held and workdir is None:
        shutil.rmtree(folder)
    return result


def _rehearsed(
    config: Config,
    hosts: int,
    devices_per_host: int,
    script: Sequence[Fault],
    seed: int,
    folder: pathlib.Path,
    report: Report,
) -> Rehearsal:
    """Trains in a folder and injects the faults of a script."""
    sources, vocab_size = corpora_for(config, folder, report)
    counts = [n * devices_per_host for n in host_counts(hosts)]
    cfg = _with_times(scale_down(config, sources, vocab_size, counts))
    for line in differences(config, cfg):
        report(f"scaled  {line}")
    config_file = _write_config(cfg, folder)
    report(f"{counted(len(script), 'fault')}, {hosts} hosts, in {folder}")
    storm = Storm(cfg, config_file, folder, hosts, devices_per_host, seed)
    rows: list[FaultResult] = []
    reference: list[str] = []
    broken = ""
    began = time.monotonic()
    try:
        storm.up()
        for fault in script:
            rows.append(_endure(storm, fault, report))
        reference = _calm_run(storm, folder)
    except Broken as error:
        broken = str(error)
    finally:
        storm.close()
    seconds = time.monotonic() - began
    return Rehearsal(tuple(rows), tuple(reference), folder, seconds, broken)


def _script(only: Sequence[str], count: int | None, seed: int) -> list[Fault]:
    """Faults in a random order, each as often as the others, give or take one."""
    known = {fault.name: fault for fault in FAULTS}
    for name in only:
        if name not in known:
            raise UserError(f"--only={name}: no such fault; there are {list(known)}.")
    if only and count is None:
        return [known[name] for name in only]
    chosen = [known[name] for name in only] if only else list(FAULTS)
    rng, script = random.Random(seed), list[Fault]()
    while len(script) < (count or len(chosen)):
        rng.shuffle(chosen)
        script += chosen
    return script[: count or len(chosen)]


@contextlib.contextmanager
def _folder(workdir: str | os.PathLike[str] | None) -> Iterator[pathlib.Path]:
    """The folder of a rehearsal; a temporary one goes if nothing comes of it."""
    if workdir is None:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="mtp-rehearse-"))
        try:
            yield folder
        except (KeyboardInterrupt, UserError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return
    folder = pathlib.Path(workdir).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={workdir} is not an empty folder; give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written: {error.strerror}."
        ) from None
    yield folder


def _with_times(cfg: Config) -> Config:
    """The config with short waits for a host that is lost, and long ones at a start."""
    train = dataclasses.replace(
        cfg.train,
        host_timeout_s=min(cfg.train.host_timeout_s, _HOST_TIMEOUT_S),
        join_timeout_s=_JOIN_TIMEOUT_S,
    )
    checkpoint = dataclasses.replace(cfg.checkpoint, timeout_s=_SAVE_TIMEOUT_S)
    return dataclasses.replace(cfg, train=train, checkpoint=checkpoint)


def _write_config(cfg: Config, folder: pathlib.Path) -> pathlib.Path:
    """Writes a config file that gives this config, and returns its path."""
    tree = pprint.pformat(as_tree(cfg), sort_dicts=False)
    path = folder / "config.py"
    path.write_text(
        '"""The config of a rehearsal."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({tree})\n"
    )
    return path


def _endure(storm: Storm, fault: Fault, report: Report) -> FaultResult:
    """Injects a fault, has the run go on, and reports at once how it went."""
    try:
        if storm.group is None:  # the one before was not recovered from
            storm.up()
        outcome = fault.inject(storm)
    except Broken as error:
        outcome = Outcome("", 0.0, str(error))
        storm.close()
        storm.resume_at = max(storm.steps_saved(), default=0)
    not_recovered = ""
    try:
        storm.up()
    except Broken as error:
        not_recovered = str(error)
        storm.close()
        storm.resume_at = max(storm.steps_saved(), default=0)
    hashes = tuple(record["batch_hash"] for record in storm.records())
    steps = [record["step"] for record in storm.records()]
    if not not_recovered and steps != list(range(1, len(steps) + 1)):
        not_recovered = "steps are missing from metrics.jsonl"
    trouble = f"  WRONG: {outcome.wrong}" if outcome.wrong else ""
    report(f"{fault.name}: {outcome.said}{trouble}")
    return FaultResult(fault.name, outcome, not_recovered, hashes)


def _calm_run(storm: Storm, folder: pathlib.Path) -> list[str]:
    """Hashes of one process that trains as many steps without a fault.

    Raises:
      Broken: it fails.
    """
    steps = storm.step()
    storm.close()
    calm = Storm(
        storm.cfg, folder / "config.py", folder / "calm", 1, storm.devices, seed=0
    )
    ending = [
        f"--config.train.steps={steps + 1}",
        f"--config.checkpoint.every={steps + 1}",
    ]
    calm.group = group = calm.start(overrides=ending)
    try:
        codes, _ = group.wait(_REFERENCE_S)
    finally:  # also when it is interrupted
        calm.close()
    if codes != {0: 0}:
        raise Broken(f"the run without faults ended with {codes}: {group.said()}")
    return [record["batch_hash"] for record in calm.records()]
