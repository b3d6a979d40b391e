"""The section with the slider: it moves the threshold, and the page shows accuracy, cost and exits at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.page.markup import text

GROUPS = {
    "both": "both levels right",
    "fine alone": "the fine level alone",
    "coarse alone": "the coarse level alone",
    "neither": "neither",
}
START = 0.264
"""The slider starts at this share of refined images, that of WAVECLIP-mid."""
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 70, 428, 14, 236
"""The width of a drawing in its own units, and the edges of the rectangle between its axes.

On the left there is room for the axis' label and for ticks such as "20,000" beside it.
"""


@dataclass(frozen=True)
class Axis:
    """Maps the values ``low`` to ``high`` to the coordinates ``first`` to ``last`` of a drawing."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within the axis."""
        rough = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(rough))
        step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * place for place in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def __str__(self) -> str:
        return f"{self.low} {self.high} {self.first} {self.last}"


def section(result: dict[str, Any]) -> str | None:
    """The slider with its readings, two drawings and the example images; None for a result without a sweep."""
    if "sweep" not in result:
        return None
    sweep, pictures, dense = result["sweep"], result["pictures"], result["teacher"]
    share = [refined / pictures for refined in sweep["refined"]]
    start = min(range(len(share)), key=lambda place: abs(share[place] - START))
    data = {key: result[key] for key in ("sweep", "pictures", "teacher", "examples")}
    packed = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    readings = {
        "stopped": 'stop at the coarse level: <span id="stopped-count"></span>',
        "refined": 'go on to the fine level: <span id="refined-count"></span>',
        "accuracy": "named rightly",
        "gmacs": "mean GMACs a picture",
        "saved": "saved against the dense teacher",
    }
    shown = "".join(f'<div><dt>{name}</dt><dd id="{key}">–</dd></div>' for key, name in readings.items())
    return (
        "<p>The embedded WaveCLIP looks at a coarse picture first. Where the likeliest name leads the second by at "
        "least the threshold, it stops; the others are refined from the cache. "
        f"Every number is of {pictures:,} test pictures.</p>\n"
        '<noscript><p class="missing">The slider needs JavaScript; Figure 1 below has the same frontier.</p></noscript>'
        '<div class="knob"><label for="threshold">Threshold of the margin: '
        '<output id="shown" for="threshold">–</output></label>\n'
        f'<input id="threshold" type="range" min="0" max="{len(share) - 1}" step="1" value="{start}" '
        'autocomplete="off" aria-describedby="keys">\n'
        '<p id="keys" class="made">Arrow keys move it by one step, Page Up and Page Down by twenty, Home and End to '
        "its ends.</p></div>\n"
        f'<dl class="tiles">{shown}</dl>\n<div class="drawings">'
        f"{_curve(sweep, pictures, dense)}{_histogram(result['margins'])}</div>\n"
        f'<h3>Which pictures stop where</h3>\n<p id="counted"></p><ul class="examples">{_examples(result["examples"])}'
        f'</ul>\n<script type="application/json" id="frontier-data">{packed}</script>'
    )


def _curve(sweep: dict[str, Sequence[float]], pictures: int, dense: dict[str, float]) -> str:
    """Accuracy against GMACs, with the teacher's point and the point that the slider moves."""
    right = [100 * count / pictures for count in sweep["right"]]
    values = [*right, 100 * dense["accuracy"]]
    spread = max(values) - min(values)
    x = Axis(0, 1.08 * max(*sweep["gmacs"], dense["gmacs"]), _LEFT, _RIGHT)
    y = Axis(min(values) - 0.15 * spread, max(values) + 0.15 * spread, _BOTTOM, _TOP)
    line = " ".join(f"{x.at(cost):.1f},{y.at(share):.1f}" for cost, share in zip(sweep["gmacs"], right, strict=True))
    cx, cy = x.at(dense["gmacs"]), y.at(100 * dense["accuracy"])
    inside = (
        f'<polyline class="curve" points="{line}"/>'
        f'<path class="dense" d="M{cx:.1f} {cy - 6:.1f}l6 6-6 6-6-6z"/>'
        f'<text x="{cx:.1f}" y="{cy - 11:.1f}" text-anchor="end">dense teacher</text>'
        '<line id="across" class="cross"/><line id="down" class="cross"/><circle id="point" r="6"/>'
    )
    label = "Accuracy against mean GMACs over all thresholds; the point is the threshold's"
    return _drawing("curve", x, y, inside, "GMACs a picture", "top-1, %", label)


def _histogram(margins: dict[str, list[int]]) -> str:
    """Images by margin, stacked by which level is right; a veil covers those below the threshold."""
    totals = [sum(column) for column in zip(*margins.values(), strict=True)]
    x, y = Axis(0, 1, _LEFT, _RIGHT), Axis(0, 1.05 * max(totals), _BOTTOM, _TOP)
    width, parts = (_RIGHT - _LEFT) / len(totals), []
    bottom = [0] * len(totals)
    for group, counts in margins.items():
        for place, count in enumerate(counts):
            if count:
                high, low = y.at(bottom[place] + count), y.at(bottom[place])
                size = f'width="{width - 0.6:.2f}" height="{low - high:.2f}"'
                parts.append(
                    f'<rect class="{_class(group)}" x="{x.at(place / len(totals)):.2f}" y="{high:.2f}" {size}/>'
                )
            bottom[place] += count
    parts.append(f'<rect id="veil" x="{_LEFT}" y="{_TOP}" width="0" height="{_BOTTOM - _TOP}"/>')
    parts.append(f'<line id="edge" class="cross" y1="{_TOP}" y2="{_BOTTOM}"/>')
    label = "Pictures by coarse margin and by which level is right; those below the threshold go on"
    keys = "".join(f'<li><span class="key {_class(group)}"></span>{text(name)}</li>' for group, name in GROUPS.items())
    drawn = _drawing("histogram", x, y, "".join(parts), "margin at the coarse level", "pictures", label)
    return f'<div>{drawn}<ul class="legend">{keys}</ul></div>'


def _class(group: str) -> str:
    return "group-" + group.replace(" ", "-")


def _drawing(name: str, x: Axis, y: Axis, inside: str, under: str, beside: str, label: str) -> str:
    """An SVG with axes of round values around ``inside``. label: the text for screen readers."""
    grid = [
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y.at(v):.1f}" y2="{y.at(v):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y.at(v) + 4:.1f}" text-anchor="end">{v:,.10g}</text>'
        for v in y.ticks()
    ]
    grid += [
        f'<text class="tick" x="{x.at(v):.1f}" y="253" text-anchor="middle">{round(v, 10):,.10g}</text>'
        for v in x.ticks()
    ]
    named = (
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="272" text-anchor="middle">{text(under)}</text>'
        f'<text x="12" y="125" text-anchor="middle" transform="rotate(-90 12 125)">{text(beside)}</text>'
    )
    return (
        f'<svg id="{name}" viewBox="0 0 {_WIDTH} 280" role="img" aria-label="{text(label)}" data-x="{x}" '
        f'data-y="{y}">{"".join(grid)}{named}{inside}</svg>'
    )


def _examples(examples: Sequence[dict[str, Any]]) -> str:
    """A list of images with their margins; the script fills in where each exits, and its answer."""
    return "".join(
        f'<li><img src="{text(example["image"])}" width="96" height="96" alt="{text(example["name"])}">'
        f'<span class="name">{text(example["name"])}</span><span class="stop"></span><span class="answer"></span>'
        f'<span class="margin">margin {example["margin"]:.2f}</span></li>'
        for example in examples
    )
