"""The faults of a rehearsal: everything that can happen to a run, done to one.

A fault finds the group training, and leaves either no group or the group training. It
returns an `Outcome`, whose `wrong` is empty if what had to follow did.
"""

import dataclasses
import pathlib
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

from mtp_jax.rehearsal.storm import Broken, Storm

_LOAD_S = 60  # what a loaded machine may take on top of a time limit
_SAVE_S = 120  # a coordinated save and the end of all processes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The way in which the hosts ended."""

    said: str  # what most of them printed
    seconds: float
    wrong: str = ""  # what did not follow as it had to


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault: its name, what is done, what has to follow, and the doing."""

    name: str
    does: str
    follows: str
    inject: Callable[[Storm], Outcome]


def _limit_s(storm: Storm) -> float:
    """Seconds within which hosts that lost another must have ended."""
    return storm.cfg.train.host_timeout_s + _LOAD_S


def _told(lines: Sequence[str]) -> str:
    """The line that most hosts said."""
    return Counter(lines).most_common(1)[0][0] if lines else ""


def _ended(
    storm: Storm,
    timeout_s: float,
    *,
    well: bool = False,
    lost: Sequence[int] = (),
    names: Sequence[str] = (),
) -> Outcome:
    """Waits for the end and compares it with what it had to be.

    Args:
      storm: its group has been hit.
      timeout_s: within which all must have ended.
      well: whether the survivors must end with 0, or with another code.
      lost: hosts that were killed; they say nothing.
      names: one of them must be in what was said.
    """
    codes, seconds, lines = storm.down(timeout_s)
    return _judged(codes, seconds, lines, well=well, lost=lost, names=names)


def _judged(
    codes: dict[int, int | None],
    seconds: float,
    lines: Sequence[str],
    *,
    well: bool,
    lost: Sequence[int] = (),
    names: Sequence[str] = (),
) -> Outcome:
    said, wrong = _told(lines), []
    late = [i for i, code in codes.items() if code is None]
    if late:
        wrong.append(f"hosts {late} had not ended after {seconds:.0f} s")
    others = {i: c for i, c in codes.items() if i not in lost and c is not None}
    if any((code == 0) != well for code in others.values()):
        wrong.append(f"exit codes {others}")
    matching = [line for line in lines if any(name in line for name in names)]
    if names and not matching:
        wrong.append(f"nobody said {' or '.join(names)}")
    return Outcome(_told(matching) or said, seconds, "; ".join(wrong))


def _stop(storm: Storm, *which: int) -> Outcome:
    """Sends SIGTERM: there has to be one save, at the last step, and nothing lost."""
    storm.pause()
    assert storm.group is not None
    storm.group.send(signal.SIGTERM, *which)
    outcome = _ended(storm, _SAVE_S, well=True, names=["told to stop"])
    if not outcome.wrong and storm.resume_at != storm.step():
        found = f"saved step {storm.resume_at}, trained {storm.step()}"
        return dataclasses.replace(outcome, wrong=found)
    return outcome


def stop_one(storm: Storm) -> Outcome:
    """SIGTERM to one host, the notice that it is about to be taken away."""
    return _stop(storm, storm.rng.randrange(storm.hosts))


def stop_all(storm: Storm) -> Outcome:
    """SIGTERM to all hosts, as at the end of a job's time."""
    return _stop(storm)


def _kill(storm: Storm, which: int) -> Outcome:
    assert storm.group is not None
    storm.group.send(signal.SIGKILL, which)
    return _ended(storm, _limit_s(storm), lost=[which], names=[f"host {which}"])


def kill_one(storm: Storm) -> Outcome:
    """SIGKILL of a host at a random moment, like a crash."""
    storm.pause()
    return _kill(storm, storm.rng.randrange(1, storm.hosts))


def kill_first(storm: Storm) -> Outcome:
    """SIGKILL of host 0, through which all find each other."""
    storm.pause()
    return _kill(storm, 0)


def kill_all(storm: Storm) -> Outcome:
    """SIGKILL of all hosts, like a power cut."""
    storm.pause()
    assert storm.group is not None
    storm.group.send(signal.SIGKILL)
    return _ended(storm, _LOAD_S, lost=range(storm.hosts))


