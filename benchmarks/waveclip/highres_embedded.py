"""The embedded block of WaveCLIP's table on more pixels: two levels at 96 px, over training seeds.

Shapes: L levels, M pictures, S training seeds.

Every number comes from the answers that the trainings left: thresholds are chosen on ``val``, numbers are of ``test``,
and nothing is evaluated here. The statistics are those of the tables of 48 px (benchmarks/protocol.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks import figures, read_log
from benchmarks.cells import accuracy, p_value, points, table
from benchmarks.embedded import LOGGED, REVISION
from benchmarks.statistics import RESAMPLES, Interval, adjusted_p, difference, mean_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.training import shapes as trained
from benchmarks.training.shapes import Known
from benchmarks.waveclip import controls
from benchmarks.waveclip.controls import CASCADE, FINE, WAVE
from benchmarks.waveclip.costs import cost, exit_costs
from benchmarks.waveclip.saving import ALLOWANCE, Exits, Steps, saving
from common.clip import CLIP, load_architecture
from common.conditions import conditions
from common.early_exit import threshold_for
from waveclip import WaveTower

SIZE = 96
TEACHER, STUDENT = f"shapes-teacher{SIZE}", f"shapes-waveclip{SIZE}"
SMALL_TEACHER, SMALL_STUDENT = "shapes-teacher", "shapes-waveclip"
"""The families of 48 px."""
COMMANDS = (f"make retrain ONLY='{TEACHER}-*'", f"make retrain ONLY='{STUDENT}-*'")
"""The commands that train both, in this order."""
_ARCHITECTURE = "common/shapes_clip.json"


def measure(smoke: bool = False) -> dict[str, Any] | None:
    """The block, of the training seeds that are finished; None: a teacher or a student is lacking at either size.

    smoke: few resamples.
    """
    families = trained.finished()
    needed = (TEACHER, STUDENT, SMALL_TEACHER, SMALL_STUDENT)
    if not all(name in families and 0 in families[name]["test"] for name in needed):
        return None
    resamples, drawn = (20, 20) if smoke else (RESAMPLES, controls.CURVE_RESAMPLES)
    priced = prices(len(families[STUDENT]["test"][0].correct) - 1)
    seeds = {name: len(families[name]["test"]) for name in (TEACHER, STUDENT)}
    return {
        "conditions": conditions(
            "embedded",
            seeds=min(seeds.values()),
            chosen_on="val",
            reported_on="test",
            reads_of_test=read_log.reads_of_all(LOGGED[REVISION]),
        ),
        "seeds": seeds,
        "pictures": len(families[TEACHER]["test"][0].last),
        "rows": rows(families, priced, resamples),
        "savings": savings(families, priced, resamples),
        "curves": {
            f"WaveCLIP, {size} px": curve(families, name, priced[name], drawn)
            for size, name in ((48, SMALL_STUDENT), (SIZE, STUDENT))
        },
    }


def prices(levels: int) -> dict[str, list[float]]:
    """GMACs of a picture by family: of each exit; a teacher has one. levels: of the student of 96 px."""
    architecture, priced = load_architecture(_ARCHITECTURE), {}
    for size, teacher, student, depth in (
        (architecture["vision_cfg"]["image_size"], SMALL_TEACHER, SMALL_STUDENT, 1),
        (SIZE, TEACHER, STUDENT, levels),
    ):
        tower = CLIP({**architecture, "vision_cfg": {**architecture["vision_cfg"], "image_size": size}}).image_tower
        priced[teacher] = [cost(tower, size).macs.gmacs]
        priced[student] = [each.macs.gmacs for each in exit_costs(WaveTower.from_image_tower(tower, depth), size)]
    return priced


def rows(families: Known, priced: Mapping[str, Sequence[float]], resamples: int) -> list[dict[str, Any]]:
    """Accuracies of both teachers and of every level, each with what it is compared with, Holm-adjusted.

    Students and teachers of 96 px start from seed 0's teachers, and are compared with these.
    """
    right = {name: np.stack([part.correct for part in families[name]["test"].values()], 1) for name in priced}
    small, teacher = (families[name]["test"][0].correct[-1:] for name in (SMALL_TEACHER, TEACHER))
    first, last, fine = "teacher, 96 px, seed 0", len(right[STUDENT]) - 1, "WaveCLIP, 48 px, fine level"
    # The row, its right answers [S,M], its GMACs, then what it is compared with: its name, right answers [T,M].
    lines = [
        ("teacher, 48 px, seed 0", small, priced[SMALL_TEACHER][0]),
        (first, teacher, priced[TEACHER][0]),
        ("teacher, 96 px, all seeds", right[TEACHER][0], priced[TEACHER][0], "teacher, 48 px, seed 0", small),
        (fine, right[SMALL_STUDENT][-1], priced[SMALL_STUDENT][-1]),
        *(
            (f"WaveCLIP, 96 px, step {step}", right[STUDENT][step], priced[STUDENT][step], first, teacher)
            for step in range(last + 1)
        ),
        ("the same last step", right[STUDENT][-1], priced[STUDENT][-1], fine, right[SMALL_STUDENT][-1]),
    ]
    result, gaps = [], {}
    for name, answered, gmacs, *rival in lines:
        row = {"row": name, "seeds": len(answered), "gmacs": gmacs}
        row["accuracy"] = mean_interval(answered, resamples).ends
        if rival:
            gaps[name] = difference(answered, rival[1], resamples=resamples)
            row |= {"against": rival[0], "difference": gaps[name].ends}
        result.append(row)
    adjusted = adjusted_p(gaps)
    return [row | ({"p": adjusted[row["row"]]} if row["row"] in adjusted else {}) for row in result]


def savings(families: Known, priced: Mapping[str, Sequence[float]], resamples: int) -> list[dict[str, Any]]:
    """What the student saves at the accuracy of its teacher and of its own last level, and beside a cascade.

    The cascade asks the teacher of 48 px first, then that of 96 px, and shares nothing.
    """
    shared = [seed for seed in families[STUDENT]["test"] if seed in families[TEACHER]["test"]]
    dense, small = priced[TEACHER][0], priced[SMALL_TEACHER][0]

    def of(split: str) -> dict[str, list[Exits | Steps]]:
        known = {name: families[name][split] for name in priced}
        reference, first = known[TEACHER][0].last, known[SMALL_TEACHER][0]
        return {
            WAVE: [known[STUDENT][seed].steps(reference) for seed in shared],
            CASCADE: [first.cascade(known[TEACHER][seed], reference) for seed in shared],
            FINE: [known[STUDENT][seed].steps(known[STUDENT][seed].last) for seed in shared],
        }

    val, test = of("val"), of("test")
    steps = {WAVE: priced[STUDENT], CASCADE: [small, small + dense], FINE: priced[STUDENT]}
    found = {name: saving(val[name], test[name], steps[name], dense, resamples=resamples) for name in val}
    more: Interval = found[WAVE].less(found[CASCADE])
    return [
        *(controls.saving_line(name, "teacher", found[name]) for name in (WAVE, CASCADE)),
        {"method": f"{WAVE} less {CASCADE}", "reference": "teacher", "saved": more.ends},
        controls.saving_line(WAVE, FINE, found[FINE]),
    ]


def curve(families: Known, name: str, costs: Sequence[float], resamples: int) -> controls.Curve:
    """Accuracy on test over the seeds against GMACs, by thresholds that part the confidences on val into equal shares.

    One threshold serves all levels of a seed.  costs: GMACs of leaving at each [L].
    """
    val, test = ([part.steps(part.last) for part in families[name][split].values()] for split in ("val", "test"))
    line: controls.Curve = {key: [] for key in ("refined", "gmacs", "accuracy", "low", "high")}
    for share in np.linspace(0, 1, controls.CURVE_POINTS).tolist():
        thresholds = [threshold_for(torch.from_numpy(steps.surest.ravel()), share) for steps in val]
        seen = [steps.at(threshold) for steps, threshold in zip(test, thresholds, strict=True)]
        on = np.mean([goes_on.mean(1) for _, goes_on in seen], axis=0)
        ends = mean_interval(np.stack([right for right, _ in seen]), resamples).ends
        for key, value in zip(line, (on[0], costs[0] + on @ np.diff(costs), *ends), strict=True):
            line[key].append(float(value))
    return line


def markdown(block: dict[str, Any]) -> list[str]:
    """The block as Markdown."""
    lines = []
    for row in block["rows"]:
        middle, *interval = row["accuracy"]
        p = p_value(row["p"]) if "p" in row else "–"
        compared = [row.get("against", "–"), points(row.get("difference")), p]
        lines.append([row["row"], row["seeds"], accuracy(middle, interval), *compared, f"{row['gmacs']:.4f}"])
    head = ["scenes of shape", "seeds", "accuracy [95 %]", "compared with", "difference", "p, Holm", "GMACs"]
    seeds = len(block["savings"][0]["thresholds"])
    note = (
        f"Embedded scale: the same {block['pictures']:,} scenes of test, drawn at both sizes. Teachers of {SIZE} px "
        "are the one of 48 px and seed 0, trained on at that size, so more pixels and more steps are one difference; "
        f"students start from the teacher of {SIZE} px and seed 0. One threshold serves all levels of a seed: for a "
        f"saving the cheapest whose paired interval on val stays above -{100 * ALLOWANCE:.1f} points, for the curve "
        "one that refines a share of val. Refined: pictures that go on after the first level. The cascade asks the "
        f"teacher of 48 px first, then that of {SIZE} px, shares nothing, and pays both. Intervals resample seeds and "
        "pictures, and a saving's the threshold too; p is adjusted over the rows. GMACs count attention on both "
        f"sides, the image tower's alone.{read_log.remark(block['conditions'])}"
    )
    said = controls.headline(block["savings"], seeds, " and ".join(f"`{command}`" for command in COMMANDS))
    return [table(head, lines, left=(0, 3)), said, controls.savings_table(block["savings"]), sentence(), note]


def draw(axes: Axes, block: dict[str, Any]) -> None:
    """Both students' curves, and the teachers as points."""
    for name, line in block["curves"].items():
        controls.draw_curve(axes, line, name)
    for row in block["rows"]:
        if row["row"].startswith("teacher"):
            controls.draw_point(axes, row["gmacs"], row["accuracy"], row["row"])
    axes.set(title="scenes of shape, margin gate", xlabel="GMACs a picture", ylabel="test top-1, %")
    figures.name_lines(axes, 0.6)


def missing(block: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The trainings of 96 px that the block lacks."""
    if block is None:
        yield f"the embedded models of {SIZE} px", " && ".join(COMMANDS)
        return
    for (name, runs), command in zip(
        (family for family in trained.FAMILIES if family[0] in (TEACHER, STUDENT)), COMMANDS, strict=True
    ):
        if lacking := len(runs) - block["seeds"].get(name, 0):
            yield f"{lacking} of {len(runs)} runs of {name}", command
