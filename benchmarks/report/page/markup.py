"""Small pieces of HTML: escaped text, Markdown, tables, pictures, numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from PIL import Image

TYPES = {".png": "png", ".webp": "webp"}


def text(value: object) -> str:
    """A value as escaped text."""
    return escape(str(value))


def code(command: str) -> str:
    """A command in a code element."""
    return f"<code>{text(command)}</code>"


def scrolling(inside: str, label: str) -> str:
    """A frame for content that may be wider than a phone; arrow keys scroll it."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">{inside}</div>'


def markdown(source: str, label: str) -> str:
    """Markdown as HTML; HTML within it is escaped. label: the subject of its tables, for screen readers."""
    tokens = _markdown().parse(source)
    for token in tokens:
        if token.type == "th_open":
            token.attrSet("scope", "col")
    html = _markdown().renderer.render(tokens, _markdown().options, {})
    opened = f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}"><table>'
    return html.replace("<table>", opened).replace("</table>", "</table></div>")


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str, label: str, numbers: int = 0) -> str:
    """A table of HTML cells; the first column heads the rows.

    caption: HTML.  label: its subject in plain text, for screen readers.  numbers: how many last columns hold numbers.
    """
    first = len(heads) - numbers
    kinds = ["" if place < first else ' class="number"' for place in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = ""
    for start, *others in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        body += f'<tr><th scope="row">{start}</th>{cells}</tr>\n'
    inside = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return scrolling(inside, label)


def figure(path: Path, alt: str) -> str:
    """An image file, embedded in the page. alt: its description."""
    with Image.open(path) as image:
        width, height = image.size
    encoded = base64.b64encode(path.read_bytes()).decode()
    size = f'width="{width}" height="{height}"'
    shown = f'<img src="data:image/{TYPES[path.suffix]};base64,{encoded}" {size} alt="{text(alt)}">'
    return f"<figure>{scrolling(shown, alt)}</figure>"


def conditions(values: dict[str, Any]) -> str:
    """What a result says of how it came about, as a list of terms."""
    terms = "".join(f"<dt>{text(name)}</dt><dd>{text(_in_words(value))}</dd>" for name, value in values.items())
    return f'<dl class="conditions">{terms}</dl>'


def _in_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_in_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
