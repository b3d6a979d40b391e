"""Assembles the page: papers, slider, other benchmarks, speed, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.cells import ELSEWHERE, Comparison
from benchmarks.registry import ABSENT, BENCHMARKS, PAPERS, Benchmark, benchmark
from benchmarks.report.page import gallery, slider
from benchmarks.report.page.markup import code, conditions, figure, markdown, table, text

_HERE = Path(__file__).parent
SPEED = ("speed", "loading")
"""Benchmarks that measure only time; they have their own section."""
SLIDER, PATCHES = "waveclip-fig1", "patchrank-fig4"
"""The benchmarks behind the slider and behind the gallery of kept patches."""


@dataclass(frozen=True)
class Stored:
    """A benchmark's stored result, with its Markdown and its figures; where it has several, all of their Markdown."""

    benchmark: Benchmark
    result: dict[str, Any]
    markdown: str
    figures: Sequence[Path]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The paper's numbers beside ours."""
        return self.benchmark.compare(self.result)

    @property
    def measured(self) -> bool:
        """Whether any of the paper's numbers has one of ours beside it; true where the paper prints none."""
        return not self.comparisons or any(number.ours is not None for number in self.comparisons)


Results = Mapping[str, Stored]
"""Stored results by benchmark name."""


def stored(folder: Path) -> dict[str, Stored]:
    """The benchmarks that have a result in ``folder``, by name."""
    results = {}
    for entry in BENCHMARKS:
        paths = entry.files(folder)
        result = json.loads(paths[0].read_text()) if paths else {}
        if result.keys() - {"name", "conditions", "missing"}:  # otherwise it holds no measurement
            pictures = sorted([*folder.glob(f"{entry.name}.png"), *folder.glob(f"{entry.name}-*.png")])
            written = "\n".join(path.with_suffix(".md").read_text() for path in paths)
            results[entry.name] = Stored(entry, result, written, pictures)
    return results


def build(folder: Path) -> str:
    """The whole page from a folder of results. A benchmark without one is listed as not run, with its command."""
    results = stored(folder)
    others = [entry for entry in BENCHMARKS if entry.paper is None and entry.name not in SPEED]
    speed = [benchmark(name) for name in SPEED]
    sections = {
        "glance": ("At a glance", _glance(results)),
        "threshold-section": ("Turn the threshold", _made_of(results, SLIDER, slider.section)),
        **{name.lower().replace(" ", "-"): (name, paper(name, results)) for name in PAPERS},
        "patches": ("Which patches stay", _made_of(results, PATCHES, gallery.section)),
        "beyond": ("Beyond the papers", "".join(_article(entry, results) for entry in others)),
        "speed-section": ("Speed", "".join(_article(entry, results) for entry in speed)),
        "not-run": ("What was not run", _not_run(results)),
    }
    return page(sections)


def page(sections: Mapping[str, tuple[str, str]]) -> str:
    """The page of sections: {id: (title, HTML)}."""
    links = "".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, (title, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}" tabindex="-1">{text(title)}</h2>\n{inside}</section>\n'
        for key, (title, inside) in sections.items()
    )
    parts = {"style": (_HERE / "page.css").read_text(), "script": (_HERE / "page.js").read_text()}
    parts |= {"links": links, "body": body}
    whole = (_HERE / "page.html").read_text()
    for name, part in parts.items():
        whole = whole.replace(f"<!-- {name} -->", part)
    return whole


def _made_of(results: Results, name: str, section: Any) -> str:
    """A section made from one benchmark's result, or a line that it was not run."""
    inside = section(results[name].result) if name in results else None
    return _missing(benchmark(name)) if inside is None else inside


def _missing(entry: Benchmark) -> str:
    return f'<p class="missing">Not run: {code(entry.command)}</p>'


def _glance(results: Results) -> str:
    """Counts of what was run, and how to read the numbers."""
    papers = [entry for entry in BENCHMARKS if entry.paper is not None]
    known = [results[entry.name] for entry in papers if entry.name in results]
    run = [result for result in known if result.measured]
    printed = [comparison for result in known for comparison in result.comparisons]
    ours = [comparison for comparison in printed if comparison.ours is not None]
    counts = {
        "tables and figures that measure something were run": f"{len(run)} of {len(papers)}",
        "comparisons with what the papers print have a number of ours": f"{len(ours)} of {len(printed)}",
        "of these at the paper's own scale": str(sum(comparison.same for comparison in ours)),
    }
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in counts.items())
    return (
        f'<dl class="tiles">{tiles}</dl>\n'
        "<p><strong>Two scales, never mixed.</strong> Costs are those of the papers' architectures at 224 px and "
        "above. Accuracies at paper scale need ImageNet, YFCC15M or GPUs; where those were missing, the method was "
        "trained and tested on a small benchmark of emoji on backgrounds. Such a number shows a direction, so no "
        "difference is taken between it and the paper's: it says <em>other scale</em>.</p>\n"
        "<p>GMACs are 10<sup>9</sup> multiply-adds, what these papers call GFLOPs. Each heading below names the "
        "command that makes its numbers anew.</p>"
    )


