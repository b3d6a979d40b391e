"""WaveCLIP and its controls on the scenes of shape, from the answers that each training left (benchmarks/protocol.md).

Shapes: S training seeds, M pictures.

Every number is of test; thresholds are chosen on val. Nothing is evaluated here: a table is made in seconds, and can be
made again from the answers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.cells import Result, points, table
from benchmarks.statistics import difference, holm, mean_interval
from benchmarks.training import shapes as trained
from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.costs import cost, exit_costs
from benchmarks.waveclip.saving import ALLOWANCE, Exits, saving
from common.clip import CLIP, load_architecture
from common.conditions import conditions
from waveclip import WaveTower

Known = dict[str, dict[str, list[Answers]]]
"""Answers by family ("shapes-teacher"), split, and seed."""
_ARCHITECTURE = "common/shapes_clip.json"


class Line(NamedTuple):
    """A row of accuracies: a family's level (0: the first, -1: the last), its name and the cost it has."""

    name: str
    family: str
    level: int
    cost: str


LINES = (
    Line("teacher", "shapes-teacher", -1, "dense"),
    Line("teacher, trained on", "shapes-longer", -1, "dense"),
    Line("half-resolution CLIP", "shapes-half", -1, "half"),
    Line("WaveCLIP, coarse level", "shapes-waveclip", 0, "coarse"),
    Line("WaveCLIP, fine level", "shapes-waveclip", -1, "fine"),
    *(
        Line(f"cosine distance alone, {share} % of the teacher's steps, {level}", f"shapes-cosine{share}", place, level)
        for share in trained.COSINE_SHARES
        for level, place in (("coarse", 0), ("fine", -1))
    ),
)


class Contest(NamedTuple):
    """A saving: what exits early, and whose accuracy it has to keep.

    second: the family that a cascade's second step is; None: a WaveCLIP, which refines.
    reference: a family; None: the classifier's own second step.  one_teacher: the reference is seed 0's alone, the
    model that all students were distilled from.
    """

    name: str
    first: str
    second: str | None
    reference: str | None
    one_teacher: bool = False


CONTESTS = (
    Contest("WaveCLIP against its teacher", "shapes-waveclip", None, "shapes-teacher", one_teacher=True),
    Contest("WaveCLIP against the teacher, trained on", "shapes-waveclip", None, "shapes-longer"),
    Contest("WaveCLIP against its own fine level", "shapes-waveclip", None, None),
    Contest(
        "cascade (half-resolution, then teacher) against the teacher", "shapes-half", "shapes-teacher", "shapes-teacher"
    ),
    Contest("cascade with the teacher, trained on, against that", "shapes-half", "shapes-longer", "shapes-longer"),
)


def known() -> Known:
    """The answers of every finished run."""
    families: Known = {}
    for name, runs in trained.FAMILIES:
        paths = [path for path in (trained.file(run.name) for run in runs) if path.is_file()]
        if paths:
            parts = list(map(answers.read, paths))
            families[name] = {split: [part[split] for part in parts] for split in trained.SPLITS}
    return families


def gmacs() -> dict[str, float]:
    """GMACs of one picture in the image tower: the teacher, the half-resolution tower, and both exits of a WaveCLIP."""
    architecture = load_architecture(_ARCHITECTURE)
    clip = CLIP(architecture)
    small = CLIP({**architecture, "vision_cfg": {**architecture["vision_cfg"], "image_size": 24}})
    size = clip.image_tower.image_size
    coarse, fine = exit_costs(WaveTower.from_image_tower(clip.image_tower, levels=1), size)
    costs = {"dense": cost(clip.image_tower, size), "half": cost(small.image_tower, 24), "coarse": coarse, "fine": fine}
    return {name: value.macs.gmacs for name, value in costs.items()}


