"""The three methods on one frontier: accuracy against multiply-adds and against time, alone and composed.

Shapes: M pictures, C classes, E joint dim.

A method's operating points are its best settings on ``val`` (keep rate, threshold of early exit) within each of a few
budgets of multiply-adds; ``test`` gives their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cells import Result, points
from benchmarks.embedded import PART, STUDENT, TEACHER, batches, models
from benchmarks.timing import seconds
from benchmarks.together.compositions import DENSE, TRAINED, WAVE, Family, families
from benchmarks.waveclip.levels import Levels
from common.clip import CLIP
from common.conditions import conditions, digest
from common.contrastive import scaled_cosines
from common.data.embedded.module import EmbeddedDataModule
from common.deploy.early_exit import threshold_for
from common.deploy.paths import path_costs
from common.evaluate.accuracy import paired_difference, wilson_interval
from common.stages import stages_of
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower
from waveclip.reduced import ReducedWaveTower

BUDGETS = (0.4, 0.6, 0.8, 1.0)
"""Of the dense teacher's multiply-adds."""
PICTURES = {"val": 2000, "test": 4000}
"""The first ones of each split: more would take longer than three minutes."""
TIMED, BATCH, ROUNDS = 256, 64, 3
SHOWN = 0.12
"""How far below the dense teacher the figure reaches; what lies lower is named at its edge."""
Key = tuple[str, float | None]
"""A family's name and a keep rate: one model."""
Texts = Mapping[CLIP, tuple[Tensor, Tensor]]
"""Class embeddings [C,E] and the multiplier of the cosines, of each CLIP."""


@dataclass(frozen=True)
class Point:
    """An operating point, and what ``val`` says of it. threshold: of the margin; a model without levels ignores it."""

    keep: float | None
    threshold: float
    accuracy: float
    gmacs: float


def run(smoke: bool = False) -> dict[str, Any]:
    """Every method's operating points with accuracy, GMACs and time, and what each composition adds.

    smoke: one keep rate, two budgets, 250 pictures. ValueError: no weights of teacher or WaveCLIP.
    """
    teacher, wave = models()
    every = families(teacher, wave, smoke)
    missing = TRAINED.keys() - {of.name for of in every}
    known = (TEACHER, STUDENT, *(path for name, (path, _) in TRAINED.items() if name not in missing))
    pictures, budgets, rounds = (
        (dict.fromkeys(PICTURES, 250), BUDGETS[1:3], 1) if smoke else (PICTURES, BUDGETS, ROUNDS)
    )
    stated = conditions(
        "embedded",
        seeds=1,
        dtype="float32",
        batch=BATCH,
        rounds=rounds,
        weights={path.name: digest(path) for path in known},
        chosen_on="val, its first pictures",
        reported_on="test, its first pictures, read once",
    )
    texts, size = class_texts(every, EmbeddedDataModule().class_prompts), teacher.image_tower.image_size
    costs = {(of.name, keep): path_gmacs(model, size) for of in every for keep, model in of.models.items()}
    (dense,) = costs[DENSE, None]
    val = observe(every, batches("val", pictures["val"]), texts)
    points = {of.name: operating_points(of, val, costs, [dense * share for share in budgets]) for of in every}
    chosen = {(name, point.keep) for name, those in points.items() for point in those}
    test = observe(every, batches("test", pictures["test"]), texts, chosen)
    rows = [measured(of, point, test[of.name, point.keep], costs) for of in every for point in points[of.name]]
    set_against_rivals(rows, every, val, test, costs)
    shown = torch.cat([batch["image"] for batch in batches("test", PART)])[: BATCH if smoke else TIMED]
    for one, taken in zip(rows, timed(rows, every, shown, texts, rounds), strict=True):
        one["seconds"] = taken
    mark_dominated(rows)
    return {
        "name": "frontier",
        "conditions": stated,
        "pictures": pictures,
        "budgets": list(budgets),
        "rows": rows,
        "missing": {name: command for name, (_, command) in TRAINED.items() if name in missing},
    }


def path_gmacs(model: nn.Module, image_size: int) -> list[float]:
    """GMACs of one picture that leaves a model after each of its levels."""
    return [macs.gmacs for macs in path_costs(stages_of(model), image_size)]


