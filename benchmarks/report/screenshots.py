"""Screenshots of the report page for the README: a desktop window in light colours, a phone in dark ones."""

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
"""The window of each screenshot, by file name."""
_START = "document.getElementById('threshold-section').scrollIntoView({behavior: 'instant'})"


def main(arguments: Sequence[str] = ()) -> int:
    """Write docs/report.png and docs/report-phone.png, both scrolled to the section with the slider."""
    command = argparse.ArgumentParser(prog="python -m benchmarks screenshots", description=main.__doc__)
    command.add_argument("--folder", type=Path, default=FOLDER, help="where to (default docs)")
    args = command.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "report.html"
        page.write_text(build(RESULTS))
        for name, window in SHOTS.items():
            tab, file = browser.open(page, **window), args.folder / f"{name}.png"
            tab.value(_START)
            tab.screenshot(file)
            with Image.open(file) as image:
                small = image.convert("RGB").quantize(128)  # a page has few colours
            small.save(file, optimize=True)
            print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
    return 0
