"""The page of a sweep: a slider sets a budget, and the page shows the best setting within it among all points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).parent / "page" / "page.html"


def page(result: Mapping[str, Any]) -> str:
    """One HTML file for any browser, without a network. result: see ``common.evaluate.sweep.report.write``."""
    shown = {name: result[name] for name in ("rows", "timed", "metric")}
    data = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")
    choice = f"<p>{escape(result['choice'])}</p>" if result["choice"] else ""
    text = _TEMPLATE.read_text()
    words = {name: escape(text) for name, text in (("title", result["title"]), ("note", result["note"]))}
    parts = {**words, "label": escape(result["metric"]["label"]), "choice": choice, "data": data}
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    return text