def class_texts(every: Iterable[Family], prompts: list[str]) -> Texts:
    """What the families' CLIPs make of one prompt a class."""
    return {clip: (embed_prompts(clip, prompts), clip.logit_scale.exp()) for clip in {of.clip for of in every}}


@torch.no_grad()
def observe(
    every: Sequence[Family],
    loader: Iterable[Mapping[str, Any]],
    texts: Texts,
    chosen: Iterable[Key] | None = None,
) -> dict[Key, Levels]:
    """What every model says about the pictures at each of its levels; a model without levels has one.

    chosen: the models to ask, the dense teacher among them; None: all.
    """
    gate = MarginGate(0.0)
    asked = {(of.name, keep): (model, *texts[of.clip]) for of in every for keep, model in of.models.items()}
    asked = {key: found for key, found in asked.items() if chosen is None or key in chosen}
    margins: dict[Key, list[Tensor]] = {key: [] for key in asked}
    right: dict[Key, list[Tensor]] = {key: [] for key in asked}
    for batch in track(loader, "evaluating"):
        for key, (model, classes, scale) in asked.items():
            images = batch["image"]
            has_levels = isinstance(model, WaveTower | ReducedWaveTower)
            levels = model(images) if has_levels else (model.encode_image(images),)
            scores = torch.stack([scaled_cosines(F.normalize(z, dim=-1), classes, scale) for z in levels]).softmax(-1)
            margins[key].append(gate.confidence(scores[:-1]))
            right[key].append(scores.argmax(-1) == batch["label"])
    found = {key: (torch.cat(margins[key], dim=1), torch.cat(right[key], dim=1)) for key in asked}
    return {key: Levels(*seen, found[DENSE, None][1][0]) for key, seen in found.items()}


def best_within(
    family: Family, seen: Mapping[Key, Levels], costs: Mapping[Key, Sequence[float]], budget: float
) -> Point | None:
    """The setting of the highest accuracy whose mean cost is at most ``budget`` GMACs; None where none is.

    Only models in ``seen`` count. Thresholds are tried in steps of 1 % of what they let through; of equal accuracies
    the first, cheapest one stays.
    """
    best = None
    for keep in family.models:
        if (levels := seen.get((family.name, keep))) is None:
            continue
        asked = levels.margin.flatten()
        for percent in range(101 if len(asked) else 1):
            threshold = threshold_for(asked, percent / 100) if len(asked) else 0.0
            correct, shares = levels.at(threshold)
            point = Point(keep, threshold, float(correct.double().mean()), _mean(costs[family.name, keep], shares))
            if point.gmacs <= budget * (1 + 1e-9) and (best is None or point.accuracy > best.accuracy):
                best = point
    return best


def _mean(costs: Sequence[float], shares: Sequence[float]) -> float:
    return sum(cost * share for cost, share in zip(costs, shares, strict=True))


def operating_points(
    family: Family, val: Mapping[Key, Levels], costs: Mapping[Key, Sequence[float]], budgets: Sequence[float]
) -> list[Point]:
    """The best settings within each budget, each of them once, cheapest first; all of a model that has no setting."""
    if family.models.keys() == {None} and len(costs[family.name, None]) == 1:
        budgets = costs[family.name, None]
    found = (best_within(family, val, costs, budget) for budget in budgets)
    return sorted({point for point in found if point is not None}, key=lambda point: point.gmacs)


def measured(family: Family, point: Point, test: Levels, costs: Mapping[Key, Sequence[float]]) -> dict[str, Any]:
    """A row: what ``test`` says of an operating point. refined: the share that went past the first level."""
    correct, shares = test.at(point.threshold)
    return {
        "method": family.name,
        "composed": family.composed,
        "keep": point.keep,
        "threshold": point.threshold,
        "refined": 1 - shares[0] if len(shares) > 1 else None,
        "gmacs": _mean(costs[family.name, point.keep], shares),
        "val": {"accuracy": point.accuracy, "gmacs": point.gmacs},
        "accuracy": float(correct.double().mean()),
        "interval": wilson_interval(int(correct.sum()), len(correct)),
        "rival": None,
    }


