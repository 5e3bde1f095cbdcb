"""Cases of the fuzzer: a verb, what is odd about it, and what has to come of it."""

import dataclasses
import json
import shlex
import shutil
import signal
import typing
from collections.abc import Callable

from fuzz import OLD_RUN
from fuzz_files import CODES, NO_FILES, TEXTS, damage, make

BITS_PER_BYTE = json.loads((OLD_RUN / "expected.json").read_text())["eval"]
BITS_PER_BYTE = BITS_PER_BYTE["bits_per_byte"]
BASE = {
    "prepare": [
        "--input=stories.jsonl",
        "--output=out",
        "--workers=1",
        "--heldout=0.2",
    ],
    "count": ["--input=corpus", "--output=counts.npz"],
    "train": ["--config=config.py", "--workdir=run", "--config.train.steps=21"],
    "runs": ["."],
    "evaluate": ["--workdir=run"],
    "generate": ["--workdir=run", "--prompt=The mill", "--max_new_tokens=3"],
    "verify": [
        *("--workdir=run", "--decoder=blockwise", "--heldout=2", "--samples=32"),
        *("--max_new_tokens=4", "--law_tokens=1", "--batch_sizes=1"),
    ],
    "calibrate": ["--workdir=run", "--output=tree.json", "--passages=4", "--nodes=3"],
    "audit": ["--workdir=run"],
    "plan": ["--config=config.py", "--topology=v5e:2x2"],
    "rehearse": ["--config=config.py", "--only=nothing_of_that_name"],
    "study": ["curricula", "--arm=nothing_of_that_name"],
    "report": ["--workdir=run", "--output=report.html", "--files_only"],
    "grow": ["--workdir=run", "--output=grown", "--heads=3", "--start=random"],
    "export": ["--workdir=run", "--output=exported"],
    "import": ["--from=stories.jsonl", "--workdir=imported", "--tokenizer=bytes"],
}
DUE = {
    "prepare": ("out/manifest.json",),
    "count": ("counts.npz",),
    "train": ("run/run.json",),
    "evaluate": ("run/eval.json",),
    "calibrate": ("tree.json",),
    "report": ("report.html",),
    "grow": ("grown/run.json",),
    "export": ("exported/config.json",),
}
ODD = (
    "",
    " ",
    "-1",
    "0",
    "1e999",
    "nan",
    "-inf",
    "99999999999",
    "é\u202e",
    "--",
    "None",
)
ODD += ("1.5", "a" * 5000, "0x10", "١٢", "[1,2", "'", "%s", "\\", "/", "..", "\udcff")
NO_NUMBER = ("", " ", "é\u202e", "--", "None", "a" * 5000, "[1,2", "'", "%s", "\\")
NO_FLOAT = ("nan", "1e999", "-inf")
NO_WHOLE = (*NO_NUMBER, "nan", "1e999", "-inf", "1.5")


def nothing(*_):
    """Does nothing, and finds nothing wrong."""


@dataclasses.dataclass(kw_only=True)
class Case:
    """A command line, what surrounds it, and what is due.

    expect: refused (code 2 and one line), fine (code 0), either (of them, or 1).
    """

    kind: str
    argv: list[str]
    expect: str = "either"
    note: str = ""
    arrange: Callable = nothing  # of the folder: makes the odd files
    around: Callable = nothing  # in the child, before the program begins
    check: Callable = nothing  # of the folder and the outcome: a fault, or nothing
    due: tuple[str, ...] = ()  # files that a success leaves
    environment: dict = dataclasses.field(default_factory=dict)
    fresh: bool = False  # a Python of its own
    stop: tuple[int, float] | None = None  # a signal, seconds after the start
    quiet: bool = False  # nobody hears stderr
    also: tuple[int, ...] = ()  # other codes that are right

    @property
    def fast(self):
        """True if it needs no model, no Python of its own and no waiting."""
        if self.fresh or self.stop or self.argv[0] in ("verify", "calibrate"):
            return False
        needs_model = self.argv[0] in (
            *("train", "evaluate", "generate"),
            *("grow", "export"),
        )
        return self.expect == "refused" or not needs_model

    def told(self):
        argv = [x if len(x) < 200 else f"{x[:60]}...({len(x)})" for x in self.argv]
        line = ascii(shlex.join(["mtp-jax", *argv]))[1:-1]
        return f"[{self.kind}, {self.expect}] {line} {self.note}"


def case_of(random):
    """The case of a random generator."""
    kinds = (odd_flag, odd_file, odd_corpus, odd_run, odd_config, odd_config_file)
    kinds += (odd_environment, stopped)
    return random.choices(kinds, (32, 24, 9, 5, 14, 6, 7, 3))[0](random)


