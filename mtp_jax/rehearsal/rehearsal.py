"""The verb `rehearse`: a pod on this machine, and everything that can happen to it.

A config is scaled down and trained by real processes on loopback. Faults are injected
one after another; after each of them the run must go on from the right checkpoint, and
its batches must be those of a run that nothing ever interrupted.
"""

import argparse
import dataclasses
import pathlib
import pprint
import random
import shutil
import tempfile
import time
from collections.abc import Sequence

from mtp_jax.cli.args import Parser, config_from, positive_int
from mtp_jax.config import Config
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import main as prepare
from mtp_jax.errors import UserError
from mtp_jax.rehearsal.faults import FAULTS, Fault, Outcome, host_counts
from mtp_jax.rehearsal.processes import HostGroup
from mtp_jax.rehearsal.scale import differences, scale_down
from mtp_jax.rehearsal.storm import Broken, Storm

_SMALL_CORPUS = 64 * 2**20  # bytes; a larger one is not copied
_VOCABULARY = 512  # two bytes an id, so that there are ids that no model here has
_HOST_TIMEOUT_S = 20
_JOIN_TIMEOUT_S = 240
_SAVE_TIMEOUT_S = 60
_REFERENCE_S = 600


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault, and what became of it."""

    fault: str
    outcome: Outcome
    recovered: str  # empty: yes
    hashes: tuple[str, ...]  # of all steps, when it had recovered

    def cells(self, reference: Sequence[str]) -> list[str]:
        """For the table: fault, said, seconds, recovered, hashes."""
        intact = self.hashes == tuple(reference[: len(self.hashes)])
        return [
            self.fault,
            self.outcome.said[:100],
            f"{self.outcome.seconds:.1f}",
            "yes" if not self.recovered else f"NO: {self.recovered}",
            f"{len(self.hashes)} steps" if intact else "NO",
        ]

    def held(self, reference: Sequence[str]) -> bool:
        intact = self.hashes == tuple(reference[: len(self.hashes)])
        return intact and not self.recovered and not self.outcome.wrong


def main(argv: list[str]) -> int:
    """Runs the verb. The exit code is 1 if anything did not hold."""
    args, overrides = _parser().parse_known_args(argv)
    if args.list:
        for fault in FAULTS:
            print(f"{fault.name:18} {fault.does}: {fault.follows}")
        return 0
    if args.config is None:
        raise UserError("--config=F is missing; configs/tiny.py is one.")
    if args.hosts < 2:
        raise UserError(f"--hosts={args.hosts}; a pod has at least 2.")
    production = config_from(args.config, overrides)
    faults = _script(args.only, args.faults, args.seed)
    folder = _folder(args.workdir)
    sources, vocab_size = _corpora(production, folder)
    counts = [n * args.devices_per_host for n in host_counts(args.hosts)]
    cfg = _with_times(scale_down(production, sources, vocab_size, counts))
    for line in differences(production, cfg):
        print(f"scaled  {line}")
    config_file = _write_config(cfg, folder)
    print(f"{len(faults)} faults, {args.hosts} hosts, in {folder}", flush=True)
    storm = Storm(
        cfg, config_file, folder, args.hosts, args.devices_per_host, args.seed
    )
    began = time.monotonic()
    try:
        storm.up()
        rows = [_endure(storm, fault) for fault in faults]
        reference = _calm_run(storm, folder)
    except Broken as error:
        print(f"mtp-jax rehearse: {error}; the logs are in {folder / 'logs'}")
        return 1
    finally:
        storm.close()
    code = _report(rows, reference, time.monotonic() - began, folder)
    if code == 0 and args.workdir is None:
        shutil.rmtree(folder)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "mtp-jax rehearse",
        "Train a config, scaled down, on hosts of this machine, and break it.",
        epilog="Any field of the config: --config.section.field=value.",
    )
    parser.add_argument("--config", metavar="F", help="a Python file of a run")
    parser.add_argument("--hosts", type=positive_int, default=4, help="processes (4)")
    parser.add_argument(
        "--devices-per-host", type=positive_int, default=2, help="CPU devices (2)"
    )
    parser.add_argument("--faults", type=positive_int, help="how many; default: each")
    parser.add_argument("--seed", type=int, default=0, help="of the script of faults")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this fault; may be repeated"
    )
    parser.add_argument(
        "--workdir",
        metavar="D",
        help="for the run and its logs; default: a temporary one, kept if not all held",
    )
    parser.add_argument("--list", action="store_true", help="the faults, and no more")
    return parser


def _script(only: list[str] | None, count: int | None, seed: int) -> list[Fault]:
    """Faults in a random order, each as often as the others, give or take one."""
    known = {fault.name: fault for fault in FAULTS}
    for name in only or ():
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


def _folder(workdir: str | None) -> pathlib.Path:
    if workdir is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="mtp-rehearse-"))
    folder = pathlib.Path(workdir).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={workdir} is not an empty folder; give another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written: {error.strerror}."
        ) from None
    return folder


def _corpora(cfg: Config, folder: pathlib.Path) -> tuple[list[str], int]:
    """Corpora to read and to damage, as many as the config has, and their vocabulary.

    Copies of the config's own if they are there and small; otherwise the source of
    this package, shared out.
    """
    names = [pathlib.Path(name) for name in cfg.data.sources]
    if all((name / "manifest.json").is_file() for name in names):
        files = [path for name in names for path in name.iterdir()]
        if sum(path.stat().st_size for path in files) <= _SMALL_CORPUS:
            copies = [folder / "data" / str(i) for i in range(len(names))]
            for name, copy in zip(names, copies, strict=True):
                shutil.copytree(name, copy)
            opened = [Corpus.open(copy) for copy in copies]
            return list(map(str, copies)), opened[0].tokenizer.vocab_size
    return _own_corpora(len(names), folder), _VOCABULARY


def _own_corpora(count: int, folder: pathlib.Path) -> list[str]:
    package = pathlib.Path(__file__).parent.parent
    texts = sorted(package.rglob("*.py"))
    made: list[str] = []
    for i in range(count):
        text, output = folder / "text" / str(i), folder / "data" / str(i)
        text.mkdir(parents=True)
        for path in texts[i::count]:
            # Files of different folders may have the same name.
            shutil.copy(path, text / "-".join(path.relative_to(package).parts))
        tokenizer = (
            f"--tokenizer={made[0]}/tokenizer.model"
            if made
            else f"--train_tokenizer={_VOCABULARY}"
        )
        prepare([f"--input={text}", f"--output={output}", tokenizer, "--heldout=0"])
        made.append(str(output))
    return made


def _with_times(cfg: Config) -> Config:
    """How long hosts wait: for a lost one a short time, at a start a long one."""
    train = dataclasses.replace(
        cfg.train,
        host_timeout_s=min(cfg.train.host_timeout_s, _HOST_TIMEOUT_S),
        join_timeout_s=_JOIN_TIMEOUT_S,
    )
    checkpoint = dataclasses.replace(cfg.checkpoint, timeout_s=_SAVE_TIMEOUT_S)
    return dataclasses.replace(cfg, train=train, checkpoint=checkpoint)


def _write_config(cfg: Config, folder: pathlib.Path) -> pathlib.Path:
    tree = pprint.pformat(dataclasses.asdict(cfg), sort_dicts=False)
    path = folder / "config.py"
    path.write_text(
        '"""The config of a rehearsal."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({tree})\n"
    )
    return path