def set_against_rivals(
    rows: Sequence[dict[str, Any]],
    every: Sequence[Family],
    val: Mapping[Key, Levels],
    test: Mapping[Key, Levels],
    costs: Mapping[Key, Sequence[float]],
) -> None:
    """Give every composed row its rival: the best that a method alone does at no more GMACs, chosen on ``val``.

    Early exit alone takes any threshold there, so that a composition gains nothing by falling between two budgets;
    the other methods the settings that were read on ``test``. The difference on ``test`` is paired.
    """
    tried = {key: levels for key, levels in val.items() if key in test}
    for one in (row for row in rows if row["composed"]):
        simple = [of for of in every if not of.composed]
        points = {of.name: best_within(of, tried, costs, one["val"]["gmacs"]) for of in simple}
        name, rival = max(
            ((name, point) for name, point in points.items() if point is not None), key=lambda item: item[1].accuracy
        )
        theirs, _ = test[name, rival.keep].at(rival.threshold)
        ours, _ = test[one["method"], one["keep"]].at(one["threshold"])
        one["rival"] = {"method": name, "keep": rival.keep, "difference": paired_difference(ours, theirs)}


def timed(
    rows: Sequence[dict[str, Any]], every: Sequence[Family], images: Tensor, texts: Texts, rounds: int
) -> list[float]:
    """Seconds a picture of every row, images [M,3,S,S] in batches to the scores of all classes; early exit for real."""
    by_name, parts = {of.name: of for of in every}, images.split(BATCH)
    calls: dict[int, Callable[[], object]] = {}
    for number, one in enumerate(rows):
        family = by_name[one["method"]]
        model, (classes, scale) = family.models[one["keep"]], texts[family.clip]
        if isinstance(model, WaveTower | ReducedWaveTower):
            call = ProgressiveClassifier(model, classes, scale, MarginGate(one["threshold"])).eval()
        else:
            call = _Classifier(model, classes, scale)
        calls[number] = lambda call=call: [call(part) for part in parts]
    return [taken / len(images) for taken in seconds(calls, rounds).values()]


@dataclass(frozen=True)
class _Classifier:
    model: nn.Module
    classes: Tensor
    scale: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return scaled_cosines(self.model.encode_image(images), self.classes, self.scale).softmax(-1)