def run(smoke: bool = False) -> dict[str, Any]:
    """All rows whose trainings are finished. smoke: few resamples."""
    resamples = 20 if smoke else 2000
    families, costs = known(), gmacs()
    return {
        "name": "waveclip-shapes",
        "conditions": conditions("embedded", seeds=len(trained.SEEDS), chosen_on="val", reported_on="test"),
        "gmacs": costs,
        "seeds": {family: len(splits["test"]) for family, splits in families.items()},
        "pictures": next((splits["test"][0].correct.shape[1] for splits in families.values()), 0),
        "rows": rows(families, costs, resamples),
        "savings": savings(families, costs, resamples),
        "curves": curves(families, costs),
    }


def rows(families: Known, costs: dict[str, float], resamples: int) -> list[dict[str, Any]]:
    """Accuracy of every finished line with its interval, and its difference from the teacher, Holm-adjusted."""
    result, p_values = [], {}
    for line in LINES:
        if line.family not in families:
            continue
        right = _right(families, line)
        row: dict[str, Any] = {"row": line.name, "gmacs": costs[line.cost], "seeds": len(right)}
        row["accuracy"] = mean_interval(right, resamples).ends
        if line.family != LINES[0].family and LINES[0].family in families:
            teacher = _right(families, LINES[0])
            # A student's teacher is that of seed 0; a tower of its own training meets the teacher of its seed.
            from_scratch = line.family == "shapes-half" and len(right) == len(teacher)
            gap = difference(right, teacher if from_scratch else teacher[:1], from_scratch, resamples)
            row["difference"], p_values[line.name] = gap.ends, gap.p
        result.append(row)
    adjusted = holm(p_values)
    return [row | ({"p": adjusted[row["row"]]} if row["row"] in adjusted else {}) for row in result]


def _right(families: Known, line: Line) -> np.ndarray:
    """Right answers on test, bool [S,M]."""
    return np.stack([part.correct[line.level] for part in families[line.family]["test"]])


def exits(families: Known, contest: Contest, split: str) -> list[Exits]:
    """A contest's classifier on a split, one a seed; as many seeds as all of its families have."""
    parts = {family: families[family][split] for family in (contest.first, contest.second, contest.reference) if family}
    if contest.one_teacher:
        parts[contest.reference] = parts[contest.reference][:1] * len(parts[contest.first])
    result = []
    for seed in range(min(map(len, parts.values()))):
        first, second = parts[contest.first][seed], parts[contest.second][seed] if contest.second else None
        last = first.last if second is None else second.last
        reference = parts[contest.reference][seed].last if contest.reference else last
        result.append(first.exits(reference) if second is None else first.cascade(second, reference))
    return result


def _costs(contest: Contest, costs: dict[str, float]) -> tuple[float, float]:
    """GMACs of leaving at the first step, and of going through both."""
    if contest.second is None:
        return costs["coarse"], costs["fine"]
    return costs["half"], costs["half"] + costs["dense"]


def _finished(families: Known, contest: Contest) -> bool:
    return all(family in families for family in (contest.first, contest.second, contest.reference) if family)


def savings(families: Known, costs: dict[str, float], resamples: int) -> list[dict[str, Any]]:
    """Every contest whose families are trained: the saving, its interval, and the accuracy difference."""
    result = []
    for contest in filter(lambda contest: _finished(families, contest), CONTESTS):
        val, test = (exits(families, contest, split) for split in trained.SPLITS)
        measured = saving(val, test, _costs(contest, costs), costs["dense"], resamples=resamples)
        result.append(
            {
                "contest": contest.name,
                "seeds": len(test),
                "saved": measured.saved.ends,
                "difference": measured.difference.ends,
                "thresholds": measured.thresholds,
                "refined": measured.refined,
                "chosen": measured.chosen,
            }
        )
    return result


CURVES = {
    "WaveCLIP": CONTESTS[0],
    "cascade of two CLIPs": CONTESTS[3],
    "cascade with the teacher, trained on": CONTESTS[4],
}
"""The early exits that the picture shows."""


