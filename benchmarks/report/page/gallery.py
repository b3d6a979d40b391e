"""Which patches each method keeps, picture by picture.

Shapes: G grid side; places are those of the flattened G x G grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.page.markup import table, text

_SIDE = 96
"""Of a drawn picture, in CSS pixels."""


def section(result: dict[str, Any]) -> str:
    """A row a picture: as it is, then with every patch veiled that a method drops."""
    shown, methods, grid = result["shown"], list(result["kept"]), result["grid"]
    rows = []
    for number, each in enumerate(shown):
        pixels = f"patches-{number}"
        whole = f'<image id="{pixels}" href="data:image/png;base64,{each["png"]}" width="{_SIDE}" height="{_SIDE}"/>'
        cells = [_drawn(whole, each["name"])]
        for method in methods:
            veil = _veil(result["kept"][method][number], grid)
            cells.append(_drawn(f'<use href="#{pixels}"/>{veil}', f"{each['name']}: what {method} keeps"))
        rows.append([text(each["name"]), *cells])
    rate = result["conditions"]["keep"]
    caption = f"The {100 * rate:.0f} % of the patches that each method keeps; the rest is veiled"
    return table(("", "picture", *map(text, methods)), rows, caption, "kept patches by picture and method")


def _drawn(inside: str, label: str) -> str:
    return (
        f'<svg class="patches" viewBox="0 0 {_SIDE} {_SIDE}" width="{_SIDE}" height="{_SIDE}" role="img" '
        f'aria-label="{text(label)}">{inside}</svg>'
    )


def _veil(kept: Sequence[int], grid: int) -> str:
    """One path over every patch that is not kept."""
    side = _SIDE / grid
    dropped = sorted(set(range(grid**2)) - set(kept))
    boxes = "".join(
        f"M{side * (place % grid):g} {side * (place // grid):g}h{side:g}v{side:g}h-{side:g}z" for place in dropped
    )
    return f'<path class="veil" d="{boxes}"/>'
