"""The page put together: papers, slider, other benchmarks, speed, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.__main__ import BENCHMARKS
from benchmarks.page import frontier, gallery, gaps
from benchmarks.page.comparisons import Comparison, compare
from benchmarks.page.markup import code, conditions, figure, markdown, table, text

_HERE, _ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
SPEED = ("speed", "loading")
"""Benchmarks of time alone, which have a section of their own."""
SLIDER, PATCHES = "waveclip-fig1", "patchrank-fig4"
"""Whose results the slider and the gallery of kept patches are made of."""


@dataclass(frozen=True)
class Stored:
    """What is kept of a benchmark: its result, the Markdown and the pictures that were made of it."""

    name: str
    result: dict[str, Any]
    markdown: str
    figures: Sequence[Path]

    @property
    def comparisons(self) -> list[Comparison]:
        """The paper's numbers beside ours."""
        return compare(self.name, self.result)

    @property
    def measured(self) -> bool:
        """Whether it holds a number of ours beside the paper's, where the paper has any."""
        return not self.comparisons or any(each.ours is not None for each in self.comparisons)


@cache
def papers() -> list[dict[str, Any]]:
    """Every table and figure of the three papers, from benchmarks/paper/contents.yaml."""
    return yaml.safe_load((_HERE.parent / "paper" / "contents.yaml").read_text())


@cache
def command(name: str) -> str:
    """What runs a benchmark: its make target, or the module itself."""
    targets = (_ROOT / "Makefile").read_text()
    for target in (f"reproduce-{name}", name):
        if f"\n{target}:" in targets:
            return f"make {target}"
    return f"python -m benchmarks {name}"


def stored(folder: Path) -> dict[str, Stored]:
    """The benchmarks that have a result in ``folder``, by name."""
    found = {}
    for name in BENCHMARKS:
        path = folder / f"{name}.json"
        result = json.loads(path.read_text()) if path.is_file() else {}
        if result.keys() - {"name", "conditions", "missing"}:  # else nothing was measured
            said = path.with_suffix(".md")
            pictures = sorted([*folder.glob(f"{name}.png"), *folder.glob(f"{name}-*.png")])  # not those of name0
            found[name] = Stored(name, result, said.read_text(), pictures)
    return found


def build(folder: Path) -> str:
    """The whole page from a folder of results; what has none there says so, with its command."""
    found = stored(folder)
    of_papers = {item["benchmark"] for paper in papers() for item in paper["items"] if "benchmark" in item}
    others = [name for name in BENCHMARKS if name not in of_papers and name not in SPEED]
    sections = {
        "glance": ("At a glance", _glance(found)),
        "threshold-section": ("Turn the threshold", _of(found, SLIDER, frontier.section)),
        **{_slug(paper["paper"]): (paper["paper"], _paper(paper, found)) for paper in papers()},
        "patches": ("Which patches stay", _of(found, PATCHES, gallery.section)),
        "beyond": ("Beyond the papers", "".join(_article(name, BENCHMARKS[name], found) for name in others)),
        "speed-section": ("Speed", "".join(_article(name, BENCHMARKS[name], found) for name in SPEED)),
        "not-run": ("What was not run", _not_run(found)),
    }
    links = "".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, (title, _) in sections.items())
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}" tabindex="-1">{text(title)}</h2>\n{inside}</section>\n'
        for key, (title, inside) in sections.items()
    )
    parts = {"style": (_HERE / "page.css").read_text(), "script": (_HERE / "page.js").read_text()}
    parts |= {"links": links, "body": body}
    page = (_HERE / "page.html").read_text()
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)
    return page


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _of(found: dict[str, Stored], name: str, section: Any) -> str:
    """A section made of one benchmark's result, or that it was not run."""
    inside = section(found[name].result) if name in found else None
    return _missing(name) if inside is None else inside


def _missing(name: str) -> str:
    return f'<p class="missing">Not run: {code(command(name))}</p>'


