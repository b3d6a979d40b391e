"""The budget of a sweep: refused at once where no setting is within it, and the best setting within it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from common.evaluate.points import Classes, Point, images_at, mean_macs
from common.evaluate.sweep.journal import Record
from common.evaluate.sweep.measure import WHOLE
from common.models import Model


def check_budget(
    model: Model,
    points: Iterable[Point],
    known: Mapping[Point, Record],
    budget: float,
    classes: Classes | None = None,
) -> None:
    """Count settings before any picture is read, until one is within ``budget`` GMACs a picture.

    known: points that were measured before, with their costs.  classes: see ``images_at``.
    What a threshold costs depends on the pictures: here it is the first level's cost, the least that it can be.
    ValueError: no setting is within the budget, and what the cheapest one costs; or no cost is known.
    """
    costs, reason = _known_costs(known), known.get(WHOLE, {}).get("uncounted", "")
    unknown = {point if point.threshold is None else Point(threshold=0.0) for point in points} - known.keys()
    # Low keep rates come first: one of them is the likeliest to fit, and then the others need no count.
    for point in sorted(unknown, key=lambda point: (point.keep or 1.0, point.name)):
        if min(costs.values(), default=float("inf")) <= _rounded_up(budget):
            return
        exits = () if point.threshold is None else (1.0,)
        try:
            images = images_at(model, point, classes)
            images.to(next(model.images.parameters()).device)  # a reducer's own tables begin on the CPU
            costs[point] = mean_macs(images, model.image_size, exits).gmacs
        except ValueError as error:  # a reducer that cannot work in this model: a line of the sweep's table
            reason = str(error)
    _refuse_above(budget, costs, reason)


def best_within(records: Mapping[Point, Record], budget: float, column: str) -> tuple[Point, int, int]:
    """The point of the highest ``column`` that costs at most ``budget`` GMACs, the cheaper of equal ones.

    Returns it, the number of points that were compared, and the number within the budget.
    ValueError: every point costs more, as thresholds may on these pictures.
    """
    costs = _known_costs(records)
    _refuse_above(budget, costs)
    fitting = [point for point, cost in costs.items() if cost <= _rounded_up(budget)]
    return max(fitting, key=lambda point: (records[point][column], -costs[point])), len(costs), len(fitting)


def _known_costs(records: Mapping[Point, Record]) -> dict[Point, float]:
    """GMACs of the points that have a known cost."""
    return {point: record["gmacs"] for point, record in records.items() if record.get("gmacs") is not None}


def _rounded_up(budget: float) -> float:
    """The budget with room for a cost's last digit."""
    return budget * (1 + 1e-9)


def _refuse_above(budget: float, costs: Mapping[Point, float], reason: str = "") -> None:
    """ValueError: no cost is within the budget, or none is known, for this ``reason``."""
    if not costs:
        raise ValueError(f"--budget {budget:g}: this model's cost is not known: {reason}")
    if min(costs.values()) > _rounded_up(budget):
        raise ValueError(
            f"--budget {budget:g}: the cheapest of {len(costs)} settings costs {min(costs.values()):.4g} GMACs a "
            "picture; give that or more, or settings that cost less"
        )
