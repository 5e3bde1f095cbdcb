"""Cases of the fuzzer: a verb, what is odd about it, and what has to come of it."""

import contextlib
import dataclasses
import gzip
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import typing
from collections.abc import Callable

from fuzz import NOBODY, OLD_RUN

BITS_PER_BYTE = json.loads((OLD_RUN / "expected.json").read_text())["eval"]
BITS_PER_BYTE = BITS_PER_BYTE["bits_per_byte"]
BASE = {
    "prepare": ["--input=verses.txt", "--output=out", "--workers=1"],
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
}
DUE = {
    "prepare": ("out/manifest.json",),
    "count": ("counts.npz",),
    "train": ("run/run.json",),
    "evaluate": ("run/eval.json",),
    "calibrate": ("tree.json",),
}
ODD = ("", " ", "-1", "0", "1e999", "nan", "-inf", "99999999999", "é\u202e", "--", "None")
ODD += ("1.5", "a" * 5000, "0x10", "١٢", "[1,2", "'", "%s", "\\", "/", "..", "\udcff")
NO_NUMBER = ("", " ", "é\u202e", "--", "None", "a" * 5000, "[1,2", "'", "%s", "\\")
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
    protect: Callable = nothing  # of the folder, once it is nobody's
    around: Callable = nothing  # in the child, before the program begins
    check: Callable = nothing  # of the folder and the outcome: a fault, or nothing
    due: tuple[str, ...] = ()  # files that a success leaves
    environment: dict = dataclasses.field(default_factory=dict)
    fresh: bool = False  # a Python of its own
    as_nobody: bool = False
    stop: tuple[int, float] | None = None  # a signal, seconds after the start
    quiet: bool = False  # nobody hears stderr
    also: tuple[int, ...] = ()  # other codes that are right

    @property
    def fast(self):
        """True if it needs no model, no Python of its own and no waiting."""
        if self.fresh or self.stop or self.argv[0] in ("verify", "calibrate"):
            return False
        needs_model = self.argv[0] in ("train", "evaluate", "generate")
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

    from mtp_jax.cli import args

    class Caught(Exception):
        pass

    def catch(parser, *rest):
        raise Caught(parser)

    usual, args.Parser.parse_known_args = args.Parser.parse_known_args, catch
    try:
        importlib.import_module(f"mtp_jax.cli.{verb}").main([])
    except Caught as caught:
        return caught.args[0]
    finally:
        args.Parser.parse_known_args = usual


def odd_flag(random):
    verb = random.choices(list(BASE), (8, 4, 4, 3, 2, 2, 3, 1, 1, 3, 3))[0]
    base = list(BASE[verb])
    expect = "refused" if verb in ("rehearse",) else "either"
    how = random.random()
    if how < 0.1:
        name = random.choice(("--nothing", "-z", "--Workdir", "--work", "stray", "--config"))
        if name == "--config" and verb in ("train", "plan", "rehearse"):
            name = "--nothing=3"
        expect = "either" if (verb, name) == ("runs", "stray") else "refused"
        return Case(kind="flag", argv=[verb, *base, name], expect=expect)
    if how < 0.16:
        required = [x for x in base if x.startswith(("--workdir", "--output", "--input"))]
        left = [x for x in base if x not in required]
        expect = "refused" if required and verb != "runs" else expect
        return Case(kind="flag", argv=[verb, *left], expect=expect)
    actions = [a for a in _parser_of(verb)._actions if a.option_strings and a.nargs != 0]
    actions = [a for a in actions if a.dest not in ("help", "config")]
    if not actions:
        return Case(kind="flag", argv=[verb, *base, "--json=maybe"], expect="refused")
    action = random.choice(actions)
    value = random.choice(ODD)
    type_ = getattr(action.type, "__name__", "")
    if action.choices or (type_ == "positive_int" and value in (*NO_WHOLE, "-1", "0")):
        expect = "refused"
    elif (type_ == "int" and value in NO_WHOLE) or (
        type_ in ("float", "_price", "_count", "_share") and value in NO_NUMBER
    ):
        expect = "refused"
    elif type_ in ("float", "_price", "_share") and value in ("nan", "1e999", "-inf"):
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


