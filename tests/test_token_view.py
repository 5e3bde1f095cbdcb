"""Views of a text by head: nothing is lost, nothing escapes, pages stand alone."""

import dataclasses
import html.parser
import re
import shutil
import subprocess

import pytest

from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.generation import Generation
from mtp_jax.reports.token_view import page, spans, terminal, terminal_legend

BYTES = ByteTokenizer()


def generation(text='if a<b: é\x1b[2J\n"x"', heads=None, **changes):
    tokens = BYTES.encode(text).tolist()
    heads = heads or [1 + i % 4 for i in range(len(tokens))]
    values = {
        "prompt": "</pre><script>alert(1)</script>",
        "text": text,
        "tokens": tokens,
        "heads": heads,
        "passes": [i // 4 for i in range(len(tokens))],
        "forwards": 1 + len(tokens) // 4,
        "tokens_per_forward": 2.5,
        "accepted_by_head": [0.9, 0.5],
        "tokens_per_s": 100.0,
        "finish": "length",
    }
    return Generation(**{**values, **changes})


def shown(result):
    """What a reader has to see of it."""
    return result.prompt + result.text.replace("\x1b", "\\x1b")


class Reader(html.parser.HTMLParser):
    """Text of the page, what hangs on it, and whether its tags fit together."""

    EMPTY = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tokens, self.outside, self.tags = [], [], [], []
        self.pre = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if "data-note" in attrs:
            self.tokens.append([attrs["class"].split(), attrs["data-note"], ""])
        self.outside += [attrs[k] for k in ("src", "href", "action") if k in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre += data
            if self.tokens and self.open[-1] == "span":
                self.tokens[-1][2] += data


def test_spans_hold_the_whole_text_and_every_token():
    result = generation()
    found = spans(result, BYTES)
    assert "".join(span.text for span in found) == result.text
    assert [h for span in found for h in span.heads] == result.heads
    assert [p for span in found for p in span.passes] == result.passes
    [wide] = [span for span in found if span.text == "é"]
    assert len(wide.heads) == 2


def test_what_a_stop_string_leaves_of_a_token_is_shown():
    result = dataclasses.replace(generation("abc"), text="abcd")
    assert spans(result, BYTES)[-1].text == "d"
    assert spans(result, BYTES)[-1].heads == ()


def test_the_terminal_shows_the_text_and_is_not_steered_by_it():
    result = generation()
    seen = terminal(result, BYTES)
    assert "\x1b[2J" not in seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    assert plain == shown(result)
    coloured = re.findall(r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m", seen)
    assert len({colour for colour, _ in coloured}) == 3, "heads 2, 3 and 4"
    assert not re.search(r"m[^\x1b]*\n[^\x1b]*\x1b\[0m", seen), "no colour over an end"
    assert "head 4" in terminal_legend([result])


def test_head_one_alone_has_no_colour():
    result = generation("abc", heads=[1, 1, 1])
    assert "\x1b" not in terminal(result, BYTES)


def test_the_page_holds_every_token_and_asks_for_nothing():
    result = generation(deviations=3)
    text = page([result, generation("zweiter")], BYTES, 'runs/a & "b"')
    reader = Reader(text)
    assert reader.open == []
    assert reader.outside == [] and "http" not in text and "url(" not in text
    assert "script" not in reader.tags
    assert reader.pre == shown(result) + result.prompt + "zweiter"
    first = next(token for token in reader.tokens if token[2])
    assert first == [["t", "h1", "p"], "head 1; forward pass 1", "i"]
    [wide] = [token for token in reader.tokens if token[2] == "é"]
    assert wide[1].startswith("heads ")
    for head in (2, 3, 4):  # head 1 has the colour of the page
        assert f".h{head} {{ background: light-dark(" in text
    assert "color-scheme: light dark" in text
    assert "not the exact choice</dt><dd>3 tokens" in text
    assert "runs/a &amp; &quot;b&quot;" in text


@pytest.mark.packages
def test_the_page_is_shown_by_a_browser(tmp_path):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                        "google-chrome", "firefox"))), None
    )  # fmt: skip
    if browser is None or "firefox" in browser:
        pytest.skip("no Chromium")
    path = tmp_path / "page.html"
    path.write_text(page([generation()], BYTES, "a page"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert Reader(done.stdout).pre == shown(generation())