def kill_while_saving(storm: Storm) -> Outcome:
    """SIGKILL of a host or of all, while a checkpoint is half written."""
    assert storm.group is not None
    end = time.monotonic() + _LOAD_S
    while not any(storm.checkpoints.glob("*.orbax-checkpoint-tmp")):
        if time.monotonic() > end or not storm.group.running():
            raise Broken("no save began")
    storm.pause(0.05)
    if storm.rng.random() < 0.5:
        return _kill(storm, storm.rng.randrange(storm.hosts))
    storm.group.send(signal.SIGKILL)
    return _ended(storm, _LOAD_S, lost=range(storm.hosts))


def damage_newest(storm: Storm) -> Outcome:
    """A byte of the newest checkpoint is another one, or the end of a file is gone."""
    storm.wait_for_save()
    outcome = stop_all(storm)
    saved = storm.steps_saved()
    victim = _largest(storm.checkpoints / str(saved[-1]) / "params")
    content = bytearray(victim.read_bytes())
    if storm.rng.random() < 0.5:
        content[storm.rng.randrange(len(content) // 4, len(content) // 2)] ^= 0x55
    else:
        del content[len(content) // 2 :]
    victim.write_bytes(content)
    storm.resume_at = saved[-2] if len(saved) > 1 else 0
    began = time.monotonic()
    try:
        damaged = [line for line in storm.up().said() if "damaged" in line]
    except Broken as error:  # one host alone has seen it, and all have ended
        damaged = [str(error)] if "damaged" in str(error) else []
    wrong = outcome.wrong or ("" if damaged else "nobody said that it is damaged")
    return Outcome(_told(damaged), time.monotonic() - began, wrong)


def half_written(storm: Storm) -> Outcome:
    """A checkpoint folder that was never finished, newer than the newest."""
    outcome = kill_all(storm)
    saved = storm.steps_saved()
    if saved:
        newest = storm.checkpoints / str(saved[-1])
        part = storm.checkpoints / f"{saved[-1] + 1}.orbax-checkpoint-tmp"
        shutil.copytree(newest, part, dirs_exist_ok=True)
        _largest(part).unlink()
        (part / "commit_success.txt").unlink(missing_ok=True)
    return dataclasses.replace(outcome, said="(an unfinished checkpoint folder)")


def full_disk(storm: Storm) -> Outcome:
    """A host can write no file of more than a few bytes, as if its disk were full."""
    assert storm.group is not None
    which = storm.rng.randrange(1, storm.hosts)
    resource.prlimit(storm.group.pid(which), resource.RLIMIT_FSIZE, (64, 64))
    says = ["no room on the disk", "what is the disk of each host like?"]
    return _ended(storm, _limit_s(storm) + storm.cfg.checkpoint.timeout_s, names=says)


def vanished_data(storm: Storm) -> Outcome:
    """A file of the corpus is gone at the next start, and then it is back."""
    stopped = stop_all(storm)
    victim = _corpus_file(storm)
    kept = victim.with_name("away")
    victim.rename(kept)
    resume_at = storm.resume_at
    storm.group = storm.start()
    outcome = _ended(storm, storm.patience_s, names=[str(victim)])
    kept.rename(victim)
    storm.resume_at = resume_at
    return dataclasses.replace(outcome, wrong=stopped.wrong or outcome.wrong)


def garbage_data(storm: Storm) -> Outcome:
    """Ids that the model does not have, in a file that is being read."""
    victim = _corpus_file(storm)
    kept = storm.copy_of(victim)
    size = victim.stat().st_size
    with victim.open("r+b") as file:  # in place: the hosts have it mapped
        file.write(b"\xff" * size)
    try:
        return _ended(storm, _limit_s(storm), names=["outside the model's vocabulary"])
    finally:
        with victim.open("r+b") as file:
            file.write(kept.read_bytes())


def second_run(storm: Storm) -> Outcome:
    """Another run is started on the workdir of one that trains."""
    other = storm.start(hosts=1)
    codes, seconds = other.wait(storm.patience_s)
    outcome = _judged(
        codes, seconds, other.said(), well=False, names=[str(storm.workdir)]
    )
    if storm.group is None or not storm.group.running():
        return dataclasses.replace(outcome, wrong="it ended the first run")
    return outcome


def missing_host(storm: Storm) -> Outcome:
    """A host that never comes."""
    stopped = stop_all(storm)
    which, resume_at = storm.rng.randrange(1, storm.hosts), storm.resume_at
    timeout_s = 20
    short = [f"--config.train.join_timeout_s={timeout_s}"]
    storm.group = storm.start(overrides=short, missing=[which])
    limit_s = storm.patience_s + timeout_s
    outcome = _ended(storm, limit_s, names=[f"host {which}"])
    storm.resume_at = resume_at
    return dataclasses.replace(outcome, wrong=stopped.wrong or outcome.wrong)


def not_finite(storm: Storm) -> Outcome:
    """A learning rate so high that losses are no numbers; nothing of it is kept."""
    stopped = stop_all(storm)
    storm.group = storm.start(
        overrides=[
            "--config.optim.peak_lr=1e38",
            "--config.train.max_bad_steps=2",
            "--config.checkpoint.every=1000000",
        ]
    )
    # Another schedule is another program, to be compiled first.
    outcome = _ended(storm, 2 * storm.patience_s, names=["not finite"])
    return dataclasses.replace(outcome, wrong=stopped.wrong or outcome.wrong)


def other_hosts(storm: Storm) -> Outcome:
    """Another number of hosts: stopped, continued there, and stopped again."""
    stopped = stop_all(storm)
    counts = [n for n in host_counts(storm.hosts) if n != storm.hosts]
    count = storm.rng.choice(counts)
    group = storm.up(count)
    group.send(signal.SIGTERM)
    outcome = _ended(storm, _SAVE_S, well=True, names=["told to stop"])
    said = f"on {count} hosts: {outcome.said}"
    wrong = stopped.wrong or outcome.wrong
    return dataclasses.replace(outcome, said=said, wrong=wrong)


def host_counts(hosts: int) -> list[int]:
    """The numbers of hosts on which a rehearsal trains, the normal one first."""
    return list(dict.fromkeys([hosts, max(1, hosts // 2), 1, 2 * hosts]))


def _largest(folder: pathlib.Path) -> pathlib.Path:
    """The largest file of array data below a folder."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def _corpus_file(storm: Storm) -> pathlib.Path:
    """A file of training tokens."""
    sources = sorted(storm.cfg.data.sources)
    folder = pathlib.Path(storm.rng.choice(sources))
    return storm.rng.choice(sorted(folder.glob("train-*.tokens")))


_CODE = "all end within the time limit, with a code that is not 0"
FAULTS = (
    Fault(
        "stop_one", "SIGTERM to one host", "one save, code 0, no step lost", stop_one
    ),
    Fault(
        "stop_all", "SIGTERM to all hosts", "one save, code 0, no step lost", stop_all
    ),
    Fault("kill_one", "SIGKILL of a host", f"{_CODE}, naming it", kill_one),
    Fault("kill_first", "SIGKILL of host 0", f"{_CODE}, naming it", kill_first),
    Fault("kill_all", "SIGKILL of all hosts", "on from the last checkpoint", kill_all),
    Fault(
        "kill_while_saving",
        "SIGKILL while a checkpoint is written",
        "on from the checkpoint before, or from this one if it was whole",
        kill_while_saving,
    ),
    Fault(
        "damage_newest",
        "a byte of the newest checkpoint flipped, or its file cut",
        "said and set aside; on from the one before, at once or at the next start",
        damage_newest,
    ),
    Fault(
        "half_written",
        "an unfinished checkpoint folder",
        "ignored, on from the newest whole one",
        half_written,
    ),
    Fault("full_disk", "a host's disk takes no more", f"{_CODE}, saying so", full_disk),
    Fault("vanished_data", "a corpus file gone", f"{_CODE}, naming it", vanished_data),
    Fault(
        "garbage_data",
        "ids outside the vocabulary in a file being read",
        f"{_CODE}, naming the document",
        garbage_data,
    ),
    Fault(
        "second_run",
        "another run on the same workdir",
        "refused; the first goes on",
        second_run,
    ),
    Fault(
        "missing_host", "a host that never comes", f"{_CODE}, naming it", missing_host
    ),
    Fault(
        "not_finite", "losses that are no numbers", f"{_CODE}; not saved", not_finite
    ),
    Fault("other_hosts", "another number of hosts", "on without a seam", other_hosts),
)
