"""Run a sweep: measure what is not measured yet, choose within a budget, and write the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.conditions import conditions
from common.data.lookup import Labelled
from common.evaluate.accuracy import paired_difference
from common.evaluate.points import Point
from common.evaluate.prompts import prompts_hash, value_hash
from common.evaluate.sweep.budget import best_within, check_budget
from common.evaluate.sweep.journal import Journal, Record
from common.evaluate.sweep.measure import ROUNDS, WHOLE, Measure, Pictures, unpacked
from common.evaluate.sweep.report import markdown, write
from common.evaluate.sweep.rows import rows


def sweep(
    measure: Measure, points: Sequence[Point], sources: Sequence[Labelled], journal: Journal, budget: float | None
) -> dict[str, Any]:
    """Measure the points, write the files beside the journal, print the table, and return the result.

    sources: the split on which the points are compared; with a budget, also the one on which the best is reported.
    A folder's results hold all of its points, those of earlier calls too.
    ValueError: no setting is within the budget.
    """
    compared = sources[0]
    if budget is not None:
        check_budget(measure.model, points, journal.of(compared.split), budget)
    records = measured(measure, points, compared, journal)
    choice = None
    if budget is not None:
        best, *_ = best_within(records, budget)
        reported = measured(measure, list(dict.fromkeys([WHOLE, best])), sources[1], journal)
        choice = _choice(budget, records, reported, sources)
    result = {
        "title": f"{measure.model.name} on {journal.identity['data']}, {compared.split}",
        "choice": choice,
        "note": _note(measure, compared, records[WHOLE]["samples"], choice is not None),
        "timed": list(measure.timed),
        "rows": rows(records),
        "conditions": conditions(compared.scale, **journal.identity, budget=budget),
    }
    paths = write(journal.file.parent, result)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(Markdown(markdown(result)))
    console.print(f"wrote {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
    return result


def measured(measure: Measure, points: Sequence[Point], data: Labelled, journal: Journal) -> Mapping[Point, Record]:
    """The records of a split, after every one of ``points`` was measured.

    ValueError: the folder has records of other pictures or prompts under this split's name.
    """
    version = value_hash([data.version, data.class_names, prompts_hash(measure.templates, data.class_names)])
    known = journal.of(data.split)
    if any(record["pictures"] != version for record in known.values()):
        raise ValueError(
            f"{journal.file.parent} holds a sweep over other pictures or prompts of {data.split}; name another folder "
            "by --out, or delete it"
        )
    todo = [point for point in points if point not in known]
    pictures = Pictures(measure.model, data, measure.settings)
    with _progress(f"{data.split}: settings", len(points), len(points) - len(todo)) as (watch, done):
        for point in todo:
            record = measure(point, pictures, lambda batches, point=point: watch(point.name, batches))
            journal.add(data.split, point, {"pictures": version, **record})
            done()
    return journal.of(data.split)


@contextmanager
def _progress(
    what: str, total: int, done: int
) -> Iterator[tuple[Callable[[str, Iterable[Any]], Iterator[Any]], Callable[[], None]]]:
    """A bar of points with the time that is left, and one of the batches of the present point."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        points, batches = progress.add_task(what, total=total, completed=done), progress.add_task("", total=None)

        def watch(name: str, items: Iterable[Any]) -> Iterator[Any]:
            progress.reset(batches, description=f"  {name}", total=None)
            count = 0
            for item in items:
                yield item
                count += 1
                progress.update(batches, completed=count)
            progress.update(batches, total=count)

        yield watch, lambda: progress.advance(points)


def _choice(
    budget: float, compared: Mapping[Point, Record], reported: Mapping[Point, Record], sources: Sequence[Labelled]
) -> str:
    """What is best within a budget, among how many, and how it does on pictures that had no part in the choice."""
    best, count, fitting = best_within(compared, budget)
    here, whole = reported[best], reported[WHOLE]
    text = (
        f"Within {budget:g} GMACs a picture, {best.name} is the most accurate of {fitting} settings, {count} compared: "
        f"{_percent(compared[best])} on {sources[0].split}. On {sources[1].split}, which had no part in the choice "
        f"({here['samples']:,} pictures): {_percent(here)} at {here['gmacs']:.4g} GMACs"
    )
    if best != WHOLE:
        correct = (unpacked(record["correct"], record["samples"]) for record in (here, whole))
        middle, low, high = (100 * value for value in paired_difference(*correct))
        text += (
            f", {middle:+.1f} [{low:+.1f}, {high:+.1f}] points against the whole model ({_percent(whole)} at "
            f"{whole['gmacs']:.4g} GMACs)"
        )
    return f"{text}."


def _percent(record: Record) -> str:
    low, high = record["interval"]
    return f"{100 * record['top1']:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"


def _note(measure: Measure, data: Labelled, samples: int, chosen: bool) -> str:
    sentences = [
        f"Zero-shot top-1 among {len(data.class_names):,} names, {samples:,} pictures of {data.split}; brackets: "
        "Wilson's 95 % interval, and of a difference the paired bootstrap over pictures. GMACs are 10⁹ multiply-adds "
        "of the image tower for a picture, with attention's products and, as many papers count, without them. A keep "
        "rate with several places holds at each of them."
    ]
    if measure.timed:
        sentences.append(
            f"Speed: medians of {ROUNDS} rounds, × is the ratio to the whole model in the same rounds. Memory: what "
            f"one pass of {max(measure.timed)} pictures takes beside weights and pictures."
        )
    if not chosen:
        sentences.append(
            f"The best of many settings on {data.split} looks better than it is; --budget chooses on one split and "
            "reports on another."
        )
    return " ".join(sentences)