def _parser_of(verb):
    """The parser of a verb, caught when it is about to parse."""
    import importlib

    from mtp_jax.__main__ import _MODULES
    from mtp_jax.cli import args

    class Caught(Exception):
        pass

    def catch(parser, *rest):
        raise Caught(parser)

    usual, args.Parser.parse_known_args = args.Parser.parse_known_args, catch
    try:
        importlib.import_module(_MODULES[verb]).main([])
    except Caught as caught:
        return caught.args[0]
    finally:
        args.Parser.parse_known_args = usual


def odd_flag(random):
    weights = (8, 4, 4, 3, 2, 2, 3, 1, 1, 3, 3, 2, 3, 4, 3, 2)
    verb = random.choices(list(BASE), weights)[0]
    base = list(BASE[verb])
    expect = "refused" if verb in ("rehearse", "study", "import") else "either"
    how = random.random()
    if how < 0.1:
        name = random.choice(
            ("--nothing", "-z", "--Workdir", "--work", "stray", "--config")
        )
        if name == "--config" and verb in ("train", "plan", "rehearse"):
            name = "--nothing=3"
        expect = "either" if (verb, name) == ("runs", "stray") else "refused"
        return Case(kind="flag", argv=[verb, *base, name], expect=expect)
    if how < 0.16:
        required = [
            x for x in base if x.startswith(("--workdir", "--output", "--input"))
        ]
        left = [x for x in base if x not in required]
        expect = "refused" if required and verb != "runs" else expect
        return Case(kind="flag", argv=[verb, *left], expect=expect)
    actions = [
        a for a in _parser_of(verb)._actions if a.option_strings and a.nargs != 0
    ]
    actions = [a for a in actions if a.dest not in ("help", "config")]
    if not actions:
        return Case(kind="flag", argv=[verb, *base, "--json=maybe"], expect="refused")
    action = random.choice(actions)
    value = random.choice(ODD)
    type_ = getattr(action.type, "__name__", "")
    bad = {
        "positive_int": (*NO_WHOLE, "-1", "0"),
        "int": NO_WHOLE,
        "float": (*NO_NUMBER, *NO_FLOAT),
        "_price": (*NO_NUMBER, *NO_FLOAT),
        "_share": (*NO_NUMBER, *NO_FLOAT),
        "_count": NO_NUMBER,
    }
    if action.choices or value in bad.get(type_, ()):
        expect = "refused"
    name = action.option_strings[0]
    if action.dest == "prompts":
        base.remove("--prompt=The mill")
    given = [f"{name}={value}"] if random.random() < 0.8 else [name, value]
    if random.random() < 0.1:
        given = [name]  # its value is missing
        base = [x for x in base if not x.startswith(name)]
        expect = "refused"
    argv = [verb, *base, *given]
    due = DUE.get(verb, ()) if action.dest not in ("output", "workdir", "step") else ()
    if verb == "evaluate":
        due = ()
    return Case(kind="flag", argv=argv, expect=expect, due=due)


def odd_file(random):
    """A file of no use, wherever one is read."""
    name = random.choice([*TEXTS, *NO_FILES])
    expect = TEXTS[name][1] if name in TEXTS else "refused"

    def make_it(folder):
        make(folder, name)

    case = {"kind": "file", "note": name, "arrange": make_it}
    where = random.choice(
        ("input", "input", "in a folder", "prompts", "model", "option")
    )
    if name.startswith("fifo"):  # others wait for a writer, as of <(command)
        where = "input"
    if where == "input":
        argv = ["prepare", f"--input={name}", "--output=out", "--workers=1"]
        if random.random() < 0.2:
            argv.append("--skip_bad")
            expect = "either" if expect == "refused" else expect
        if expect == "fine" or random.random() < 0.1:
            argv.append("--heldout=0")
        return Case(argv=argv, expect=expect, due=DUE["prepare"], **case)
    if where == "in a folder" and "/" not in name and len(name) in range(1, 200):

        def make_inside(folder):
            (folder / "texts").mkdir()
            shutil.copy(folder / "stories.jsonl", folder / "texts")
            make(folder / "texts", name)

        argv = ["prepare", "--input=texts", "--output=out", "--workers=1"]
        return Case(argv=argv, due=DUE["prepare"], **case | {"arrange": make_inside})
    if where == "model":
        argv = ["prepare", *BASE["prepare"], f"--tokenizer={name}"]
        return Case(argv=argv, expect="refused", **case)
    if where == "option":
        decoder = random.choice(("tree:tree", "typical:tree", "dynamo:counts"))
        argv = ["generate", *BASE["generate"], f"--decoder={decoder}={name}"]
        expect = "either" if name == "" else "refused"
        return Case(argv=argv, expect=expect, **case)
    argv = ["generate", "--workdir=run", f"--prompts={name}", "--max_new_tokens=2"]
    return Case(argv=argv, **case)


