"""WaveCLIP above 224 px, where the paper's conclusion expects more levels to pay: cost, time, and a measured frontier.

Shapes: B images, S image size, M pictures.

Table 1's third row needs a grid that halves twice. At 448 px and patch 16 it does (28, 14, 7), so that two levels
begin with the 50 tokens that one level begins with at 224 px.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells import Result
from benchmarks.embedded import PART, STUDENT, STUDENT_96, TEACHER, TEACHER_96, batches, costs, models, outcomes
from benchmarks.timing import seconds
from benchmarks.waveclip.costs import WavePath, cost, exit_costs
from benchmarks.waveclip.levels import Levels, frontier, observe_levels
from common.clip import CLIP
from common.conditions import conditions, digest
from common.data.embedded.module import EmbeddedDataModule
from common.evaluate.accuracy import paired_difference, wilson_interval
from common.tower import ImageTower
from waveclip.tower import WaveTower

SIZES = ((224, 1), (448, 2), (512, 2), (512, 3))
"""Image size and levels of what is priced at paper scale."""
BATCH, ROUNDS = 4, 3
COMMANDS = ("make retrain ONLY=teacher-96", "make retrain ONLY=waveclip-96")
"""What trains the embedded models of 96 px, in this order."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Every exit's tokens, GMACs and images/s at paper scale, and both embedded students' frontiers.

    smoke: 224 px, one picture, one round; the embedded block on 500 pictures of val, which is packed sooner.
    The embedded block is None while the weights of 96 px are not there. ValueError: they are, those of 48 px are not.
    """
    sizes, batch, rounds = (SIZES[:1], 1, 1) if smoke else (SIZES, BATCH, ROUNDS)
    known = [path for path in (TEACHER, STUDENT, TEACHER_96, STUDENT_96) if path.is_file()]
    stated = conditions(
        "paper and embedded",
        seeds=1,
        dtype="float32",
        batch=batch,
        rounds=rounds,
        weights={"paper scale": "random"} | {path.name: digest(path) for path in known},
        chosen_on="nothing is chosen: a sweep",
    )
    priced = []
    for size, levels in sizes:
        tower = CLIP.from_open_clip("ViT-B-16", image_size=size).image_tower.eval()
        priced.append({"image_size": size, "levels": levels, "rows": price(tower, levels, batch, rounds)})
    return {
        "name": "waveclip-highres",
        "conditions": stated,
        "paper_scale": priced,
        "embedded": embedded(smoke) if {TEACHER_96, STUDENT_96} <= set(known) else None,
    }


def price(tower: ImageTower, levels: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The dense tower, then each exit of a WaveCLIP that starts as its copy.

    A row's ``level_gmacs`` are those of the exit's own tokens, over the cache; ``gmacs`` those of the path that ends
    there; both also as ``..._paper``. ``images_per_second``: all pictures of a batch take that path.
    """
    size = tower.image_size
    wave = WaveTower.from_image_tower(tower, levels).eval()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    paths = {"dense": tower} | {f"exit {step}": WavePath(wave, step) for step in range(wave.steps)}
    paid = [cost(tower, size), *exit_costs(wave, size)]
    taken = seconds({name: lambda path=path: path(images) for name, path in paths.items()}, rounds)
    rows: list[dict[str, Any]] = []
    for name, each in zip(paths, paid, strict=True):
        row = {"path": name, "tokens": each.tokens, "images_per_second": batch / taken[name]}
        for key in ("gmacs_paper", "gmacs"):
            row[key] = getattr(each.macs, key)
            row[f"level_{key}"] = row[key] - (rows[-1][key] if len(rows) > 1 else 0)
        rows.append(row)
    return rows