def _endure(storm: Storm, fault: Fault) -> Row:
    """Injects a fault, has the run go on, and says at once how it went."""
    try:
        if storm.group is None:  # the one before was not recovered from
            storm.up()
        outcome = fault.inject(storm)
    except Broken as error:
        outcome = Outcome("", 0.0, str(error))
        storm.close()
        storm.resume_at = max(storm.steps_saved(), default=0)
    recovered = ""
    try:
        storm.up()
    except Broken as error:
        recovered = str(error)
        storm.close()
        storm.resume_at = max(storm.steps_saved(), default=0)
    hashes = tuple(record["batch_hash"] for record in storm.records())
    steps = [record["step"] for record in storm.records()]
    if not recovered and steps != list(range(1, len(steps) + 1)):
        recovered = "steps are missing from metrics.jsonl"
    trouble = f"  WRONG: {outcome.wrong}" if outcome.wrong else ""
    print(f"{fault.name}: {outcome.said}{trouble}", flush=True)
    return Row(fault.name, outcome, recovered, hashes)


def _calm_run(storm: Storm, folder: pathlib.Path) -> list[str]:
    """Hashes of one process that trains as many steps without a fault.

    Raises:
      Broken: it fails.
    """
    steps = storm.step()
    if storm.group is not None:
        storm.group.kill()
        storm.group = None
    calm = Storm(
        storm.cfg, folder / "config.py", folder / "calm", 1, storm.devices, seed=0
    )
    ending = [
        f"--config.train.steps={steps + 1}",
        f"--config.checkpoint.every={steps + 1}",
    ]
    group: HostGroup = calm.start(overrides=ending)
    codes, _ = group.wait(_REFERENCE_S)
    if codes != {0: 0}:
        raise Broken(f"the run without faults ended with {codes}: {group.said()}")
    return [record["batch_hash"] for record in calm.records()]


def _report(
    rows: Sequence[Row], reference: Sequence[str], took_s: float, folder: pathlib.Path
) -> int:
    """Prints the table; 1 if anything did not hold."""
    head = ["fault", "what the hosts said", "seconds", "recovered", "hashes"]
    table = [head, *(row.cells(reference) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    print()
    for cells in table:
        line = "  ".join(f"{x:{w}}" for x, w in zip(cells, widths, strict=True))
        print(line.rstrip())
    held = [row.held(reference) for row in rows]
    for row in rows:
        if row.outcome.wrong:
            print(f"{row.fault}: {row.outcome.wrong}")
    print(
        f"{sum(held)} of {len(held)} held; {len(rows[-1].hashes)} steps, the hashes of "
        f"{len(reference)} compared; {took_s:.0f} s; {folder}"
    )
    return 0 if all(held) else 1
