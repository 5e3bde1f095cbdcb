"""Files of no use, and damage to files of use, for the fuzzer."""

import gzip
import json
import os
import socket

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


def make(folder, name):
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


def damage(random, path):
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