def embedded(smoke: bool) -> dict[str, Any]:
    """Both embedded students on the same scenes, drawn at 48 px for one and at 96 px for the other."""
    split = "val" if smoke else "test"
    small = outcomes(split, smoke)
    one = Levels(small.margin.unsqueeze(0), torch.stack([small.coarse, small.fine]), small.teacher)
    teacher, student = CLIP.load(TEACHER_96).eval(), WaveTower.load(STUDENT_96).eval()
    pictures = batches(split, PART if smoke else None, teacher.image_tower.image_size)
    two = observe_levels(teacher, student, pictures, EmbeddedDataModule().class_prompts)
    return {
        "split": split,
        "pictures": len(two.teacher),
        "models": [measured(*models(), one), measured(teacher, student, two)],
        "twice_the_pixels": {
            "teacher": paired_difference(two.teacher, one.teacher),
            "student": paired_difference(two.right[-1], one.right[-1]),
        },
        "behind": paired_difference(two.right[-1], two.teacher),
    }


def measured(teacher: CLIP, student: WaveTower, seen: Levels) -> dict[str, Any]:
    """The dense teacher, the student when all pictures leave at one level, and its margin gate's frontier."""
    dense, exits = costs(teacher, student)
    names = ["dense teacher", *(f"all leave after step {step}" for step in range(student.steps))]
    rows = []
    for name, paid, right in zip(names, [dense, *exits], [seen.teacher, *seen.right], strict=True):
        correct = int(right.sum())
        rows.append(
            {
                "path": name,
                "tokens": paid.tokens,
                "gmacs": paid.macs.gmacs,
                "accuracy": correct / len(right),
                "interval": wilson_interval(correct, len(right)),
            }
        )
    size, levels = teacher.image_tower.image_size, student.steps - 1
    return {"image_size": size, "levels": levels, "rows": rows, "frontier": frontier(seen, exits)}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    blocks = [_paper_markdown(result)]
    found = result["embedded"]
    if found is None:
        blocks.append(f"Embedded scale, 96 px: not run; `{COMMANDS[0]}`, then `{COMMANDS[1]}`.")
    else:
        blocks += _embedded_markdown(found)
    return {"md": "\n\n".join(blocks) + "\n", "figures": {"waveclip-highres": _draw(result)}}


