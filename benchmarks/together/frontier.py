"""The three methods on one frontier: accuracy against multiply-adds and against time, alone and composed.

Shapes: M images, L levels of a model (1 without early exit), C classes, E joint dim.

A method's operating points are its best settings on ``val`` within budgets of multiply-adds, measured on ``test``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import read_log
from benchmarks.cells import Result, accuracy, accuracy_of, points, table
from benchmarks.embedded import LOGGED, MODELS, PART, REVISION, batches, models, prompts
from benchmarks.patchrank.methods import REVISION as REDUCERS
from benchmarks.patchrank.methods import remark
from benchmarks.together.compositions import DENSE, TRAINED, WAVE, Family, families
from benchmarks.waveclip.observed import Observed
from common.adaptive import path_costs, probabilities
from common.clip import CLIP
from common.conditions import conditions, digest
from common.contrastive import scaled_cosines
from common.early_exit import threshold_for
from common.evaluate.accuracy import paired_difference
from common.stages import stages_of
from common.timing import seconds
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower
from waveclip.reduced import ReducedWaveTower

BUDGETS = (0.4, 0.6, 0.8, 1.0)
"""Shares of the dense teacher's multiply-adds."""
PICTURES = {"val": 2000, "test": 4000}
"""How many of the first images of each split: more would take longer than three minutes."""
TIMED, BATCH, ROUNDS = 256, 64, 3
SHOWN = 0.12
"""How far below the dense teacher the figure reaches; lower points are named at its edge."""
Key = tuple[str, float | None]
"""A method's name and a keep rate: one model."""
Texts = Mapping[CLIP, tuple[Tensor, Tensor]]
"""Class embeddings [C,E] and the multiplier of the cosines, of each CLIP."""


@dataclass(frozen=True)
class OperatingPoint:
    """A method's setting, with its accuracy and GMACs on ``val``. threshold: of the margin, unused without levels."""

    keep: float | None
    threshold: float
    accuracy: float
    gmacs: float


def run(smoke: bool = False) -> dict[str, Any]:
    """Every method's operating points with accuracy, GMACs and time, and what each composition adds.

    smoke: one keep rate, two budgets, 250 pictures. ValueError: no weights of teacher or WaveCLIP.
    """
    teacher, wave = models()
    methods = families(teacher, wave, smoke)
    missing = TRAINED.keys() - {method.name for method in methods}
    weights = (*MODELS[REVISION], *(path for name, (path, _) in TRAINED.items() if name not in missing))
    if not smoke:
        read_log.record("frontier", LOGGED[REVISION], weights)
    few = (dict.fromkeys(PICTURES, 250), BUDGETS[1:3], 1)
    pictures, budgets, rounds = few if smoke else (PICTURES, BUDGETS, ROUNDS)
    setting = {"dtype": "float32", "batch": BATCH, "rounds": rounds, "reducers": REDUCERS, "names": len(prompts())}
    run_conditions = conditions(
        "embedded",
        seeds=1,
        weights={path.name: digest(path) for path in weights},
        **{"chosen_on": "val, its first pictures", "reported_on": "test, its first pictures"},
        test_reads=max(read_log.reads(path, LOGGED[REVISION]) for path in weights),
        **setting,
    )
    timed = torch.cat([batch["image"] for batch in batches("test", PART)])[: BATCH if smoke else TIMED]
    splits = [batches(split, pictures[split]) for split in ("val", "test")]
    rows = measure(methods, *splits, prompts(), budgets, timed, rounds)
    return {
        "name": "frontier",
        "conditions": run_conditions,
        "pictures": pictures,
        "budgets": list(budgets),
        "rows": rows,
        "missing": {name: command for name, (_, command) in TRAINED.items() if name in missing},
    }


