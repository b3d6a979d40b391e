"""The section that shows, image by image, which patches each method keeps.

Shapes: G, the side of the grid of patches; a patch is numbered by its place in the flattened G x G grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.page.markup import table, text

_SIDE = 96
"""The side of a drawn image in CSS pixels."""


def section(result: dict[str, Any]) -> str:
    """A row for each image: the image, then for each method the image with its dropped patches veiled."""
    shown, methods, grid = result["shown"], list(result["kept"]), result["grid"]
    rows = []
    for number, image in enumerate(shown):
        pixels, name = f"patches-{number}", image["name"]
        whole = f'<image id="{pixels}" href="data:image/png;base64,{image["png"]}" width="{_SIDE}" height="{_SIDE}"/>'
        cells = [_drawn(whole, name)]
        for method in methods:
            veil = _veil(result["kept"][method][number], grid)
            cells.append(_drawn(f'<use href="#{pixels}"/>{veil}', f"{name}: what {method} keeps"))
        rows.append([text(name), *cells])
    rate = result["conditions"]["keep"]
    caption = f"The {100 * rate:.0f} % of the patches that each method keeps; the rest is veiled"
    return table(("", "picture", *map(text, methods)), rows, caption, "kept patches by picture and method")


def _drawn(inside: str, label: str) -> str:
    return (
        f'<svg class="patches" viewBox="0 0 {_SIDE} {_SIDE}" width="{_SIDE}" height="{_SIDE}" role="img" '
        f'aria-label="{text(label)}">{inside}</svg>'
    )


def _veil(kept: Sequence[int], grid: int) -> str:
    """One path that covers every patch that is not kept."""
    side = _SIDE / grid
    dropped = sorted(set(range(grid**2)) - set(kept))
    boxes = "".join(
        f"M{side * (place % grid):g} {side * (place // grid):g}h{side:g}v{side:g}h-{side:g}z" for place in dropped
    )
    return f'<path class="veil" d="{boxes}"/>'