def paper(name: str, results: Results) -> str:
    """A paper's table of contents, then each table and figure that was run."""
    entries = [entry for entry in BENCHMARKS if entry.paper == name]
    rows = []
    for entry in entries:
        title = f'<a href="#{entry.name}">{text(entry.item)}</a>' if entry.name in results else text(entry.item)
        rows.append([title, text(entry.about), _state(entry, results)])
    absent = [entry for entry in ABSENT if entry.paper == name]
    rows += [[text(entry.item), text(entry.about), f"not here: {text(entry.why)}"] for entry in absent]
    caption = f"{text(PAPERS[name])}: every table and figure"
    contents = table(("", "what it shows", "here"), rows, caption, f"contents of {name}")
    return contents + "".join(_article(entry, results) for entry in entries if entry.name in results)


def _state(entry: Benchmark, results: Results) -> str:
    if entry.name not in results:
        return f"not run: {code(entry.command)}"
    return code(entry.command) if results[entry.name].measured else f"not run: {code(entry.fill or entry.command)}"


def _article(entry: Benchmark, results: Results) -> str:
    """One benchmark: the paper's numbers beside ours, its figures, its whole table, its conditions."""
    title = entry.about if entry.item is None else f"{entry.item}: {entry.about}"
    head = f'<article><h3 id="{entry.name}" tabindex="-1">{text(title)}</h3>'
    if entry.name not in results:
        return f"{head}{_missing(entry)}</article>\n"
    stored = results[entry.name]
    run = stored.result.get("conditions", {})
    parts = [head, f'<p class="made">{code(entry.command)}, scale: {text(run.get("scale", "–"))}</p>']
    compared = stored.comparisons and stored.measured
    if compared:
        rows = [[text(cell) for cell in comparison.cells()] for comparison in stored.comparisons]
        heads = ("", "paper", "ours", "difference")
        caption = f"{len(rows)} comparisons with what the paper prints"
        parts.append(table(heads, rows, caption, f"{title}: paper and ours", numbers=3))
    parts += [figure(path, f"{title} ({path.stem})") for path in stored.figures]
    state = "" if compared else " open"
    parts.append(
        f"<details{state}><summary>All that was measured</summary>{markdown(stored.markdown, title)}</details>"
        f"<details><summary>Conditions of the run</summary>{conditions(run)}</details></article>\n"
    )
    return "\n".join(parts)


def _not_run(results: Results) -> str:
    """Benchmarks without a result, missing numbers, and tables and figures of the papers without a benchmark."""
    rows: list[tuple[str, str, str | None]] = []
    for entry in BENCHMARKS:
        if entry.name not in results:
            title = entry.title if entry.paper is None else f"{entry.title}: {entry.about}"
            rows.append((title, "no result yet", entry.command))
            continue
        stored = results[entry.name]
        missing = [*at_paper_scale(stored.comparisons, entry.fill or entry.command), *entry.missing(stored.result)]
        rows += [(entry.title, why, command) for why, command in missing]
    rows += [(f"{entry.paper}, {entry.item}", entry.why, None) for entry in ABSENT]
    cells = [[text(what), text(why), code(command) if command else "–"] for what, why, command in rows]
    return table(("what", "why", "command"), cells, "What has no number of ours", "what was not run")


def at_paper_scale(comparisons: Sequence[Comparison], fill: str) -> Iterator[tuple[str, str | None]]:
    """How many printed numbers need the paper's data and size, and how many belong to methods outside this suite.

    fill: the command for the former. Missing embedded numbers are listed by ``Benchmark.missing``.
    """
    missing = [comparison for comparison in comparisons if comparison.ours is None and comparison.same]
    foreign = [comparison for comparison in missing if comparison.elsewhere]
    if len(missing) > len(foreign):
        yield f"{len(missing) - len(foreign)} of its numbers need the paper's data and size", fill
    if foreign:
        methods = ", ".join(name for name in ELSEWHERE if any(entry.what.startswith(name) for entry in foreign))
        yield f"{len(foreign)} of its numbers are of methods that are not part of this suite: {methods}", None
