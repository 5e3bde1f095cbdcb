"""Odd surroundings of a sound command: streams, disks, users, locales, variables."""

import ctypes
import os
import resource
import shutil

from fuzz_cases import BASE, DUE, Case


def _case(verb, **fields):
    fields = {"expect": "either", "due": DUE.get(verb, ())} | fields
    return Case(kind="environment", argv=[verb, *BASE[verb]], **fields)


def closed_streams(random, verb):
    numbers = random.choice(((0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)))

    def close():
        for number in numbers:
            os.close(number)

    fresh = random.random() < 0.4
    note = f"without streams {numbers}"
    case = _case(verb, around=close, note=note, expect="fine", fresh=fresh)
    case.quiet = 2 in numbers
    return case


def full_output(random, verb):
    def fill():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    expect = "fine" if verb == "train" else "refused" if verb == "runs" else "either"
    return _case(verb, around=fill, note="> /dev/full", expect=expect)


def nobody_reads(random, verb):
    def pipe():
        here, there = os.pipe()
        os.close(here)
        os.dup2(there, 1)
        os.close(there)

    return _case(verb, around=pipe, note="| true", also=(141,))


def small_disk(random, verb):
    size = random.choice((0, 1, 100, 1000, 4096, 20_000, 100_000))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    case = _case(verb, around=limit, note=f"ulimit -f {size} bytes")
    case.environment = {"JAX_COMPILATION_CACHE_DIR": None}
    case.quiet = size < 4096  # stderr is a file, too
    return case


def _obey_modes():
    """Gives up what root may do beside other users: to read and write all files."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, self
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0


def read_only(random, verb):
    where = random.choice((".", "run", "run/checkpoints", "corpus"))

    def protect(folder):
        for path in (folder / where, *(folder / where).rglob("*")):
            path.chmod(0o500 if path.is_dir() else 0o400)

    case = _case(verb, around=_obey_modes, note=f"{where} is read-only")
    case.arrange = protect
    case.environment = {"JAX_COMPILATION_CACHE_DIR": None}
    return case


def unreadable(random, verb):
    names = ("corpus/manifest.json", "run/run.json", "corpus/train-00000.tokens")
    name = random.choice((*names, "run", "corpus", "stories.jsonl", "config.py"))
    case = read_only(random, verb)
    case.note = f"{name} is unreadable"
    case.arrange = lambda folder: (folder / name).chmod(0)
    return case


def few_files(random, verb):
    count = random.choice((8, 16, 32))

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

    return _case("prepare", around=limit, note=f"ulimit -n {count}")


def no_folder(random, verb):
    def remove():
        shutil.rmtree(os.getcwd())

    return _case(verb, around=remove, note="the working directory is gone")


def ascii_locale(random, verb):
    """Python's own encoding is read at its start only."""

    def arrange(folder):
        shutil.copy(folder / "stories.jsonl", folder / "störies.jsonl")
        os.rename(folder / "run", folder / "rün")

    case = _case(verb, arrange=arrange, fresh=True, note="ASCII locale", expect="fine")
    swap = {
        "--input=stories.jsonl": "--input=störies.jsonl",
        "--workdir=run": "--workdir=rün",
    }
    case.argv = [swap.get(x, x) for x in case.argv]
    case.due = tuple(x.replace("run/", "rün/") for x in case.due)
    case.argv = [x.replace("The mill", "Thé mill") for x in case.argv]
    kinds = (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "tlh_XX.UTF-8", "LANG": None},
    )
    case.environment = random.choice(kinds)
    return case


def odd_variable(random, verb):
    name, value = random.choice(
        (
            ("HOME", None),
            ("HOME", "/nowhere"),
            ("TMPDIR", "/nowhere"),
            ("PATH", None),
            ("TERM", "é"),
            ("COLUMNS", "0"),
            ("COLUMNS", "x"),
            ("JAX_NUM_CPU_DEVICES", "0"),
            ("JAX_NUM_CPU_DEVICES", "many"),
            ("JAX_PLATFORMS", "nothing"),
            ("JAX_PLATFORMS", "cuda"),
            ("JAX_COMPILATION_CACHE_DIR", "/dev/null/x"),
            ("XDG_CACHE_HOME", "/proc/nowhere"),
            ("NO_COLOR", "1"),
            ("NPROC", "x"),
            ("OMP_NUM_THREADS", "-3"),
            ("MTP_JAX_PARENT", "x"),
        )
    )
    fine = name in ("HOME", "PATH", "TERM", "COLUMNS", "XDG_CACHE_HOME", "NO_COLOR")
    case = _case(verb, note=f"{name}={value}", expect="fine" if fine else "either")
    case.environment = {name: value}
    case.fresh = name.startswith(("JAX_", "NPROC", "OMP")) or random.random() < 0.3
    return case


ENVIRONMENTS = (
    *(closed_streams, full_output, nobody_reads, small_disk, read_only, unreadable),
    *(few_files, no_folder, ascii_locale, odd_variable, odd_variable),
)
