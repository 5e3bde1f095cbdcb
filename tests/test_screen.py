"""What people see of a run: on terminals of any width, and in files."""

import io
import re
import sys

import pytest
from runs import complete, train_args

from mtp_jax.run.screen import Screen, duration, fitted, progress_line

LINE = (
    "step 450/25000  loss by head 3.105 3.284 3.324 3.401  accept 1.67  grad 1.50  "
    "lr 6.7e-04  9,747 tok/s  data wait 6%  goodput 84%  mfu 41.2%  3h07m left"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def rows(self):
        """What is on it at the end: each row as it was last drawn."""
        rows = []
        for row in self.getvalue().split("\n"):
            rows.append(row.split("\r\x1b[2K")[-1])
        return rows


class Clock:
    at = 0.0

    def __call__(self):
        return self.at


def narrow_terminal(monkeypatch):
    """Stdout from now on; set in the test, as pytest sets its own before."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0m00s"),
        (59.6, "0m59s"),
        (725, "12m05s"),
        (3600, "1h00m"),
        (11_220, "3h07m"),
        (47 * 3600, "47h00m"),
        (52 * 3600, "2d04h"),
    ],
)
def test_times_are_told_in_units_that_fit_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 400])
def test_a_line_fits_the_terminal_and_loses_nothing(width):
    rows = fitted(LINE, width).split("\n")

    assert max(map(len, rows)) < width
    assert re.sub(r"\s+", " ", " ".join(rows)) == re.sub(r"\s+", " ", LINE)
    assert (len(rows) == 1) == (width == 400 or len(LINE) < width)
    if width >= 60:  # no figure is torn from its name
        assert all("  ".join(rows).count(part) == 1 for part in LINE.split("  "))


def test_a_command_is_one_line_to_copy():
    line = f"next: python -m mtp_jax generate --workdir={'runs/' * 20} --heldout=2"

    assert fitted(line, 60) == line


def test_a_sample_keeps_its_spaces():
    line = f"sample: 'if a:{' ' * 70}b' -> '{' ' * 9} c'"

    rows = fitted(line, 40).split("\n")

    assert max(map(len, rows)) < 40
    assert rows[0] + "".join(row.removeprefix("    ") for row in rows[1:]) == line


@pytest.mark.parametrize("width", [20, 40, 60, 100])
@pytest.mark.parametrize("step", [0, 1, 450, 25_000])
def test_the_bar_fits_too(step, width):
    line = progress_line(step, 25_000, 11_220, "loss 3.105", width)

    assert len(line) < width and line.startswith(f"{step}/25000 ")
    if width >= 60:
        assert "loss 3.105" in line and line.endswith("3h07m left") and "[" in line


def test_the_bar_stays_below_the_lines_and_goes_at_the_end(monkeypatch):
    terminal = narrow_terminal(monkeypatch)
    clock = Clock()
    screen = Screen(True, clock)

    screen.phase("compile")
    assert terminal.rows() == ["compiling ..."]
    screen.progress(0, 100)
    clock.at = 36.0
    screen.progress(1, 100)
    bar = "1/100 [" + " " * 30 + "] 1%  0h59m left".replace("0h59m", "59m24s")
    assert terminal.rows() == [bar]
    screen.say("a line")
    assert terminal.rows() == ["a line", bar]
    screen.close()
    screen.say("done")
    assert terminal.rows() == ["a line", "done", ""]


def test_the_bar_is_drawn_ten_times_a_second_at_most(monkeypatch):
    terminal = narrow_terminal(monkeypatch)
    clock = Clock()
    screen = Screen(True, clock)

    for step in range(1000):
        clock.at = step / 1000
        screen.progress(step, 1000)

    assert 5 <= terminal.getvalue().count("left") <= 11


def test_a_file_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    screen = Screen(True)

    screen.phase("compile")
    screen.say("begins")
    screen.phase("compile")
    screen.phase("evaluate")
    screen.progress(1, 100)
    screen.say(LINE)
    screen.close()

    assert sys.stdout.getvalue() == f"begins\ncompiling ...\n{LINE}\n"


@pytest.mark.parametrize(("active", "term"), [(False, "xterm"), (True, "dumb")])
def test_other_processes_and_dumb_terminals_have_no_bar(monkeypatch, active, term):
    terminal = narrow_terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    screen = Screen(active)

    screen.phase("evaluate")
    screen.progress(1, 100)
    screen.progress(50, 100)
    screen.say("x")

    assert terminal.getvalue() == ("x\n" if active else "")


def test_a_run_tells_what_it_waits_for_and_what_comes_next(tmp_path, corpus_dir):
    workdir = tmp_path / "my run"
    args = train_args(workdir, corpus_dir, "--config.train.steps=1")

    lines = complete(args).splitlines()

    assert lines[0] == f"starting {workdir}: reads the corpora, compiles ..."
    first = next(i for i, line in enumerate(lines) if line.startswith("step 1/1"))
    assert "1 device," in lines[1] and lines[2].startswith("parameters: trunk ")
    assert lines[3] == "compiling ..."
    assert lines.count("compiling ...") == 1 and first > 3
    assert lines[-3:] == [
        f"done: step 1, in {workdir}",
        f"next: python -m mtp_jax evaluate --workdir='{workdir}'",
        f"next: python -m mtp_jax generate --workdir='{workdir}' --heldout=2",
    ]