def measure(
    methods: Sequence[Family],
    val: Iterable[Mapping[str, Any]],
    test: Iterable[Mapping[str, Any]],
    prompts: list[str],
    budgets: Sequence[float],
    timed: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for every method's best setting on ``val`` within each budget, with its numbers on ``test`` and its time.

    methods: the dense teacher first.  prompts: one a class.  timed: the images that are timed [M,3,S,S].
    """
    texts, size = class_texts(methods, prompts), timed.shape[-1]
    costs = {(m.name, keep): path_gmacs(model, size) for m in methods for keep, model in m.models.items()}
    # 1. On val, the best setting of each method within each budget.
    on_val = observe_all(methods, val, texts)
    limits = [costs[DENSE, None][0] * share for share in budgets]
    chosen = [(method, point) for method in methods for point in operating_points(method, on_val, costs, limits)]
    # 2. On test, the numbers of those settings alone.
    keys = {(method.name, point.keep) for method, point in chosen}
    on_test = observe_all(methods, test, texts, keys)
    rows = [table_row(method, point, on_test[method.name, point.keep], costs) for method, point in chosen]
    # 3. Each composition against the best method alone, then all rows by the clock.
    set_against_rivals(rows, methods, on_val, on_test, costs)
    for row, duration in zip(rows, seconds_per_image(rows, methods, timed, texts, rounds), strict=True):
        row["seconds"] = duration
    mark_dominated(rows)
    return rows


def path_gmacs(model: nn.Module, image_size: int) -> list[float]:
    """GMACs of one image that exits at each level of a model [L]."""
    return [macs.gmacs for macs in path_costs(stages_of(model), image_size)]


def class_texts(methods: Iterable[Family], prompts: list[str]) -> Texts:
    """Class embeddings by each CLIP among the methods. prompts: one a class."""
    clips = {method.clip for method in methods}
    return {clip: (embed_prompts(clip, prompts), clip.logit_scale.exp()) for clip in clips}


@torch.no_grad()
def observe_all(
    methods: Sequence[Family],
    loader: Iterable[Mapping[str, Any]],
    texts: Texts,
    chosen: Iterable[Key] | None = None,
) -> dict[Key, Observed]:
    """Every model's answers at each of its levels, in one pass over the images.

    chosen: the models to evaluate, the dense teacher among them; None: all.
    """
    gate = MarginGate(0.0)
    evaluated = {
        (method.name, keep): (model, *texts[method.clip])
        for method in methods
        for keep, model in method.models.items()
        if chosen is None or (method.name, keep) in chosen
    }
    margins: dict[Key, list[Tensor]] = {key: [] for key in evaluated}
    right: dict[Key, list[Tensor]] = {key: [] for key in evaluated}
    for batch in track(loader, "evaluating"):
        for key, (model, classes, scale) in evaluated.items():
            has_levels = isinstance(model, WaveTower | ReducedWaveTower)
            levels = model(batch["image"]) if has_levels else (model.encode_image(batch["image"]),)
            scores = torch.stack([scaled_cosines(F.normalize(z, dim=-1), classes, scale) for z in levels]).softmax(-1)
            margins[key].append(gate.confidence(scores[:-1]))
            right[key].append(scores.argmax(-1) == batch["label"])
    correct = {key: torch.cat(parts, dim=1) for key, parts in right.items()}
    teacher = correct[DENSE, None][0]
    return {key: Observed(torch.cat(margins[key], dim=1), correct[key], teacher) for key in evaluated}


def best_within(
    method: Family, observed: Mapping[Key, Observed], costs: Mapping[Key, Sequence[float]], budget: float
) -> OperatingPoint | None:
    """The setting of the highest accuracy whose mean cost is at most ``budget`` GMACs; None: every setting costs more.

    Only models in ``observed`` count. Thresholds are tried in steps of 1 % of the answers that they refine; of equal
    accuracies the cheapest is taken.
    """
    best = None
    for keep in method.models:
        if (answers := observed.get((method.name, keep))) is None:
            continue
        margins = answers.margin.flatten()
        for percent in range(101 if len(margins) else 1):
            threshold = threshold_for(margins, percent / 100) if len(margins) else 0.0
            correct, shares = answers.at(threshold)
            gmacs = _mean(costs[method.name, keep], shares)
            point = OperatingPoint(keep, threshold, float(correct.double().mean()), gmacs)
            if point.gmacs <= budget * (1 + 1e-9) and (best is None or point.accuracy > best.accuracy):
                best = point
    return best


def _mean(costs: Sequence[float], shares: Sequence[float]) -> float:
    return sum(cost * share for cost, share in zip(costs, shares, strict=True))


def operating_points(
    method: Family, val: Mapping[Key, Observed], costs: Mapping[Key, Sequence[float]], budgets: Sequence[float]
) -> list[OperatingPoint]:
    """The best settings within each budget, each once, cheapest first. A model without a setting has one point."""
    if method.models.keys() == {None} and len(costs[method.name, None]) == 1:
        budgets = costs[method.name, None]
    best = (best_within(method, val, costs, budget) for budget in budgets)
    return sorted({point for point in best if point is not None}, key=lambda point: point.gmacs)


def table_row(
    method: Family, point: OperatingPoint, test: Observed, costs: Mapping[Key, Sequence[float]]
) -> dict[str, Any]:
    """An operating point with its numbers on ``test``. refined: the share of images that go past the first level."""
    correct, shares = test.at(point.threshold)
    return {
        "method": method.name,
        "composed": method.composed,
        "keep": point.keep,
        "threshold": point.threshold,
        "refined": 1 - shares[0] if len(shares) > 1 else None,
        "gmacs": _mean(costs[method.name, point.keep], shares),
        "val": {"accuracy": point.accuracy, "gmacs": point.gmacs},
        **accuracy_of(correct),
        "rival": None,
    }


def set_against_rivals(
    rows: Sequence[dict[str, Any]],
    methods: Sequence[Family],
    val: Mapping[Key, Observed],
    test: Mapping[Key, Observed],
    costs: Mapping[Key, Sequence[float]],
) -> None:
    """Give every composed row its rival: the best method alone that costs no more GMACs, both chosen on ``val``.

    Early exit alone may take any threshold, so that a composition gains nothing by falling between two budgets. The
    other methods take the settings that were evaluated on ``test``. The difference on ``test`` is paired.
    """
    evaluated = {key: answers for key, answers in val.items() if key in test}
    for row in (row for row in rows if row["composed"]):
        alone = [method for method in methods if not method.composed]
        best = {method.name: best_within(method, evaluated, costs, row["val"]["gmacs"]) for method in alone}
        within = [(name, point) for name, point in best.items() if point is not None]
        name, rival = max(within, key=lambda item: item[1].accuracy)
        theirs, _ = test[name, rival.keep].at(rival.threshold)
        ours, _ = test[row["method"], row["keep"]].at(row["threshold"])
        row["rival"] = {"method": name, "keep": rival.keep, "difference": paired_difference(ours, theirs)}


def seconds_per_image(
    rows: Sequence[dict[str, Any]], methods: Sequence[Family], images: Tensor, texts: Texts, rounds: int
) -> list[float]:
    """Measured seconds of every row, from images [M,3,S,S] to class probabilities, with the real early exit."""
    by_name, parts = {method.name: method for method in methods}, images.split(BATCH)
    calls: dict[int, Callable[[], object]] = {}
    for number, row in enumerate(rows):
        method = by_name[row["method"]]
        model, (classes, scale) = method.models[row["keep"]], texts[method.clip]
        if isinstance(model, WaveTower | ReducedWaveTower):
            call = ProgressiveClassifier(model, classes, scale, MarginGate(row["threshold"])).eval()
        else:
            call = partial(probabilities, model, classes=classes, scale=scale)
        calls[number] = lambda call=call: [call(part) for part in parts]
    return [duration / len(images) for duration in seconds(calls, rounds).values()]


def mark_dominated(rows: Sequence[dict[str, Any]]) -> None:
    """For each row, list the costs ("gmacs", "seconds") in which another row dominates it."""
    for row in rows:
        row["dominated"] = [
            cost
            for cost in ("gmacs", "seconds")
            if any(
                other[cost] <= row[cost]
                and other["accuracy"] >= row["accuracy"]
                and (other[cost], other["accuracy"]) != (row[cost], row["accuracy"])
                for other in rows
            )
        ]


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    blocks = [rows_table(result["rows"]), *verdicts(result["rows"])]
    blocks += [f"{name}: not run; `{command}`." for name, command in result["missing"].items()]
    return {"md": "\n\n".join([*blocks, _note(result)]) + "\n", "figures": {"frontier": _draw(result)}}


def rows_table(results: Sequence[dict[str, Any]]) -> str:
    """The rows of ``measure`` as a Markdown table."""
    head = ["method", "keep", "refined", "GMACs", "of dense", "accuracy [95 %]"]
    head += ["against the best alone, no dearer", "ms a picture", "dominated in"]
    dense, rows = results[0], []
    for row in results:
        rival = row["rival"]
        rows.append(
            [
                row["method"],
                _share(row["keep"]),
                _share(row["refined"]),
                f"{row['gmacs']:.4f}",
                f"{100 * row['gmacs'] / dense['gmacs']:.0f} %",
                accuracy(row["accuracy"], row["interval"]),
                f"{points(rival['difference'])} ({_setting(rival)})" if rival else "–",
                f"{1000 * row['seconds']:.3f} (×{dense['seconds'] / row['seconds']:.2f})",
                ", ".join({"gmacs": "GMACs", "seconds": "time"}[cost] for cost in row["dominated"]) or "–",
            ]
        )
    return table(head, rows, left=(0, 6, 8))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _setting(rival: dict[str, Any]) -> str:
    return rival["method"] + ("" if rival["keep"] is None else f", {_share(rival['keep'])}")


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a composition: whether it pays in multiply-adds, by paired intervals, and in measured time."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows if row["composed"]):
        composed = [row for row in rows if row["method"] == name]
        above = sum(row["rival"]["difference"][1] > 0 for row in composed)
        below = sum(row["rival"]["difference"][2] < 0 for row in composed)
        quick = sum("seconds" not in row["dominated"] for row in composed)
        lines.append(
            f"**{name} {'pays' if above else 'does not pay'}** in multiply-adds: at {above} of {len(composed)} "
            f"operating points it is clearly above the best method alone that costs no more, at {below} clearly below. "
            f"In measured time it is on the frontier at {quick} of them: no other row is as accurate and no slower."
        )
    return lines


def _note(result: dict[str, Any]) -> str:
    run, pictures = result["conditions"], result["pictures"]
    shapes = "names" in run  # stored since the scenes are those of shape
    shown = f"{run['names']} names on scenes of shape" if shapes else "revision 1, which measures colours"
    reads = f" Test was read {run['test_reads']} times with these models." if shapes else ""
    return (
        f"Embedded scale, {shown}; the first {pictures['test']:,} pictures of test. Each row is the setting with the "
        f"highest accuracy on the first {pictures['val']:,} of val within "
        f"{', '.join(f'{100 * share:.0f}' for share in result['budgets'])} % of the dense teacher's multiply-adds "
        "(image tower, attention on both sides). Keep: the patch tokens that stay, of the teacher's from its second "
        "block on, in a composition of WaveCLIP's fine level, whose cached coarse tokens all stay; merging methods "
        "reach that share over several blocks, and EViT adds one token, fused of those that go. Nothing was trained "
        "for a composition. The rank predictor reads the teacher's 36 patches, so it has no place in a level. Not "
        "here: Patch Ranking's prompts, which are tuned for the classes of a task, and for these names none were; "
        "and A-ViT, which masks the tokens that halt, so that its time would not show what it saves. MLIP and the "
        "CLIP beside it were trained for minutes, on their own. Random: one draw of places for all pictures. One "
        f"training seed. Time from pixels to class probabilities, × against the dense teacher: batch {run['batch']}, "
        f"medians of {run['rounds']} alternating rounds, {run['dtype']}, {run['device']}, {run['threads']} threads, "
        f"torch {run['torch']}. Dominated: another row is as accurate for no more.{reads}{remark(run)}"
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    floor = 100 * (result["rows"][0]["accuracy"] - SHOWN)
    _draw_against(left, result["rows"], "gmacs", 1000, "million multiply-adds a picture", floor)
    _draw_against(right, result["rows"], "seconds", 1000, "ms a picture, measured", floor)
    left.set(ylabel="top-1, %", ylim=(max(floor, left.get_ylim()[0]), None))
    figure.suptitle(f"embedded scale; hollow: dominated; at the lower edge: accuracies below {floor:.0f} %", fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def _draw_against(axes: Axes, rows: Sequence[dict[str, Any]], cost: str, unit: float, label: str, floor: float) -> None:
    """A line a method: one colour a reducer, black for a whole model, dashed for a composition, hollow where dominated.

    A point below ``floor`` %, where the axes end, is named there with its accuracy.
    """
    colours: dict[str, str] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        line = sorted((row for row in rows if row["method"] == name), key=lambda row: row[cost])
        xs, ys = [unit * row[cost] for row in line], [100 * row["accuracy"] for row in line]
        model, _, reducer = name.rpartition(" + ")
        colour = colours.setdefault(reducer, f"C{len(colours)}") if model else "black"
        composed = line[0]["composed"]
        style = {"color": colour, "linestyle": "--" if composed else "-", "marker": "s" if composed else "o"}
        if not model:
            style["marker"] = {DENSE: "*", WAVE: "o"}.get(name, "Dv"[name == "MLIP"])
        axes.plot(xs, ys, markersize=5, linewidth=1.2, label=name, **style)
        hollow = [(x, y) for x, y, row in zip(xs, ys, line, strict=True) if cost in row["dominated"]]
        inside = {"color": "white", "markersize": 2.5, "marker": style["marker"], "linestyle": "none"}
        axes.plot([x for x, _ in hollow], [y for _, y in hollow], **inside)
        for x, y in ((x, y) for x, y in zip(xs, ys, strict=True) if y < floor):
            axes.plot(x, floor, "v", color=style["color"], markersize=4, clip_on=False)
            edge = {"xytext": (0, 5), "textcoords": "offset points", "rotation": 90, "ha": "center", "fontsize": 6}
            edge |= {"color": style["color"], "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.3}}
            axes.annotate(f"{name}: {y:.1f}", (x, floor), **edge)
    axes.set(xlabel=label)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The methods without trained weights."""
    yield from ((f"{method} was not trained", command) for method, command in result["missing"].items())
