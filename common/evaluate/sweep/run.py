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
from common.data.lookup import scale_of
from common.evaluate.accuracy import paired_difference
from common.evaluate.points import Point
from common.evaluate.sweep.budget import best_within, check_budget
from common.evaluate.sweep.journal import Journal, Record
from common.evaluate.sweep.measure import ROUNDS, WHOLE, Measure
from common.evaluate.sweep.pictures import unpacked
from common.evaluate.sweep.report import markdown, write
from common.evaluate.sweep.rows import rows
from common.evaluate.sweep.scoring import Scoring


def sweep(
    measure: Measure, points: Sequence[Point], scorings: Sequence[Scoring], journal: Journal, budget: float | None
) -> dict[str, Any]:
    """Measure the points, write the files beside the journal, print the table, and return the result.

    scorings: of the split on which the points are compared; with a budget, also of the one on which the best is
        reported.
    A folder's results hold all of its points, those of earlier calls too.
    ValueError: no setting is within the budget.
    """
    compared = scorings[0]
    split = compared.pictures.data.split
    if budget is not None:
        check_budget(measure.model, points, journal.of(split), budget, compared.classes)
    records = measured(measure, points, compared, journal)
    choice = None
    if budget is not None:
        best, *_ = best_within(records, budget, compared.column)
        reported = measured(measure, list(dict.fromkeys([WHOLE, best])), scorings[1], journal)
        choice = _choice(budget, records, reported, scorings)
    scale = scale_of(journal.identity["data"], measure.model.image_size)
    result = {
        "title": f"{measure.model.name} on {journal.identity['data']}, {split}",
        "metric": {"column": compared.column, "label": compared.label, "beside": compared.beside},
        "choice": choice,
        "note": _note(measure, compared, records[WHOLE]["samples"], choice is not None),
        "timed": list(measure.timed),
        "rows": rows(records, type(compared)),
        "conditions": conditions(scale, **journal.identity, budget=budget),
    }
    paths = write(journal.file.parent, result)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(Markdown(markdown(result)))
    console.print(f"wrote {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
    return result


def measured(measure: Measure, points: Sequence[Point], scoring: Scoring, journal: Journal) -> Mapping[Point, Record]:
    """The records of a split, after every one of ``points`` was measured.

    ValueError: the folder has records of other pictures or prompts under this split's name.
    """
    version, split = scoring.version, scoring.pictures.data.split
    known = journal.of(split)
    if any(record["pictures"] != version for record in known.values()):
        raise ValueError(
            f"{journal.file.parent} holds a sweep over other pictures or prompts of {split}; name another folder by "
            "--out, or delete it"
        )
    todo = [point for point in points if point not in known]
    with _progress(f"{split}: settings", len(points), len(points) - len(todo)) as (watch, done):
        for point in todo:
            record = measure(point, scoring, lambda batches, point=point: watch(point.name, batches))
            journal.add(split, point, {"pictures": version, **record})
            done()
    return journal.of(split)


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
    budget: float, compared: Mapping[Point, Record], reported: Mapping[Point, Record], scorings: Sequence[Scoring]
) -> str:
    """What is best within a budget, among how many, and how it does on pictures that had no part in the choice."""
    column, (chosen_on, reported_on) = scorings[0].column, (scoring.pictures.data.split for scoring in scorings)
    best, count, fitting = best_within(compared, budget, column)
    here, whole = reported[best], reported[WHOLE]
    text = (
        f"Within {budget:g} GMACs a picture, {best.name} is the best of {fitting} settings by "
        f"{scorings[0].label}, {count} compared: {_percent(compared[best], column)} on {chosen_on}. On {reported_on}, "
        f"which had no part in the choice ({here['samples']:,} pictures): {_percent(here, column)} at "
        f"{here['gmacs']:.4g} GMACs"
    )
    if best != WHOLE:
        correct = (unpacked(record["correct"], record["samples"]) for record in (here, whole))
        middle, low, high = (100 * value for value in paired_difference(*correct))
        text += (
            f", {middle:+.1f} [{low:+.1f}, {high:+.1f}] points against the whole model ({_percent(whole, column)} at "
            f"{whole['gmacs']:.4g} GMACs)"
        )
    return f"{text}."


def _percent(record: Record, column: str) -> str:
    low, high = record["interval"]
    return f"{100 * record[column]:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"


def _note(measure: Measure, scoring: Scoring, samples: int, chosen: bool) -> str:
    sentences = [
        f"{scoring.sentence(samples)}; brackets: Wilson's 95 % interval, and of a difference the paired bootstrap over "
        "pictures. GMACs are 10⁹ multiply-adds of the image tower for a picture, with attention's products and, as "
        "many papers count, without them. A keep rate with several places holds at each of them."
    ]
    if measure.timed:
        sentences.append(
            f"Speed: medians of {ROUNDS} rounds, × is the ratio to the whole model in the same rounds. Memory: what "
            f"one pass of {max(measure.timed)} pictures takes beside weights and pictures."
        )
    if not chosen:
        # A linear probe has no --budget.
        way = "" if scoring.task == "linear-probe" else "; --budget chooses on one split and reports on another"
        sentences.append(f"The best of many settings on {scoring.pictures.data.split} looks better than it is{way}.")
    return " ".join(sentences)