TEXTS = {
    "empty.txt": (b"", "refused"),
    "blank.txt": (b" \n\n", "either"),
    "binary.txt": (bytes(range(256)) * 9, "refused"),
    "nul.txt": (b"a\0b" * 90, "either"),
    "latin.txt": ("déjà".encode("latin-1"), "refused"),
    "utf16.txt": ("hello there".encode("utf-16"), "refused"),
    "bom.txt": (b"\xef\xbb\xbfhello there" * 9, "fine"),
    "crlf.txt": (b"hello\r\nthere\r\n" * 9, "fine"),
    "cut.txt": ("é".encode()[:1] * 1, "refused"),
    "long.txt": (b"a" * 3_000_000, "fine"),
    "cut.txt.gz": (gzip.compress(bytes(range(128)) * 99, mtime=0)[:-20], "refused"),
    "crc.txt.gz": (gzip.compress(b"hello" * 99, mtime=0)[:-6] + b"\0" * 6, "refused"),
    "no.txt.gz": (b"hello", "refused"),
    "empty.txt.gz": (b"", "refused"),
    "null.jsonl": (b'{"text": null}\n', "refused"),
    "missing.jsonl": (b'{"txt": "a"}\n', "refused"),
    "nested.jsonl": (b'{"text": {"text": "a"}}\n', "refused"),
    "number.jsonl": (b'{"text": 5}\n', "refused"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "refused"),
    "list.jsonl": (b'["text"]\n', "refused"),
    "bare.jsonl": (b'"text"\n', "refused"),
    "two.jsonl": (b'{"text": "a"} {"text": "b"}\n', "refused"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', "refused"),
    "deep.jsonl": (b'{"text": "a", "x": ' + b"[" * 99_999 + b"\n", "refused"),
    "digits.jsonl": (b'{"text": "a", "x": ' + b"1" * 9_999 + b"}\n", "either"),
    "nan.jsonl": (b'{"text": NaN}\n', "refused"),
    "utf8.jsonl": (b'{"text": "\xff"}\n', "refused"),
}
NO_FILES = ("missing.txt", "loop.txt", "fifo.txt", "socket.txt", "folder.txt")
NO_FILES += ("fifo.jsonl", "dangling.txt", "x" * 300 + ".txt", "/dev/null", "")


def _make(folder, name):
    """Makes what has this name among TEXTS and NO_FILES."""
    path = folder / name
    if name in TEXTS:
        path.write_bytes(TEXTS[name][0])
    elif name.startswith("loop"):
        path.symlink_to(name)
    elif name.startswith("dangling"):
        path.symlink_to("nowhere")
    elif name.startswith("fifo"):
        os.mkfifo(path)
    elif name.startswith("folder"):
        path.mkdir()
    elif name.startswith("socket"):
        os.chdir(folder)
        socket.socket(socket.AF_UNIX).bind(name)
        os.chdir("/")


def odd_file(random):
    """A file of no use, wherever one is read."""
    name = random.choice([*TEXTS, *NO_FILES])
    expect = TEXTS[name][1] if name in TEXTS else "refused"

    def make(folder):
        _make(folder, name)

    case = {"kind": "file", "note": name, "arrange": make}
    where = random.choice(("input", "input", "in a folder", "prompts", "model", "option"))
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
            _make(folder / "texts", name)

        argv = ["prepare", "--input=texts", "--output=out", "--workers=1"]
        return Case(argv=argv, due=DUE["prepare"], **case | {"arrange": make_inside})
    if where == "model":
        argv = ["prepare", "--input=verses.txt", f"--tokenizer={name}", "--output=out"]
        return Case(argv=argv, expect="refused", **case)
    if where == "option":
        decoder = random.choice(("tree:tree", "typical:tree", "dynamo:counts"))
        argv = ["generate", *BASE["generate"], f"--decoder={decoder}={name}"]
        expect = "either" if name == "" else "refused"
        return Case(argv=argv, expect=expect, **case)
    argv = ["generate", "--workdir=run", f"--prompts={name}", "--max_new_tokens=2"]
    return Case(argv=argv, **case)


def _damage(random, path):
    """Damages a file; says how."""
    content = bytearray(path.read_bytes())
    how = random.choice(("cut", "flip", "empty", "gone", "grown", "folder", "noise"))
    if path.suffix == ".json" and random.random() < 0.6:
        how = "value"
    at = random.randrange(max(1, len(content)))
    if how == "value":
        content = _other_value(random, json.loads(content))
    elif how == "cut":
        content = content[:at]
    elif how == "flip" and content:
        content[at] ^= 1 << random.randrange(8)
    elif how == "empty":
        content = b""
    elif how == "grown":
        content += b"\0" * 9
    elif how == "noise":
        content = random.randbytes(len(content))
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        path.write_bytes(content)
    return how


def _other_value(random, tree):
    """JSON with one value, at a random place, replaced."""
    node, spots = [tree], []
    while node:
        here = node.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here)
        for key, value in items:
            spots.append((here, key))
            if isinstance(value, dict | list):
                node.append(value)
    if not spots:
        return b"[]"
    where, key = random.choice(spots)
    where[key] = random.choice((None, -1, "x", 1e308, [], {}, True, 2**70, "../../x"))
    return json.dumps(tree).encode()


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
    verb = random.choice(("count", "count", "audit", "audit", "train", "evaluate", "generate"))
    argv = [verb, *BASE[verb]]
    if verb == "generate":
        argv = [verb, "--workdir=run", "--heldout=2", "--max_new_tokens=2"]
    damage = random.getrandbits(32)

    def arrange(folder):
        _damage(type(random)(damage), folder / "corpus" / name)

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
    verbs = (*("audit", "runs") * 3, *("evaluate", "train", "generate", "calibrate"))
    verb = random.choice(verbs)
    damage = random.getrandbits(32)

    def arrange(folder):
        _damage(type(random)(damage), folder / name)

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
    value = random.choice(ODD if field != "workers" else NO_WHOLE)  # it starts them
    hint = fields[field]
    bad = NO_WHOLE if hint is int else NO_NUMBER if hint is float else ()
    expect = "refused" if value in bad else "either"
    if hint is float and value in ("nan", "1e999", "-inf"):
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


