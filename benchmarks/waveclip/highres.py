"""WaveCLIP above 224 px, where the paper's conclusion expects more levels to pay: cost, time and accuracy.

Shapes: B images, S image size, L levels.

Table 1's third row needs a grid that halves twice. At 448 px with patches of 16 px it does (28, 14, 7). Two levels then
begin with the 50 tokens with which one level begins at 224 px.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells import Result, table
from benchmarks.waveclip import highres_embedded
from benchmarks.waveclip.costs import WavePath, cost, exit_costs
from common.clip import CLIP
from common.conditions import conditions
from common.timing import seconds
from common.tower import ImageTower
from waveclip.tower import WaveTower

SIZES = ((224, 1), (448, 2), (512, 2), (512, 3))
"""Image size and levels of the towers that are counted at paper scale."""
BATCH, ROUNDS = 4, 3


def run(smoke: bool = False) -> dict[str, Any]:
    """Every exit's tokens, GMACs and images/s at paper scale, and the embedded block of 96 px where it is trained.

    smoke: 224 px, one image, one round; few resamples.
    """
    sizes, batch, rounds = (SIZES[:1], 1, 1) if smoke else (SIZES, BATCH, ROUNDS)
    run_conditions = conditions(
        "paper",
        seeds=None,
        dtype="float32",
        batch=batch,
        rounds=rounds,
        weights="random",
        chosen_on="nothing is chosen",
    )
    priced = []
    for size, levels in sizes:
        tower = CLIP.from_open_clip("ViT-B-16", image_size=size).image_tower.eval()
        priced.append({"image_size": size, "levels": levels, "rows": price(tower, levels, batch, rounds)})
    return {
        "name": "waveclip-highres",
        "conditions": run_conditions,
        "paper_scale": priced,
        "embedded": highres_embedded.measure(smoke),
    }


def price(tower: ImageTower, levels: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The dense tower, then each exit of a WaveCLIP that starts as its copy.

    A row's ``level_gmacs`` count the exit's own tokens, with the earlier ones cached; ``gmacs`` the whole path to the
    exit; both also as ``..._paper``. ``images_per_second``: all images of a batch take that path.
    """
    size = tower.image_size
    wave = WaveTower.from_image_tower(tower, levels).eval()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    paths = {"dense": tower} | {f"exit {step}": WavePath(wave, step) for step in range(wave.steps)}
    path_costs = [cost(tower, size), *exit_costs(wave, size)]
    durations = seconds({name: lambda path=path: path(images) for name, path in paths.items()}, rounds)
    rows: list[dict[str, Any]] = []
    for name, path_cost in zip(paths, path_costs, strict=True):
        row = {"path": name, "tokens": path_cost.tokens, "images_per_second": batch / durations[name]}
        for key in ("gmacs_paper", "gmacs"):
            row[key] = getattr(path_cost.macs, key)
            row[f"level_{key}"] = row[key] - (rows[-1][key] if len(rows) > 1 else 0)
        rows.append(row)
    return rows


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    blocks = [_paper_markdown(result)]
    if result["embedded"] is None:
        first, then = highres_embedded.COMMANDS
        blocks.append(f"Embedded scale, {highres_embedded.SIZE} px: not run; `{first}`, then `{then}`.")
    else:
        blocks += highres_embedded.markdown(result["embedded"])
    return {"md": "\n\n".join(blocks) + "\n", "figures": {"waveclip-highres": _draw(result)}}


def _paper_markdown(result: dict[str, Any]) -> str:
    head = ["image", "path", "tokens", "GMACs of the level, without attention products", "GMACs of the level"]
    head += ["GMACs of the path, without", "GMACs of the path", "of dense", "images/s"]
    rows = []
    for model in result["paper_scale"]:
        dense = model["rows"][0]
        for row in model["rows"]:
            level = ["–", "–"] if row is dense else [f"{row[key]:.2f}" for key in ("level_gmacs_paper", "level_gmacs")]
            path = [f"{row['gmacs_paper']:.2f}", f"{row['gmacs']:.2f}", f"{100 * row['gmacs'] / dense['gmacs']:.1f} %"]
            rate, ratio = row["images_per_second"], row["images_per_second"] / dense["images_per_second"]
            rows.append([_name(model), row["path"], f"{row['tokens']:g}", *level, *path, f"{rate:.2f} (×{ratio:.2f})"])
    run = result["conditions"]
    note = (
        "ViT-B/16, random weights (scale: paper). A level's GMACs are those of its own tokens over the cache, a path's "
        "those of all levels up to its exit. Images/s when every picture takes the path, × against the dense tower: "
        f"batch {run['batch']}, medians of {run['rounds']} alternating rounds, {run['dtype']}, "
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}. With a class token at every level; "
        "Table 1's third row is that of two levels, whose grid is whole at 448 px. The first exit's share of the dense "
        f"tower: {', '.join(_first_exit(model) for model in result['paper_scale'])}."
    )
    return f"{table(head, rows, left=(0, 1))}\n\n{note}"


def _first_exit(model: dict[str, Any]) -> str:
    dense, first = model["rows"][:2]
    return f"{100 * first['gmacs'] / dense['gmacs']:.1f} % ({_name(model)})"


def _name(model: dict[str, Any]) -> str:
    return f"{model['image_size']} px, {_levels(model)}"


def _levels(model: dict[str, Any]) -> str:
    return f"{model['levels']} level{'s' if model['levels'] > 1 else ''}"


def _draw(result: dict[str, Any]) -> Figure:
    block = result["embedded"]
    figure = Figure(figsize=(9.5 if block else 5.0, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if block else 1, squeeze=False)[0]
    _draw_costs(left, result["paper_scale"])
    if block:
        highres_embedded.draw(right[0], block)
    return figure


def _draw_costs(axes: Axes, priced: list[dict[str, Any]]) -> None:
    """A bar for each tower that stacks the GMACs of its levels, and a dashed line at the dense tower's GMACs."""
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
    axes.legend()


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The embedded trainings of 96 px that the result lacks."""
    yield from highres_embedded.missing(result["embedded"])
