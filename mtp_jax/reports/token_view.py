"""Texts with each token in the colour of the head that made it.

They are for terminals, or a page that needs nothing but a browser.
"""

import dataclasses
import html
from collections.abc import Sequence

from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.decode.generation import Generation, totals
from mtp_jax.decode.text_stream import Continuation, token_texts
from mtp_jax.errors import counted
from mtp_jax.reports.printable import printable

_BACK = "\x1b[0m"
# Some of 256 colours; black on each can be read, in light and dark windows.
_TERMINAL = (229, 222, 215, 216, 217, 218, 219, 183, 147, 153, 159, 158, 157, 156)


# CSS of texts; pages that use it have the colours --ink, --paper, --faint, --line.
TOKEN_STYLE = """\
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: .4rem; padding: .8rem; font: .9rem/1.7 ui-monospace, monospace }
.prompt { color: var(--faint) }
.t { position: relative; border-radius: .15rem }
pre .p { box-shadow: -1px 0 var(--faint) }
.t[data-note]:is(:hover, :focus)::after { content: attr(data-note);
  position: absolute; left: 0; top: 1.6em; z-index: 1; white-space: nowrap;
  padding: .1rem .5rem; border-radius: .3rem; background: var(--ink);
  color: var(--paper); font: .8rem/1.5 system-ui, sans-serif }"""


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text, and the tokens that make it: a character may take several."""

    text: str
    heads: tuple[int, ...]
    passes: tuple[int, ...]


def spans(result: Generation, tokenizer: Tokenizer) -> list[Span]:
    """Cuts a continuation into spans, whose texts add up to its text."""
    found, heads, passes, length = [], [], [], 0
    after = Continuation(tokenizer, result.prompt_tokens)
    for text, head, forward in zip(
        token_texts(after, result.tokens), result.heads, result.passes, strict=True
    ):
        heads.append(head)
        passes.append(forward)
        if text:
            found.append(Span(text, tuple(heads), tuple(passes)))
            heads, passes, length = [], [], length + len(text)
    if rest := result.text[length:]:  # of a token that reaches into a stop string
        found.append(Span(rest, (), ()))
    return found


def terminal(result: Generation, tokenizer: Tokenizer) -> str:
    """Prompt and continuation for a terminal; tokens of head 1 have no colour."""
    parts = [printable(result.prompt)]
    for span in spans(result, tokenizer):
        head = max(span.heads, default=1)
        text = printable(span.text)
        parts.append(text if head == 1 else _coloured(text, head))
    return "".join(parts)


def terminal_legend(results: Sequence[Generation]) -> str:
    """A line that shows the colour of each head, and the number of its tokens."""
    counts = _counts(results)
    shown = [f"head 1: {counts.get(1, 0)}"]
    shown += [_coloured(f"head {h}: {counts[h]}", h) for h in sorted(counts) if h > 1]
    return "  ".join(shown)


def page(results: Sequence[Generation], tokenizer: Tokenizer, title: str) -> str:
    """Texts as a HTML page: legend, figures, and a note on every token."""
    heads = max([1, *_counts(results)])
    texts = "\n".join(article(r, tokenizer, i) for i, r in enumerate(results, 1))
    return (
        _PAGE.replace("@TITLE@", html.escape(title))
        .replace("@TOKENS@", TOKEN_STYLE)
        .replace("@COLOURS@", head_styles(heads))
        .replace("@LEGEND@", legend(results, heads))
        .replace("@FIGURES@", _figures(results))
        .replace("@TEXTS@", texts)
    )


def _counts(results: Sequence[Generation]) -> dict[int, int]:
    """The number of tokens of each head."""
    counts: dict[int, int] = {}
    for result in results:
        for head in result.heads:
            counts[head] = counts.get(head, 0) + 1
    return counts


def _coloured(text: str, head: int) -> str:
    colour = _TERMINAL[(head - 2) % len(_TERMINAL)]
    start = f"\x1b[38;5;16;48;5;{colour}m"
    # A colour that is on at the end of a line may fill the rest of the window.
    return "\n".join(f"{start}{line}{_BACK}" if line else "" for line in
                     text.split("\n"))  # fmt: skip


def hue_of(head: int, heads: int) -> int:
    """The hue of a head from 2 on, in degrees: yellow to violet with the distance."""
    return 48 + (head - 2) * (285 - 48) // max(1, heads - 2)


def head_styles(heads: int, within: str = "") -> str:
    """CSS of the colours of heads 2 to n, light or dark.

    Args:
      heads: n.
      within: a selector with a space after it, of the part of a page that it is for.
    """
    return "\n".join(
        f"{within}.h{head} {{ background: light-dark("
        f"hsl({hue} 85% 82%), hsl({hue} 55% 27%)) }}"
        for head in range(2, heads + 1)
        for hue in [hue_of(head, heads)]
    )


def legend(results: Sequence[Generation], heads: int) -> str:
    """HTML items of a list: the colour of each head, and the number of its tokens."""
    counts = _counts(results)
    total = max(1, sum(counts.values()))
    items = []
    for head in range(1, heads + 1):
        count = counts.get(head, 0)
        items.append(
            f'<li><span class="t h{head}">head {head}</span> '
            f"{counted(count, 'token')}, {100 * count / total:.1f}%</li>"
        )
    return "\n".join(items)


def _figures(results: Sequence[Generation]) -> str:
    of_all = totals(results)
    accepted = " ".join(f"{share:.2f}" for share in of_all.accepted_by_head)
    figures = [
        ("texts", f"{len(results)}"),
        ("new tokens", f"{of_all.tokens:.0f}"),
        ("forward passes", f"{of_all.forwards}"),
        ("tokens a forward pass", f"{of_all.tokens_per_forward:.2f}"),
        ("drafts right, from head 2 on", accepted or "none were made"),
        ("tokens a second", f"{of_all.tokens_per_s:.0f}"),
    ]
    deviations = [r.deviations for r in results if r.deviations is not None]
    if deviations:
        figures.append(("not the exact choice", counted(sum(deviations), "token")))
    return "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in figures)


def article(
    result: Generation, tokenizer: Tokenizer, number: int, level: int = 2
) -> str:
    """A text as HTML, with a note on every token, under a heading of this level."""
    accepted = " ".join(f"{share:.2f}" for share in result.accepted_by_head)
    note = (
        f"{counted(len(result.tokens), 'token')}, "
        f"{counted(result.forwards, 'forward pass')}, "
        f"{result.tokens_per_forward:.2f} tokens a pass, ended by {result.finish}"
    ) + (f"; drafts right by head, from head 2 on: {accepted}" if accepted else "")
    parts, last = [], -1
    for span in spans(result, tokenizer):
        begins = " p" if span.passes and span.passes[0] != last else ""
        last = span.passes[-1] if span.passes else last
        head = max(span.heads, default=1)
        parts.append(
            f'<span class="t h{head}{begins}" tabindex="0" '
            f'data-note="{html.escape(_note(span))}">{_escaped(span.text)}</span>'
        )
    return (
        f"<article>\n<h{level}>Text {number}</h{level}>\n<p>{note}</p>\n"
        f'<pre><span class="prompt">{_escaped(result.prompt)}</span>'
        f"{''.join(parts)}</pre>\n</article>"
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _note(span: Span) -> str:
    if not span.heads:
        return "begins a stop string"
    heads = ", ".join(map(str, span.heads))
    passes = ", ".join(map(str, sorted({p + 1 for p in span.passes})))
    several = len(span.heads) > 1
    return f"{'heads' if several else 'head'} {heads}; forward pass {passes}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark;
  --ink: light-dark(#1a1a1a, #ededed); --paper: light-dark(#fcfcfa, #16171a);
  --faint: light-dark(#5c5c5c, #a3a3a3); --line: light-dark(#c9c9c4, #44464d) }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p, dt { color: var(--faint) }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
dd { margin: 0; font-variant-numeric: tabular-nums }
@TOKENS@
@COLOURS@
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p>Every token has the colour of the head that said it first: head 1, or the one that
drafted it. A thin line begins the tokens of a forward pass.</p>
<ul>
@LEGEND@
</ul>
<dl>
@FIGURES@
</dl>
@TEXTS@
</body>
</html>
"""