CODES = {
    "syntax": "x = ",
    "no get_config": "x = 3",
    "None": "def get_config(): return None",
    "a dict": "def get_config(): return {'model': 3}",
    "a number": "get_config = 3",
    "raises": "def get_config(): raise RuntimeError('a\\nb')",
    "exits": "import sys\ndef get_config(): sys.exit(0)",
    "exits at import": "import sys; sys.exit(0)",
    "recursion": "def get_config(): return get_config()",
    "needs an argument": "def get_config(x): return x",
    "a wrong type": "from mtp_jax.config import default\n"
    "def get_config():\n c = default()\n c.model = 3\n return c",
    "a field gone": "from mtp_jax.config import default\n"
    "def get_config():\n c = default()\n del c.model\n return c",
    "another config": "from ml_collections import ConfigDict\n"
    "def get_config(): return ConfigDict({'a': 1})",
    "a field None": "from mtp_jax.config import default\n"
    "def get_config():\n c = default()\n c.model.d_model = None\n return c",
    "NUL": "x = '\0'",
    "latin": "x = '\udce9'",
    "empty": "",
}


def odd_config_file(random):
    name, code = random.choice(sorted(CODES.items()))

    def arrange(folder):
        (folder / "odd.py").write_text(code, errors="surrogateescape")

    verb = random.choice(("train", "plan", "rehearse"))
    argv = [verb, "--config=odd.py", *BASE[verb][1:]]
    if random.random() < 0.3 and verb == "train":
        argv.append("--print_config")
    note = f"a config that is: {name}"
    return Case(kind="config file", argv=argv, arrange=arrange, expect="refused", note=note)


CHEAP = (*("prepare", "count", "runs", "audit") * 3, "evaluate", "train", "generate")


def odd_environment(random):
    from fuzz_environments import ENVIRONMENTS

    return random.choice(ENVIRONMENTS)(random, random.choice(CHEAP))


def stopped(random):
    """A signal at a random moment."""
    verb = random.choice(("prepare", "count", "train", "evaluate", "generate"))
    number = random.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL))
    delay = random.random() ** 2 * (0.3 if verb in ("prepare", "count") else 4)
    argv = [verb, *BASE[verb]]
    if verb == "train" and random.random() < 0.5:
        argv[2:] = ["--workdir=new", "--config.train.steps=40"]

    def arrange(folder):
        if verb == "prepare":
            verses = (folder / "verses.txt").read_text()
            (folder / "verses.txt").write_text(verses * 3000)

    note = f"{number.name} after {delay:.3f} s"
    case = Case(kind="signal", argv=argv, note=note, arrange=arrange, stop=(number, delay))
    case.quiet = True
    return case