def _paper_markdown(result: dict[str, Any]) -> str:
    lines = [
        "| image | path | tokens | GMACs of the level, without attention products | GMACs of the level "
        "| GMACs of the path, without | GMACs of the path | of dense | images/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in result["paper_scale"]:
        dense = model["rows"][0]
        name = f"{model['image_size']} px, {_levels(model)}"
        for row in model["rows"]:
            own = [f"{row[key]:.2f}" for key in ("level_gmacs_paper", "level_gmacs")]
            lines.append(
                f"| {name} | {row['path']} | {row['tokens']:g} | {' | '.join(['–', '–'] if row is dense else own)} "
                f"| {row['gmacs_paper']:.2f} | {row['gmacs']:.2f} | {100 * row['gmacs'] / dense['gmacs']:.1f} % "
                f"| {row['images_per_second']:.2f} (×{row['images_per_second'] / dense['images_per_second']:.2f}) |"
            )
    stated = result["conditions"]
    note = (
        "ViT-B/16, random weights (scale: paper). A level's GMACs are those of its own tokens over the cache, a path's "
        "those of all levels up to its exit. Images/s when every picture takes the path, × against the dense tower: "
        f"batch {stated['batch']}, medians of {stated['rounds']} alternating rounds, {stated['dtype']}, "
        f"{stated['device']}, {stated['threads']} threads, torch {stated['torch']}. With a class token at every level; "
        "Table 1's third row is that of two levels, whose grid is whole at 448 px. The first exit's share of the dense "
        f"tower: {', '.join(_first_exit(model) for model in result['paper_scale'])}."
    )
    return "\n".join([*lines, "", note])


def _first_exit(model: dict[str, Any]) -> str:
    dense, first = model["rows"][:2]
    return f"{100 * first['gmacs'] / dense['gmacs']:.1f} % ({model['image_size']} px, {_levels(model)})"


def _embedded_markdown(found: dict[str, Any]) -> list[str]:
    lines = ["| embedded scale | path | tokens | GMACs | accuracy [95 %] |", "|---|---|---:|---:|---:|"]
    sweep = ["| embedded scale, margin gate | leave after each step | GMACs | accuracy |", "|---|---:|---:|---:|"]
    for model in found["models"]:
        name = f"{model['image_size']} px, {_levels(model)}"
        for row in model["rows"]:
            low, high = row["interval"]
            accuracy = f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append(f"| {name} | {row['path']} | {row['tokens']:g} | {row['gmacs']:.4f} | {accuracy} |")
        points = model["frontier"]
        for point in points[:: max(1, len(points) // 10)]:
            shares = " / ".join(f"{100 * share:.0f}" for share in point["shares"])
            sweep.append(f"| {name} | {shares} % | {point['gmacs']:.4f} | {100 * point['accuracy']:.1f} |")
    gained = found["twice_the_pixels"]
    note = (
        f"{found['pictures']:,} pictures of {found['split']}, the same scenes at both sizes; one training seed. Twice "
        f"the pixels change the teacher's accuracy by {points(gained['teacher'])} points and that of the student's "
        f"last level by {points(gained['student'])}; at 96 px that level is {points(found['behind'])} points "
        "from its teacher (paired intervals). The 96 px teacher is the 48 px one, trained on at that size. Within a "
        "point of its own last level a student comes, in this sweep, with "
        f"{' and '.join(_saving(model) for model in found['models'])} of its dense teacher's multiply-adds."
    )
    return ["\n".join(lines), "\n".join(sweep), note]


def _saving(model: dict[str, Any]) -> str:
    dense, *_, last = model["rows"]
    near = [point["gmacs"] for point in model["frontier"] if point["accuracy"] >= last["accuracy"] - 0.01]
    return f"{100 * min(near) / dense['gmacs']:.0f} % ({model['image_size']} px)"


def _levels(model: dict[str, Any]) -> str:
    return f"{model['levels']} level{'s' if model['levels'] > 1 else ''}"


def _draw(result: dict[str, Any]) -> Figure:
    found = result["embedded"]
    figure = Figure(figsize=(9.5 if found else 5.0, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if found else 1, squeeze=False)[0]
    _draw_costs(left, result["paper_scale"])
    if found:
        _draw_frontiers(right[0], found["models"])
    return figure


def _draw_costs(axes: Axes, priced: list[dict[str, Any]]) -> None:
    """One bar for each tower, of its levels' GMACs from coarse to fine, beside the dense tower's mark."""
    for place, model in enumerate(priced):
        dense, *exits = model["rows"]
        below = 0.0
        for step, row in enumerate(exits):
            label = f"step {step}" if len(exits) == max(len(other["rows"]) for other in priced) - 1 else None
            axes.bar(place, row["level_gmacs"], 0.6, below, color=f"C{step}", label=label)
            below = row["gmacs"]
        axes.plot([place - 0.4, place + 0.4], 2 * [dense["gmacs"]], "k--", label=None if place else "dense")
    axes.set_xticks(range(len(priced)), [f"{model['image_size']} px\n{_levels(model)}" for model in priced])
    axes.set(title="ViT-B/16, patch 16", ylabel="GMACs a picture")
    axes.legend(fontsize=8)


def _draw_frontiers(axes: Axes, students: list[dict[str, Any]]) -> None:
    for number, model in enumerate(students):
        xs, ys = ([point[key] for point in model["frontier"]] for key in ("gmacs", "accuracy"))
        axes.plot(xs, [100 * y for y in ys], f"C{number}", label=f"{model['image_size']} px, {_levels(model)}")
        dense = model["rows"][0]
        axes.plot(dense["gmacs"], 100 * dense["accuracy"], f"C{number}*", markersize=11, label="its dense teacher")
    axes.set(title="embedded scale, margin gate", xlabel="GMACs a picture", ylabel="top-1, %", xscale="log")
    axes.legend(fontsize=8)


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The embedded models of 96 px, where they are not there."""
    if result["embedded"] is None:
        yield "the embedded models of 96 px", " && ".join(COMMANDS)
