"""Text of a model or a file does not steer the terminal that shows it."""

import json

import pytest
from test_continuations import Speaking

from mtp_jax.cli import generate as verb
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.reports.printable import printable

PROMPT = "x = '\x1b]0;PWNED\x07\x1b[2J"
NEW = "\x1b[31m\r\x9b5A\u202ea\tb\nc"
SHOWN = "x = '\\x1b]0;PWNED\\x07\\x1b[2J\\x1b[31m\\r\\x9b5A\\u202ea\tb\nc"
BYTES = ByteTokenizer()


@pytest.fixture
def speaking(monkeypatch):
    """The verb, with a model that goes on with NEW after PROMPT."""
    ids = BYTES.encode(PROMPT).tolist(), BYTES.encode(NEW).tolist()
    generator = Speaking(BYTES, *ids)
    data = type("Data", (), {"seq_len": 999, "sources": ()})
    model = type("Model", (), {"n_future_tokens": 1})
    config = type("Config", (), {"data": data, "model": model, "context": 999})
    restored = type("Restored", (), {"config": config, "step": 1})
    restored.needed_for_one = lambda: restored
    restored.with_draft_cache = lambda _: restored
    monkeypatch.setattr(
        "mtp_jax.checkpoint.restore.restore_model", lambda *_, **__: restored
    )
    monkeypatch.setattr(
        "mtp_jax.decode.generator.Generator.from_restored", lambda _: generator
    )


def printed(capsys, monkeypatch, *args, terminal=True):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert verb.main(["--workdir=run", f"--prompt={PROMPT}", *args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [[], ["--stream"], ["--color=never"], ["--decoder=plain"]], ids=str
)
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_is_shown_escapes(speaking, capsys, monkeypatch, args, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = printed(capsys, monkeypatch, *args)
    assert out.startswith(SHOWN)
    assert printable(out) == out


@pytest.mark.parametrize("terminal", [False, True])
def test_colours_are_the_only_escapes(speaking, capsys, monkeypatch, terminal):
    out = printed(capsys, monkeypatch, "--color=always", terminal=terminal)
    assert out.startswith(SHOWN)


def test_a_file_gets_the_text_as_it_is(speaking, capsys, monkeypatch):
    for args in ([], ["--stream"]):
        out = printed(capsys, monkeypatch, *args, terminal=False)
        assert out.startswith(PROMPT + NEW)


def test_json_is_the_text_and_escaped(speaking, capsys, monkeypatch):
    out = printed(capsys, monkeypatch, "--json")
    assert json.loads(out)["text"] == NEW
    assert printable(out) == out


def test_the_sample_line_of_training_is_escaped(monkeypatch):
    from mtp_jax.run.evaluation import HeldoutEvaluation

    lines = []
    fake = HeldoutEvaluation.__new__(HeldoutEvaluation)
    fake._log = type("Log", (), {"say": lines.append, "write": lambda *_: None})
    spent = type("Spent", (), {"__enter__": lambda s: s, "__exit__": lambda *_: None})
    fake._goodput = type("Goodput", (), {"spent": lambda *_: spent()})()
    fake._evaluator = fake._corpora = fake._mesh = None
    fake._cfg = type("Cfg", (), {})()
    fake._cfg.eval = type("Eval", (), {"batches": 1, "sample_tokens": 4})
    fake._merge = lambda params: params
    fake._sample = lambda state, step: (PROMPT, NEW)
    module = "mtp_jax.run.evaluation."
    monkeypatch.setattr(module + "placed_heldout", lambda *_, **__: None)
    monkeypatch.setattr(module + "measure", lambda *_: None)
    monkeypatch.setattr(module + "heldout_record", lambda *_: {"loss/head_1": 1.0})
    monkeypatch.setattr(module + "heldout_line", lambda *_: "held out")

    fake.run(type("State", (), {"params": None}), 1)

    assert len(lines) == 2 and all(printable(line) == line for line in lines)
