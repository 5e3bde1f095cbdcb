"""Pages of reports in Chromium: nothing on the console, plots that show something."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report_runs import nan_steps, record, write_results, write_run

from mtp_jax.cli import report as verb

pytest.importorskip("matplotlib", reason="the extra `report`")
image = pytest.importorskip("PIL.Image")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.packages,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]
WIDTHS = (1600, 400)
HEIGHT = 2400

# Looks at the page in both frames, and leaves what it finds in the document.
PROBE = """
<script>
onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const figures = [...page.querySelectorAll('figure')].map(figure => {
      const svg = figure.querySelector('svg').getBoundingClientRect();
      const data = [...figure.querySelectorAll('[id*="-data-"]')].map(group => {
        const box = group.getBoundingClientRect();
        return box.width + box.height > 0 && box.left >= svg.left - 1 &&
          box.right <= svg.right + 1 && box.top >= svg.top - 1 &&
          box.bottom <= svg.bottom + 1;
      });
      const letters = [...figure.querySelectorAll('svg text')].map(
        text => text.getBoundingClientRect());
      return {name: figure.id, data: data, left: svg.left, top: svg.top,
        width: svg.width, height: svg.height,
        inside: letters.every(b => b.left >= svg.left - 2 && b.right <= svg.right + 2),
        smallest: Math.min(...letters.map(box => box.height))};
    });
    return {figures: figures, wide: root.scrollWidth,
      paper: getComputedStyle(page.body).backgroundColor};
  });
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = JSON.stringify(found);
  document.body.append(out);
};
</script>
"""


def browse(text, folder, *, dark=False):
    """What a page is like at both widths: (found by the probe, console, picture)."""
    frames = "".join(
        f'<iframe style="border:0;width:{w}px;height:{HEIGHT}px" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for w in WIDTHS
    )
    style = "<style>body{margin:0;display:flex} #found{display:none}</style>"
    wrapper, picture = folder / "wrapper.html", folder / "picture.png"
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8">{style}{frames}{PROBE}',
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"),
            *(f"--screenshot={picture}", f"--window-size={sum(WIDTHS)},{HEIGHT}"),
            f"--blink-settings=preferredColorScheme={int(not dark)}",
            f"--user-data-dir={folder / 'profile'}",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)), console, picture


def page_of(folder, *workdirs):
    path = folder / "page.html"
    argv = [f"--workdir={workdir}" for workdir in workdirs]
    assert verb.main([*argv, f"--output={path}", "--files_only"]) == 0
    return path.read_text(encoding="utf-8")


def steps(count, **options):
    return [record(step, **options) for step in range(1, count + 1)]


def run_of_today(folder):
    return [write_run(folder / "run", steps(60), evaluations=(30, 60))]


def restarts(folder):
    run = write_run(folder / "run", steps(60), evaluations=(60,), starts=(0, 20, 21))
    write_results(run)
    return [run]


def hostile_names(folder):
    names = ("<img src=x onerror=alert(1)>", "$(reboot) `x` $a$ '\" &lt;", "_\u202e名")
    return [write_run(folder / name, steps(9), evaluations=(9,)) for name in names]


KINDS = {
    "today": run_of_today,
    "restarts": restarts,
    "one head": lambda folder: [write_run(folder / "run", steps(9, heads=1), heads=1)],
    "one step": lambda folder: [write_run(folder / "run", steps(1))],
    "nan": lambda folder: [
        write_run(folder / "run", nan_steps(steps(40), {1, 7, 8, 40}))
    ],
    "all nan": lambda folder: [write_run(folder / "run", nan_steps(steps(2), {1, 2}))],
    "long": lambda folder: [write_run(folder / "run", steps(5000))],
    "names": hostile_names,
}


def colours_in(picture, frame, figure):
    """Colours of a figure in a screenshot, with how many pixels have each."""
    left = figure["left"] + sum(WIDTHS[:frame])
    box = (
        left,
        figure["top"],
        left + figure["width"],
        figure["top"] + figure["height"],
    )
    part = image.open(picture).convert("RGB").crop(tuple(map(int, box)))
    return sorted(part.getcolors(1 << 24), reverse=True)


def check(found, console, picture, dark):
    assert console == []
    assert image.open(picture).size == (sum(WIDTHS), HEIGHT)
    seen = 0
    for frame, (page, width) in enumerate(zip(found, WIDTHS, strict=True)):
        assert page["wide"] <= width, "nothing makes the page wider"
        assert page["paper"] == ("rgb(22, 23, 26)" if dark else "rgb(252, 252, 250)")
        assert page["figures"]
        for figure in page["figures"]:
            assert figure["data"] and all(figure["data"]), figure
            assert figure["inside"] and figure["smallest"] >= 8, figure
            assert 300 < figure["width"] <= width
            if figure["top"] + figure["height"] < HEIGHT:
                (most, _), *others = colours_in(picture, frame, figure)
                assert most < 0.99 * figure["width"] * figure["height"]
                assert len(others) > 20
                seen += 1
    assert seen >= 6
    first = [figure["left"] for figure in found[0]["figures"][:3]]
    assert len(set(first)) == min(3, len(first)), (
        "figures side by side where there is room"
    )
    assert len({figure["left"] for figure in found[1]["figures"]}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_pages_look_right_wide_and_narrow(kind, tmp_path):
    text = page_of(tmp_path, *KINDS[kind](tmp_path))
    dark = kind in ("restarts", "names")

    check(*browse(text, tmp_path, dark=dark), dark)


def test_what_is_wrong_with_a_page_is_seen(tmp_path):
    """Controls: a script that fails, curves that are gone, a table that is too wide."""
    text = page_of(tmp_path, *run_of_today(tmp_path))
    whole, _, picture = browse(text, tmp_path)
    size = picture.stat().st_size
    bad = (
        "<style>[id*='-data-'] { display: none } .wide { overflow: visible }</style>"
        "<script>throw new Error('planted')</script>"
    )

    found, console, picture = browse(text.replace("</head>", f"{bad}</head>"), tmp_path)

    assert any("planted" in line for line in console)
    assert not any(any(figure["data"]) for figure in found[0]["figures"])
    assert found[1]["wide"] > 400 >= whole[1]["wide"]
    assert picture.stat().st_size < 0.9 * size, "curves are most of a picture"