def _glance(found: dict[str, Stored]) -> str:
    """How much of the papers there is, and how to read it."""
    items = [item for paper in papers() for item in paper["items"] if "benchmark" in item]
    known = [found[item["benchmark"]] for item in items if item["benchmark"] in found]
    run = [of for of in known if of.measured]
    numbers = [each for of in known for each in of.comparisons]
    ours = [each for each in numbers if each.ours is not None]
    alike = sum(each.same for each in ours)
    figures = {
        "tables and figures that measure something were run": f"{len(run)} of {len(items)}",
        "comparisons with what the papers print have a number of ours": f"{len(ours)} of {len(numbers)}",
        "of these at the paper's own scale": str(alike),
    }
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    return (
        f'<dl class="tiles">{tiles}</dl>\n'
        "<p><strong>Two scales, never mixed.</strong> Costs are those of the papers' architectures at 224 px and "
        "above. Accuracies at paper scale need ImageNet, YFCC15M or GPUs; where those were missing, the method was "
        "trained and tested on a small benchmark of emoji on backgrounds. Such a number shows a direction, so no "
        "difference is taken between it and the paper's: it says <em>other scale</em>.</p>\n"
        "<p>GMACs are 10<sup>9</sup> multiply-adds, what these papers call GFLOPs. Each heading below names the "
        "command that makes its numbers anew.</p>"
    )


def _paper(paper: dict[str, Any], found: dict[str, Stored]) -> str:
    """A paper's contents, then each table and figure that was run."""
    rows = []
    for item in paper["items"]:
        name = item.get("benchmark")
        title = f'<a href="#{name}">{text(item["item"])}</a>' if name in found else text(item["item"])
        rows.append([title, text(item["about"]), _state(item, found)])
    caption = f"{text(paper['source'])}: every table and figure"
    heads = ("", "what it shows", "here")
    articles = [
        _article(item["benchmark"], f"{item['item']}: {item['about']}", found)
        for item in paper["items"]
        if item.get("benchmark") in found
    ]
    return table(heads, rows, caption, f"contents of {paper['paper']}") + "".join(articles)


def _state(item: dict[str, Any], found: dict[str, Stored]) -> str:
    if "why" in item:
        made_by = f": {code(item['command'])}" if "command" in item else ""
        return f"not here: {text(item['why'])}{made_by}"
    made_by = command(item["benchmark"])
    if item["benchmark"] not in found:
        return f"not run: {code(made_by)}"
    return code(made_by) if found[item["benchmark"]].measured else f"not run: {code(item.get('command', made_by))}"


def _article(name: str, title: str, found: dict[str, Stored]) -> str:
    """One benchmark: the paper's numbers beside ours, its figures, all that it measured, its conditions."""
    head = f'<article><h3 id="{name}" tabindex="-1">{text(title)}</h3>'
    if name not in found:
        return f"{head}{_missing(name)}</article>\n"
    of = found[name]
    stated = of.result.get("conditions", {})
    parts = [head, f'<p class="made">{code(command(name))}, scale: {text(stated.get("scale", "–"))}</p>']
    compared = of.comparisons and of.measured
    if compared:
        rows = [[text(cell) for cell in each.cells()] for each in of.comparisons]
        heads = ("", "paper", "ours", "difference")
        caption = f"{len(rows)} comparisons with what the paper prints"
        parts.append(table(heads, rows, caption, f"{title}: paper and ours", numbers=3))
    parts += [figure(path, f"{title} ({path.stem})") for path in of.figures]
    opened = "" if compared else " open"
    parts.append(
        f"<details{opened}><summary>All that was measured</summary>{markdown(of.markdown, title)}</details>"
        f"<details><summary>Conditions of the run</summary>{conditions(stated)}</details></article>\n"
    )
    return "\n".join(parts)


def _not_run(found: dict[str, Stored]) -> str:
    """Benchmarks without a result, parts of the papers that no benchmark stands for, numbers that are missing."""
    every = [(paper["paper"], item) for paper in papers() for item in paper["items"]]
    of_papers = {item["benchmark"]: item for _, item in every if "benchmark" in item}
    titles = BENCHMARKS | {name: f"{paper}, {item['item']}" for paper, item in every if (name := item.get("benchmark"))}
    rows: list[tuple[str, str, str | None]] = []
    for name in BENCHMARKS:
        made_by = command(name)
        if name not in found:
            title = f"{titles[name]}: {of_papers[name]['about']}" if name in of_papers else titles[name]
            rows.append((title, "no result yet", made_by))
            continue
        item, of = of_papers.get(name, {}), found[name]
        missing = [
            *gaps.of_the_paper(of.comparisons, item.get("command", made_by)),
            *gaps.untrained(name, of.result, item.get("train", made_by)),
        ]
        rows += [(titles[name], why, how) for why, how in missing]
    rows += [(f"{paper}, {item['item']}", item["why"], item.get("command")) for paper, item in every if "why" in item]
    if not rows:
        return "<p>Everything was run.</p>"
    cells = [[text(what), text(why), code(how) if how else "–"] for what, why, how in rows]
    return table(("what", "why", "command"), cells, "What has no number of ours", "what was not run")
