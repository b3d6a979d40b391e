"""Photographs of the report page for the README: on a desk by day, on a phone by night."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks import RESULTS, ROOT
from benchmarks.report.browser import Browser
from benchmarks.report.page import build

FOLDER = ROOT / "docs"
SHOTS = {
    "report": {"width": 1200, "height": 1000},
    "report-phone": {"width": 390, "height": 844, "phone": True, "dark": True},
}
"""Pictures by name, and the window of each."""
_START = "document.getElementById('threshold-section').scrollIntoView({behavior: 'instant'})"


def main(arguments: Sequence[str] = ()) -> int:
    """Write docs/report.png and docs/report-phone.png, each from where the slider's section begins."""
    command = argparse.ArgumentParser(prog="python -m benchmarks screenshots", description=main.__doc__)
    command.add_argument("--folder", type=Path, default=FOLDER, help="where to (default docs)")
    said = command.parse_args(arguments)
    said.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "report.html"
        page.write_text(build(RESULTS))
        for name, window in SHOTS.items():
            tab, file = browser.open(page, **window), said.folder / f"{name}.png"
            tab.value(_START)
            tab.screenshot(file)
            with Image.open(file) as image:
                small = image.convert("RGB").quantize(128)  # a page has few colours
            small.save(file, optimize=True)
            print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
    return 0
