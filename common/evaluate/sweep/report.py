"""The results of a sweep as files: CSV, JSON, Markdown, PNG, SVG, and a page with a slider."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.evaluate.sweep.rows import Row
from common.evaluate.sweep.slider import page
from common.paths import written_whole

NAME = "sweep"
"""The name of the files."""


def write(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write all files of a result into ``folder``; returns their paths.

    result: "title" and "note" (texts), "metric" (the main one's "column" and "label", and those "beside" it), "timed"
        (batch sizes), "rows", "choice" (a sentence or None), "conditions".
    """
    rows, figure = result["rows"], draw(result)
    contents: dict[str, Callable[[Path], object]] = {
        "csv": lambda path: path.write_text(as_csv(rows)),
        "json": lambda path: path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
        "md": lambda path: path.write_text(markdown(result)),
        "png": lambda path: figure.savefig(path, format="png", dpi=150),
        "svg": lambda path: figure.savefig(path, format="svg", metadata={"Date": None}),
        "html": lambda path: path.write_text(page(result)),
    }
    paths = []
    for suffix, put in contents.items():
        paths.append(folder / f"{NAME}.{suffix}")
        with written_whole(paths[-1]) as temporary:
            put(temporary)
    return paths


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as comma-separated values; several keep rates in a cell are separated by spaces."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        keep = row["keep"]
        writer.writerow({**row, "keep": " ".join(map(str, keep)) if isinstance(keep, list) else keep})
    return file.getvalue()


def markdown(result: Mapping[str, Any]) -> str:
    """The result as Markdown: the choice, a table of what was measured, what did not run and why, and a note."""
    measured = [row for row in result["rows"] if "samples" in row]
    failed = [row for row in result["rows"] if "samples" not in row]
    timed, metric = result["timed"], result["metric"]
    speeds = [f"images/s, batch {batch}" for batch in timed]
    head = ["reducer", "keep", "place", "threshold", f"{metric['label']}, % [95 %]", "against the whole, points"]
    head += [f"{label}, % [95 %]" for label in metric["beside"]]
    head += ["GMACs", "without attention products", "of the whole", *speeds, *(["memory, MB"] if timed else [])]
    table = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    table += ["| " + " | ".join(_cells(row, timed, metric)) + " |" for row in measured]
    parts = [f"# {result['title']}"]
    parts += [result["choice"]] if result["choice"] else []
    parts += ["\n".join(table)]
    parts += ["Did not run:\n\n" + "\n".join(map(_failure, failed))] if failed else []
    return "\n\n".join([*parts, result["note"]]) + "\n"


def _failure(row: Row) -> str:
    settings = {"keep": ", ".join(f"{keep:g}" for keep in row["keep"] if keep is not None), "place": row["place"]}
    words = "; ".join(f"{name} {value}" for name, value in settings.items() if value)
    return f"- `{row['reducer']}` ({words}): {row['reason']}"


def _cells(row: Row, timed: Sequence[int], metric: Mapping[str, Any]) -> list[str]:
    main = _interval(row, metric["column"], "low", "high")
    points = [row[name] for name in ("difference", "difference_low", "difference_high")]
    middle, low, high = (None if value is None else 100 * value for value in points)
    cells = [row["reducer"], _number(row["keep"], "g"), row["place"] or "–", _number(row["threshold"], "g"), main]
    cells += ["–" if middle is None else f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"]
    cells += [_interval(row, name, f"{name}_low", f"{name}_high") for name in metric["beside"].values()]
    cells += [_number(row[name], ".4g") for name in ("gmacs", "gmacs_paper")]
    cells += ["–" if row["of_whole"] is None else f"{100 * row['of_whole']:.0f} %"]
    for batch in timed:
        speed, faster = row[f"images_per_second_batch_{batch}"], row[f"faster_batch_{batch}"]
        cells.append(f"{speed:.4g} (×{faster:.2f})")
    return cells + ([f"{row['memory_mb']:.3g}"] if timed else [])


def _interval(row: Row, *names: str) -> str:
    middle, low, high = (100 * row[name] for name in names)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(result: Mapping[str, Any]) -> Figure:
    """The main metric against multiply-adds, and against speed where it was measured.

    There is a line for each reducer and place.
    """
    measured = [row for row in result["rows"] if "samples" in row]
    timed, metric = result["timed"], result["metric"]
    axes_of = {"gmacs": "GMACs a picture"} if any(row["gmacs"] is not None for row in measured) else {}
    if timed:
        axes_of[f"faster_batch_{max(timed)}"] = f"speed at batch {max(timed)}, times the whole model's"
    figure = Figure(figsize=(1 + 5.5 * max(1, len(axes_of)), 5), layout="constrained")
    for column, (name, label) in enumerate(axes_of.items()):
        axes = figure.add_subplot(1, len(axes_of), column + 1)
        for number, (line, rows) in enumerate(lines(measured).items()):
            points = [(row[name], 100 * row[metric["column"]]) for row in rows if row[name] is not None]
            style = {"marker": "osv^Dp"[number // 10 % 6], "markersize": 4, "linewidth": 1}
            if line == "whole model":
                style = {"marker": "*", "markersize": 12, "color": "black", "linestyle": "none"}
            axes.plot(*zip(*points, strict=True), label=line, **style)
        axes.set(xlabel=label, ylabel=f"{metric['label']}, %")
        axes.locator_params(axis="x", nbins=6)  # small towers' costs have many digits
        axes.grid(alpha=0.3)
    if axes_of:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.suptitle(result["title"], x=0.01, ha="left")  # the legend is at the right
    return figure


def lines(measured: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by reducer and place, whose points a figure joins."""
    groups: dict[str, list[Row]] = {}
    for row in measured:
        place = f", place {row['place']}" if row["place"] else ""
        groups.setdefault(f"{row['reducer']}{place}", []).append(row)
    return groups