def mark_dominated(rows: Sequence[dict[str, Any]]) -> None:
    """Say of every row in which costs ("gmacs", "seconds") another row is as accurate for no more and not its equal."""
    for one in rows:
        one["dominated"] = [
            cost
            for cost in ("gmacs", "seconds")
            if any(
                other[cost] <= one[cost]
                and other["accuracy"] >= one["accuracy"]
                and (other[cost], other["accuracy"]) != (one[cost], one["accuracy"])
                for other in rows
            )
        ]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    blocks = [_table(result), *verdicts(result["rows"])]
    blocks += [f"{name}: not run; `{command}`." for name, command in result["missing"].items()]
    return {"md": "\n\n".join([*blocks, _reading(result)]) + "\n", "figures": {"frontier": _draw(result)}}


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| method | keep | refined | GMACs | of dense | accuracy [95 %] | against the best alone, no dearer "
        "| ms a picture | dominated in |",
        "|---|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    dense = result["rows"][0]
    for one in result["rows"]:
        low, high = one["interval"]
        rival = one["rival"]
        against = f"{points(rival['difference'])} ({_said(rival)})" if rival else "–"
        lines.append(
            f"| {one['method']} | {_share(one['keep'])} | {_share(one['refined'])} | {one['gmacs']:.4f} "
            f"| {100 * one['gmacs'] / dense['gmacs']:.0f} % "
            f"| {100 * one['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] | {against} "
            f"| {1000 * one['seconds']:.3f} (×{dense['seconds'] / one['seconds']:.2f}) "
            f"| {', '.join({'gmacs': 'GMACs', 'seconds': 'time'}[cost] for cost in one['dominated']) or '–'} |"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _said(rival: dict[str, Any]) -> str:
    return rival["method"] + ("" if rival["keep"] is None else f", {_share(rival['keep'])}")


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a composition: whether it pays in multiply-adds, by paired intervals, and what is left of it in time."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows if row["composed"]):
        points = [row for row in rows if row["method"] == name]
        above = sum(row["rival"]["difference"][1] > 0 for row in points)
        below = sum(row["rival"]["difference"][2] < 0 for row in points)
        quick = sum("seconds" not in row["dominated"] for row in points)
        said = "pays" if above else "does not pay"
        lines.append(
            f"**{name} {said}** in multiply-adds: at {above} of {len(points)} operating points it is clearly above the "
            f"best method alone that costs no more, at {below} clearly below. In measured time it is on "
            f"the frontier at {quick} of them: no other row is as accurate and no slower."
        )
    return lines


def _reading(result: dict[str, Any]) -> str:
    stated, pictures = result["conditions"], result["pictures"]
    return (
        f"Embedded scale, the first {pictures['test']:,} pictures of test; each row is the setting with the highest "
        f"accuracy on the first {pictures['val']:,} of val within "
        f"{', '.join(f'{100 * share:.0f}' for share in result['budgets'])} % of the dense teacher's multiply-adds "
        "(image tower, attention on both sides). Keep: the patch tokens that stay, of the teacher's from its second "
        "block on, in a composition of WaveCLIP's fine level, whose cached coarse tokens all stay; merging methods "
        "reach that share over several blocks, and EViT adds one token, fused of those that go. Nothing was trained "
        "for a composition. The rank predictor reads the teacher's 36 patches, so it has no place in a level. Not "
        "here: Patch Ranking's prompts, which are tuned for the classes of a task, and for these names none were; "
        "and A-ViT, which masks the tokens that halt, so that its time would not show what it saves. MLIP and the "
        "CLIP beside it were trained for minutes, on their own. Random: one draw of places for all pictures. One "
        "training seed. Time from pixels to class probabilities, × against the dense teacher: batch "
        f"{stated['batch']}, medians of {stated['rounds']} alternating rounds, {stated['dtype']}, {stated['device']}, "
        f"{stated['threads']} threads, torch {stated['torch']}. Dominated: another row is as accurate for no more."
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    floor = 100 * (result["rows"][0]["accuracy"] - SHOWN)
    _draw_against(left, result["rows"], "gmacs", 1000, "million multiply-adds a picture", floor)
    _draw_against(right, result["rows"], "seconds", 1000, "ms a picture, measured", floor)
    left.set(ylabel="top-1, %", ylim=(max(floor, left.get_ylim()[0]), None))
    figure.suptitle(f"embedded scale; hollow: dominated; at the lower edge: accuracies below {floor:.0f} %", fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _draw_against(axes: Axes, rows: Sequence[dict[str, Any]], cost: str, unit: float, label: str, floor: float) -> None:
    """A line a method; one colour for a reducer, dashed where it is composed; hollow where dominated in this cost.

    What lies below ``floor`` %, where the axes end, is named there with its accuracy.
    """
    colours: dict[str, str] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row for row in rows if row["method"] == name), key=lambda row: row[cost])
        xs, ys = [unit * row[cost] for row in points], [100 * row["accuracy"] for row in points]
        colour = colours.setdefault(name.rpartition(" + ")[2], f"C{len(colours)}")
        composed = points[0]["composed"]
        style = {"color": colour, "linestyle": "--" if composed else "-", "marker": "s" if composed else "o"}
        if name in (DENSE, WAVE):
            style |= {"color": "black", "marker": "*" if name == DENSE else "o"}
        axes.plot(xs, ys, markersize=5, linewidth=1.2, label=name, **style)
        hollow = [cost in row["dominated"] for row in points]
        where = {"color": "white", "markersize": 2.5, "marker": style["marker"], "linestyle": "none"}
        axes.plot(
            [x for x, h in zip(xs, hollow, strict=True) if h],
            [y for y, h in zip(ys, hollow, strict=True) if h],
            **where,
        )
        for x, y in ((x, y) for x, y in zip(xs, ys, strict=True) if y < floor):
            axes.plot(x, floor, "v", color=style["color"], markersize=4, clip_on=False)
            edge = {"xytext": (0, 5), "textcoords": "offset points", "rotation": 90, "ha": "center", "fontsize": 6}
            edge |= {"color": style["color"], "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
            axes.annotate(f"{name}: {y:.1f}", (x, floor), **edge)
    axes.set(xlabel=label)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The methods that were not trained."""
    yield from ((f"{method} was not trained", command) for method, command in result["missing"].items())