def _right_figures(folder, outcome):
    """A fault if `evaluate` ended well with other figures than the sound run's."""
    path = folder / "run" / "eval.json"
    if outcome.code == 0 and path.exists():
        found = json.loads(path.read_text())["bits_per_byte"]
        if not abs(found - BITS_PER_BYTE) < 1e-4:
            return f"silent success: {found} bits per byte, not {BITS_PER_BYTE}"
    return None


def odd_corpus(random):
    names = sorted(p.name for p in (OLD_RUN / "corpus").iterdir())
    name = random.choice([*names, "manifest.json"])
    verb = random.choice(
        ("count", "count", "audit", "audit", "train", "evaluate", "generate")
    )
    argv = [verb, *BASE[verb]]
    if verb == "generate":
        argv = [verb, "--workdir=run", "--heldout=2", "--max_new_tokens=2"]
    luck = random.getrandbits(32)

    def arrange(folder):
        damage(type(random)(luck), folder / "corpus" / name)

    reads = "train" if verb in ("count", "train", "audit") else "heldout"
    expect = "refused" if name == f"{reads}-00000.tokens" else "either"
    return Case(
        kind="corpus",
        argv=argv,
        arrange=arrange,
        expect=expect,
        note=f"corpus/{name} damaged",
        due=DUE.get(verb, ()),
        check=_right_figures,
    )


def odd_run(random):
    files = sorted(p for p in (OLD_RUN / "run").rglob("*") if p.is_file())
    path = random.choice([*files, *[OLD_RUN / "run" / "run.json"] * 4])
    name = path.relative_to(OLD_RUN)
    verbs = (*("audit", "runs") * 3, *("evaluate", "train", "generate"))
    verbs += ("calibrate", "report", "report")
    verb = random.choice(verbs)
    luck = random.getrandbits(32)

    def arrange(folder):
        damage(type(random)(luck), folder / name)

    return Case(
        kind="run",
        argv=[verb, *BASE[verb]],
        arrange=arrange,
        note=f"{name} damaged",
        due=DUE.get(verb, ()),
        check=_right_figures,
    )


def odd_config(random):
    from mtp_jax.config import Config

    hints = typing.get_type_hints(Config)
    section = random.choice(sorted(hints))
    fields = typing.get_type_hints(hints[section])
    fields = {k: v for k, v in fields.items() if not k.startswith("_")}
    field = random.choice(sorted(fields))
    value = random.choice(ODD)
    hint = fields[field]
    bad = NO_WHOLE if hint is int else NO_NUMBER if hint is float else ()
    expect = "refused" if value in bad else "either"
    if hint is float and value in NO_FLOAT:
        expect = "refused"
    if typing.get_origin(hint) is typing.Literal:
        expect = "refused"
    verb = random.choice(("train", "train", "plan", "rehearse"))
    new = random.random() < 0.5
    argv = [verb, *BASE[verb], f"--config.{section}.{field}={value}"]
    if new and verb == "train":
        argv[2] = "--workdir=new"
        argv[3] = "--config.train.steps=1"
    due = ()
    return Case(kind="config", argv=argv, expect=expect, due=due)


def odd_config_file(random):
    name, code = random.choice(sorted(CODES.items()))

    def arrange(folder):
        (folder / "odd.py").write_text(code, errors="surrogateescape")

    verb = random.choice(("train", "plan", "rehearse"))
    argv = [verb, "--config=odd.py", *BASE[verb][1:]]
    if random.random() < 0.3 and verb == "train":
        argv.append("--print_config")
    note = f"a config that is: {name}"
    return Case(
        kind="config file", argv=argv, arrange=arrange, expect="refused", note=note
    )


CHEAP = (*("prepare", "count", "runs", "audit") * 3, "evaluate", "train", "generate")


def odd_environment(random):
    from fuzz_environments import ENVIRONMENTS

    return random.choice(ENVIRONMENTS)(random, random.choice(CHEAP))


def stopped(random):
    """A signal at a random moment."""
    verb = random.choice(("prepare", "count", "train", "evaluate", "generate"))
    number = random.choice(
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    )
    delay = random.random() ** 2 * (0.3 if verb in ("prepare", "count") else 4)
    argv = [verb, *BASE[verb]]
    if verb == "train" and random.random() < 0.5:
        argv[2:] = ["--workdir=new", "--config.train.steps=40"]

    def arrange(folder):
        if verb == "prepare":
            verses = (folder / "verses.txt").read_text()
            (folder / "verses.txt").write_text(verses * 3000)

    note = f"{number.name} after {delay:.3f} s"
    case = Case(
        kind="signal", argv=argv, note=note, arrange=arrange, stop=(number, delay)
    )
    case.quiet = True
    return case
