"""The verb `report`: pages that stand alone, pictures, and what is refused."""

import functools
import html.parser
import re
import shutil

import pytest
from report_runs import lines, nan_steps, record, write_results, write_run
from runs import ROOT

from mtp_jax.cli import report as verb
from mtp_jax.errors import UserError

OLD_RUN = ROOT / "tests" / "data" / "run_format_0"
CORPUS = str(OLD_RUN / "corpus")
pytest.importorskip("matplotlib", reason="the extra `report`")


@functools.cache
def model_view():
    """The old run's model, looked at once for all tests."""
    from mtp_jax.reports.model_view import look_at_model

    view = look_at_model(OLD_RUN / "run", data=[CORPUS], texts=2)
    assert not isinstance(view, str), view
    return view


class Page(html.parser.HTMLParser):
    """Figures, ids, text and outside references of a page whose tags fit together."""

    EMPTY = frozenset({"meta", "link", "br", "use"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.outside, self.tags = [], [], [], []
        self.words, self.figures = [], {}
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
            if tag == "figure":
                self.figures[attrs["id"]] = 0
            if found := re.fullmatch(r"(.*)-data-\d+", attrs["id"]):
                self.figures[found[1]] += 1
        names = ("src", "href", "action", "xlink:href")
        self.outside += [attrs[k] for k in names if k in attrs]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def report(*workdirs, output, options=("--files_only",)):
    """A page by the verb, read again; it stands alone."""
    argv = [f"--workdir={workdir}" for workdir in workdirs]
    assert verb.main([*argv, f"--output={output}", *options]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert "script" not in page.tags and len(set(page.ids)) == len(page.ids)
    for target in page.outside:
        assert target == "data:," or (target[0] == "#" and target[1:] in page.ids)
    assert not re.search(r"https?://(?!www\.w3\.org/)", output.read_text())
    assert page.figures and all(page.figures.values()), page.figures
    return page


@pytest.fixture
def folder(tmp_path):
    rows = [record(step) for step in range(1, 41)]
    run = write_run(tmp_path / "run", rows, evaluations=(20, 40), starts=(0, 13, 30))
    write_results(run)
    return run


def names(page, key="run-1"):
    return {name.removeprefix(f"{key}-") for name in page.figures if key in name}


def test_a_page_shows_the_curves_and_tables_of_a_run(folder, tmp_path, capsys):
    page = report(folder, output=tmp_path / "page.html")

    out = capsys.readouterr().out
    assert out == f"written to {tmp_path / 'page.html'}\n"
    assert names(page) == {
        *("loss", "accuracy", "tokens", "drafts", "bits", "throughput", "goodput"),
        *("time", "rate", "gradient"),
    }
    assert page.figures["run-1-loss"] == 8, "four heads, trained and held out"
    for words in (
        "Run run",
        "after step",
        "config.optim.peak_lr is 0.002, was 0.001",
        "minutes since the first start",
        "2.0159 bits per byte of 1,234 tokens",
        "copa acc 0.6250 0.5000 to 0.7500 8 40",
        "data/<b>bold</b>",
        "--workdir=$(rm -rf ~)<script>",
        "optim.peak_lr 0.004",
        "head 4",
        "files alone were asked for",
    ):
        assert words in page.text, words


def test_a_page_shows_the_model_on_held_out_text(folder, tmp_path, monkeypatch):
    from mtp_jax.reports import report as module

    monkeypatch.setattr(module, "look_at_model", lambda *_, **__: model_view())

    page = report(folder, output=tmp_path / "page.html", options=())

    assert {"positions", "distance"} <= names(page)
    view = model_view()
    assert f"at step {view.step}" in page.text and "Left out" not in page.text
    tokens = sum(round(t.tokens_per_forward * t.forwards) for t in view.texts)
    assert f"{tokens} tokens in " in page.text
    assert "#run-1 .h2 {" in (tmp_path / "page.html").read_text()
    accuracy = f"{view.accuracy.accuracy_N[0]:.2f}"
    assert accuracy in page.text, "on its bar"


def test_held_out_text_is_read_from_the_folder_given(tmp_path):
    page = report(
        OLD_RUN / "run",
        output=tmp_path / "page.html",
        options=(f"--data={CORPUS}", "--texts=1"),
    )

    assert {"positions", "distance", "loss"} <= names(page)
    assert "Text 1" in page.text and "Text 2" not in page.text


@pytest.mark.parametrize("heads", [1, 2])
def test_a_model_is_looked_at_with_any_number_of_heads(monkeypatch, heads):
    from mtp_jax.reports import model_view as module

    whole = module.restore_model(OLD_RUN / "run").keep_heads(heads)
    monkeypatch.setattr(module, "restore_model", lambda _: whole)

    view = module.look_at_model("run", data=[CORPUS], texts=40)

    assert view.decoder == ("plain" if heads == 1 else "blockwise")
    assert len(view.accuracy.accuracy_N) == heads and len(view.texts) > 1
    assert all(len(text.tokens) > 0 for text in view.texts)


def test_where_there_is_no_held_out_text_it_says_so(folder, tmp_path, capsys):
    page = report(folder, output=tmp_path / "page.html", options=())
    assert "positions" not in names(page)
    assert f"texts: {folder} holds no checkpoints" in page.text
    out = capsys.readouterr().out
    assert out.startswith("left out: run: accuracy on held-out text, and texts: ")

    run = tmp_path / "moved"
    shutil.copytree(OLD_RUN / "run", run)
    page = report(run, output=tmp_path / "page.html", options=())
    assert (
        "corpus is not a prepared corpus" in page.text
        and "Give --data=DIR" in page.text
    )


def test_a_bug_is_no_reason_to_leave_something_out(folder, tmp_path, monkeypatch):
    from mtp_jax.reports import model_view as module

    monkeypatch.setattr(module, "restore_model", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(folder, output=tmp_path / "page.html", options=())


def broken(_):
    raise MemoryError("too large")


def test_a_model_that_is_too_large_is_left_out(folder, tmp_path, monkeypatch):
    from mtp_jax.reports import model_view as module

    monkeypatch.setattr(module, "restore_model", broken)
    page = report(folder, output=tmp_path / "page.html", options=())
    assert "texts: out of memory (too large)" in page.text


def test_several_runs_stand_side_by_side(folder, tmp_path):
    rows = [record(step, seed=1) for step in range(1, 31)]
    other = write_run(
        tmp_path / "_other & <i>", rows, evaluations=(30,), heads=4,
        config={"train": {"seed": 3}},
    )  # fmt: skip
    write_results(other)

    page = report(folder, other, output=tmp_path / "page.html")

    assert names(page, "all") == {
        *("loss", "accuracy", "tokens", "bits", "throughput", "rate")
    }
    assert page.figures["all-loss"] == 4 and names(page, "run-2") >= {"loss", "time"}
    assert "train.seed 0 3" in page.text and "Tasks of several runs" in page.text
    assert "Runs run, _other & <i>" in page.text


def test_runs_of_other_shapes_stand_side_by_side(folder, tmp_path):
    page = report(folder, OLD_RUN / "run", output=tmp_path / "page.html")
    assert "model.num_layers 5 3" in page.text and "run-2-loss" in page.figures


def test_a_log_of_steps_alone_has_a_page_without_figures(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1}])
    argv = [f"--workdir={run}", f"--output={tmp_path / 'p'}", "--files_only"]
    assert verb.main(argv) == 0
    assert set(Page((tmp_path / "p").read_text()).figures) == {"run-1-time"}


@pytest.mark.parametrize(
    ("rows", "heads"),
    [
        ([record(7)], 4),
        ([record(step, heads=1) for step in range(1, 9)], 1),
        (nan_steps([record(step) for step in range(1, 31)], {1, 2, 17, 30}), 4),
        (nan_steps([record(step) for step in range(1, 4)], {1, 2, 3}), 4),
        ([record(step, heads=32) for step in range(1, 400)], 32),
        ([{**record(3), "grad_norm": 0.0, "lr": 1e-300, "time": None}], 4),
        ([{**record(s), "loss/head_1": 10.0 ** (s * 30)} for s in range(1, 10)], 4),
    ],
    ids=["a step", "one head", "nan", "all nan", "32 heads", "zero", "huge"],
)
def test_odd_runs_have_a_page(tmp_path, rows, heads):
    run = write_run(tmp_path / "run", rows)
    if heads != 4:
        (run / "run.json").unlink()

    page = report(run, output=tmp_path / "page.html")

    assert {"loss", "accuracy", "gradient"} <= names(page)
    assert ("tokens" in names(page)) == (heads > 1)
    bad = sum(row["bad_steps"] for row in rows)
    assert (f"red: {bad} logged steps" in page.text) == (bad > 0)
    assert ("no finite number" in page.text) == (bad == len(rows))


def test_names_are_only_names(tmp_path):
    rows, runs = [record(step) for step in range(1, 5)], []
    for name in (
        "<script>alert(1)<\u2215script>$(touch owned)`x` $x_1$ and $",
        "a'b\"c &amp;&lt; {{ 7 + 7 }}{% raw %}",
        "_名前 é\u202e\x1b(B\n\udcff",
    ):
        runs.append(write_run(tmp_path / name, rows))

    page = report(*runs, output=tmp_path / "page.html")

    shown = ", ".join(run.name for run in runs)
    for odd in ("\x1b", "\udcff", "\u202e"):
        shown = shown.replace(odd, odd.encode("unicode_escape").decode())
    assert " ".join(f"Runs {shown}".split()) in page.text
    assert len(list(tmp_path.iterdir())) == 4


def test_a_long_log_makes_a_small_page(tmp_path):
    run = write_run(tmp_path / "run", [record(1)])
    first = record(1)
    rows = (
        {**first, "step": step, "loss/head_1": 99.5 if step == 31_415 else 1.0}
        for step in range(1, 60_001)
    )
    (run / "metrics.jsonl").write_text(lines(rows))

    page = report(run, output=tmp_path / "page.html")

    assert (tmp_path / "page.html").stat().st_size < 500_000
    assert "60,000 of 25,000" in page.text
    top = [float(x) for x in re.findall(r"\b\d+\b", page.text) if float(x) >= 80]
    assert top, "an axis that reaches the spike"


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_pictures_have_the_figures_asked_for(folder, tmp_path, kind):
    path = tmp_path / f"picture.{kind}"
    argv = [f"--workdir={folder}", "--files_only", f"--output={path}"]

    assert verb.main([*argv, f"--format={kind}"]) == 0
    whole = path.read_bytes()
    assert verb.main([*argv, "--figures=loss,rate"]) == 0
    two = path.read_bytes()

    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[kind]
    assert whole.startswith(begin) and two.startswith(begin)
    assert len(two) < 0.6 * len(whole)
    if kind == "svg":
        text = two.decode()
        assert "Loss by head" in text and "Gradient norm" not in text
        assert text.index("Loss by head") < text.index("Learning rate")
    if kind == "png":
        image = pytest.importorskip("PIL.Image")
        assert image.open(path).size == (1920, 580), "two panels, 200 dots an inch"


def test_a_picture_of_several_runs_has_them_side_by_side(folder, tmp_path):
    other = write_run(tmp_path / "b", [record(step) for step in range(1, 5)])
    argv = [f"--workdir={folder}", f"--workdir={other}", "--files_only"]
    path = tmp_path / "p.svg"

    assert verb.main([*argv, f"--output={path}"]) == 0

    assert "Loss of head 1" in path.read_text()
    with pytest.raises(UserError, match="no figure 'drafts' of run, b; there are loss"):
        verb.main([*argv, f"--output={path}", "--figures=drafts"])


def test_a_report_is_written_over_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "lr": 0.5}])
    argv = [f"--workdir={run}", "--files_only"]
    for name in ("a.html", "a.png", "a.pdf", "a.svg", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.touch()
        else:
            assert verb.main([*argv, f"--output={path}"]) == 0
        assert verb.main([*argv, f"--output={path}", "--format=svg"]) == 0
        assert path.read_bytes().startswith(b"<?xml")
    for text in ("my notes on mtp-jax report", "<!DOCTYPE html><p>mine</p>"):
        mine = tmp_path / "mine.html"
        mine.write_text(text)
        with pytest.raises(UserError, match="is there already and no report"):
            verb.main([*argv, f"--output={mine}"])
        assert mine.read_text() == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--workdir"),
        (["--workdir=run"], "--output"),
        (["--workdir=run", "--output=nowhere/x"], "no file in a folder that exists"),
        (["--workdir=run", "--output=."], "no file in a folder that exists"),
        (["--workdir=gone", "--output=x"], "there is no such folder"),
        (["--workdir=.", "--output=x"], "nothing to report"),
        (["--workdir=run", "--workdir=./run", "--output=x"], "given twice"),
        (["--workdir=run", "--output=x", "--format=gif"], "invalid choice"),
        (["--workdir=run", "--output=x", "--figures=loss"], "is for pictures"),
        (["--workdir=run", "--output=x.png", "--figures=no"], "no figure 'no' of run"),
        (["--workdir=run", "--output=x.png", "--figures="], "no figure '' of run"),
        (
            ["--workdir=run", "--output=x.png", "--figures=positions"],
            r"no figure 'positions' of run \(run holds no checkpoints",
        ),
        (["--workdir=run", "--output=x", "--texts=0"], "not a whole number above 0"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        verb.main(options)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_extra_it_says_what_to_install(folder, tmp_path, monkeypatch):
    from mtp_jax.reports import pictures

    monkeypatch.setattr(pictures, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'mtp-jax\[report\]'"):
        verb.main([f"--workdir={folder}", f"--output={tmp_path / 'x'}"])


def test_settings_of_the_users_matplotlib_do_not_count(folder, tmp_path):
    import matplotlib

    report(folder, output=tmp_path / "a.html")
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path"}):
        report(folder, output=tmp_path / "b.html")
        assert matplotlib.rcParams["text.usetex"]

    a, b = (
        re.sub(r'class="faint">.*?</p>', "", (tmp_path / name).read_text())
        for name in ("a.html", "b.html")
    )
    assert a == b