def curves(families: Known, costs: dict[str, float]) -> dict[str, list[tuple[float, float]]]:
    """GMACs and accuracy on test, the mean over seeds, when the least confident pictures are refined: by early exit."""
    result = {}
    for name, contest in CURVES.items():
        if not _finished(families, contest):
            continue
        (first, second), tested = _costs(contest, costs), exits(families, contest, "test")
        result[name] = [
            (first + share * (second - first), float(np.mean([_accuracy_at(part, share) for part in tested])))
            for share in np.linspace(0, 1, 21).tolist()
        ]
    return result


def _accuracy_at(part: Exits, share: float) -> float:
    order = np.argsort(part.confidence, kind="stable")
    refined = order[: round(share * len(order))]
    answered = part.first.copy()
    answered[refined] = part.second[refined]
    return float(answered.mean())


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The families with fewer finished seeds than planned."""
    for name, runs in trained.FAMILIES:
        lacking = len(runs) - result["seeds"].get(name, 0)
        if lacking:
            yield f"{lacking} of {len(runs)} runs of {name}", f"make retrain ONLY='{name}-*'"


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if not result["rows"]:
        return {"md": "No training of revision 2 is finished; `make retrain ONLY='shapes-*'` trains.\n", "figures": {}}
    lines = []
    for row in result["rows"]:
        p = f"{row['p']:.3f}" if "p" in row else "–"
        gap = points(row.get("difference"))
        lines.append([row["row"], row["seeds"], _accuracy(row["accuracy"]), gap, p, f"{row['gmacs']:.4f}"])
    head = ["scenes of shape", "seeds", "accuracy [95 %]", "against the teacher", "p, Holm", "GMACs"]
    parts = [table(head, lines)]
    if result["savings"]:
        head = ["saved at the reference's accuracy", "seeds", "saved, % [95 %]", "difference, points", "refined"]
        parts += [table(head, [_saving_cells(row) for row in result["savings"]]), *map(verdict, result["savings"])]
    figures = {"waveclip-shapes": _draw(result)} if result["curves"] else {}
    return {"md": "\n\n".join([*parts, _note(result)]) + "\n", "figures": figures}


def _accuracy(ends: Sequence[float]) -> str:
    middle, low, high = (100 * value for value in ends)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _saving_cells(row: dict[str, Any]) -> list[object]:
    refined = ", ".join(f"{100 * share:.0f} %" for share in row["refined"])
    return [row["contest"], row["seeds"], _accuracy(row["saved"]), points(row["difference"]), refined]


def verdict(row: dict[str, Any]) -> str:
    """What a saving says, in one sentence; with fewer seeds than planned it is no headline."""
    low = row["saved"][1]
    if not row["chosen"]:
        outcome = f"no threshold on val keeps within {100 * ALLOWANCE:.1f} points, so all pictures are refined"
    elif low > 0:
        outcome = f"saves at least {100 * low:.0f} % of the dense tower's multiply-adds"
    else:
        outcome = "no saving shown"
    few = "" if row["seeds"] == len(trained.SEEDS) else f" ({row['seeds']} training seed(s): no headline)"
    return f"{row['contest']}: {outcome}{few}."


def _note(result: dict[str, Any]) -> str:
    return (
        f"Zero-shot on {result['pictures']:,} test pictures of revision 2. Intervals resample training seeds and "
        f"pictures, and a saving's the threshold too: the cheapest whose paired interval on val stays above "
        f"-{100 * ALLOWANCE:.1f} points. A WaveCLIP's teacher is that of seed 0; p is adjusted over the rows. GMACs "
        "count attention on both sides, the image tower's alone; a cascade pays both towers where it goes on."
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in result["curves"].items():
        gmacs, accuracies = zip(*curve, strict=True)
        axes.plot(gmacs, [100 * value for value in accuracies], label=name)
    single = [row for row in result["rows"] if row["row"] in {line.name for line in LINES[:3]}]
    for row in single:
        middle, low, high = (100 * value for value in row["accuracy"])
        axes.errorbar(row["gmacs"], middle, [[middle - low], [high - middle]], fmt="o", capsize=3, label=row["row"])
    axes.set(xlabel="GMACs a picture", ylabel="test top-1, %", title="scenes of shape: early exit and its controls")
    axes.legend()
    return figure
