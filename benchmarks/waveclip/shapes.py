"""WaveCLIP and its controls on the scenes of shape, from the answers that each training left (benchmarks/protocol.md).

Shapes: S training seeds, M pictures.

Every number is of test; thresholds are chosen on val. Nothing is evaluated here: a table is made in seconds, and can be
made again from the answers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import read_log
from benchmarks.cells import Result, p_value, points, table
from benchmarks.embedded import LOGGED, REVISION, heads_beyond
from benchmarks.statistics import RESAMPLES, adjusted_p, difference, mean_interval
from benchmarks.together.embedded_reference import sentence
from benchmarks.training import shapes as trained
from benchmarks.training.shapes import Known
from benchmarks.waveclip import controls
from benchmarks.waveclip.controls import SeedAnswers
from benchmarks.waveclip.costs import Cost, cost, exit_costs
from benchmarks.waveclip.saving import ALLOWANCE, saving
from common.clip import CLIP, load_architecture
from common.conditions import conditions
from waveclip import WaveTower

CONTROLLED = {"shapes-teacher", "shapes-waveclip", "shapes-half", "shapes-longer"}
"""The families behind the savings."""
FROM_LONGER = "shapes-waveclip-longer"
"""The family of WaveCLIPs whose teacher is the one trained on, of seed 0."""
BEYOND = ("unseen", "retrieval")
"""Splits of held-out names, and of pictures among whose captions their own is to be found."""
SPREAD = "all seeds (spread)"
"""How the row of several teachers ends, which is compared with none."""
_ARCHITECTURE = "common/shapes_clip.json"


LEVELS = ("WaveCLIP, coarse level", "WaveCLIP, fine level")
"""The rows of WaveCLIP's own levels."""


def cosine_alone(share: int) -> str:
    """How rows of the paper's recipe begin, after ``share`` % of the teacher's steps."""
    return f"cosine distance alone, {share} % of the teacher's steps"


class Line(NamedTuple):
    """A row of accuracies: a family's level (0: the first, -1: the last), its name and the cost it has.

    teacher: the family whose seed 0 it is compared with, from which most start; None: it is compared with nothing.
    seed: the only training seed that the row shows; None: all.
    """

    name: str
    family: str
    level: int
    cost: str
    teacher: str | None = "shapes-teacher"
    seed: int | None = None


LINES = (
    Line("teacher, seed 0 (students start here)", "shapes-teacher", -1, "dense", None, 0),
    Line(f"teacher, {SPREAD}", "shapes-teacher", -1, "dense", None),
    Line("teacher, trained on", "shapes-longer", -1, "dense"),
    Line("half-resolution CLIP", "shapes-half", -1, "half"),
    Line(LEVELS[0], "shapes-waveclip", 0, "coarse"),
    Line(LEVELS[1], "shapes-waveclip", -1, "fine"),
    Line(f"{controls.LATER_WAVE}, coarse level", FROM_LONGER, 0, "coarse", "shapes-longer"),
    Line(f"{controls.LATER_WAVE}, fine level", FROM_LONGER, -1, "fine", "shapes-longer"),
    *(
        Line(f"{cosine_alone(share)}, {level}", f"shapes-cosine{share}", place, level)
        for share in trained.COSINE_SHARES
        for level, place in (("coarse", 0), ("fine", -1))
    ),
)


def costs() -> dict[str, Cost]:
    """The image tower's cost of one picture: teacher, half-resolution tower, and both exits of a WaveCLIP."""
    architecture = load_architecture(_ARCHITECTURE)
    clip = CLIP(architecture)
    small = CLIP({**architecture, "vision_cfg": {**architecture["vision_cfg"], "image_size": 24}})
    size = clip.image_tower.image_size
    coarse, fine = exit_costs(WaveTower.from_image_tower(clip.image_tower, levels=1), size)
    return {"dense": cost(clip.image_tower, size), "half": cost(small.image_tower, 24), "coarse": coarse, "fine": fine}


def prices() -> controls.Costs:
    """The ``costs`` as tables of WaveCLIP and its controls take them."""
    priced = costs()
    return controls.Costs(priced["dense"], [priced["coarse"], priced["fine"]], priced["half"])


def run(smoke: bool = False) -> dict[str, Any]:
    """All rows whose trainings are finished, and the savings once all controls are. smoke: few resamples."""
    resamples = 20 if smoke else RESAMPLES
    families, priced = trained.finished(), costs()
    seeds = {family: len(splits["test"]) for family, splits in families.items()}
    result = {
        "name": "waveclip-shapes",
        "conditions": conditions(
            "embedded",
            seeds=min(seeds.values(), default=0),
            chosen_on="val",
            reported_on="test",
            reads_of_test=read_log.reads_of_all(LOGGED[REVISION]),
        ),
        "seeds": seeds,
        "pictures": next((_right(families, line).shape[1] for line in finished(families)), 0),
        "rows": rows(families, {name: value.macs.gmacs for name, value in priced.items()}, resamples),
        "kept": kept(families, resamples),
    }
    if families.keys() >= {"shapes-longer", FROM_LONGER}:
        result["savings_from_longer"] = savings_from_longer(families, priced, resamples)
    if not families.keys() >= CONTROLLED:
        return result
    val, test = (by_seed(families, split) for split in ("val", "test"))
    if not test:
        return result
    price = prices()
    drawn = 20 if smoke else controls.CURVE_RESAMPLES
    curves = controls.curves(test, price, drawn)
    if FROM_LONGER in families:
        exits = [wave.exits(wave.last) for wave in families[FROM_LONGER]["test"].values()]
        curves[controls.LATER_WAVE] = controls.curve(exits, [cost.macs.gmacs for cost in price.wave], drawn)
    return result | {"savings": controls.savings(val, test, price, resamples), "curves": curves}


def conditions_of_a_sweep(seeds: int) -> dict[str, Any]:
    """The conditions of a figure that shows WaveCLIPs at every threshold. seeds: trainings behind it."""
    chosen, reads = "nothing is chosen: a sweep", read_log.reads_of_all(LOGGED[REVISION])
    return conditions("embedded", seeds=seeds, chosen_on=chosen, reported_on="test", reads_of_test=reads)


def savings_from_longer(families: Known, costs: Mapping[str, Cost], resamples: int) -> list[dict[str, Any]]:
    """What WaveCLIPs save whose teacher is the one trained on: at its accuracy, and at that of their fine level."""
    teacher, students = families["shapes-longer"], families[FROM_LONGER]
    dense, coarse, fine = (costs[name].macs.gmacs for name in ("dense", "coarse", "fine"))
    lines = []
    for reference in (controls.TRAINED_ON, controls.FINE):
        own = reference == controls.FINE
        val, test = (
            [wave.exits(wave.last if own else teacher[split][0].last) for wave in students[split].values()]
            for split in ("val", "test")
        )
        value = saving(val, test, (coarse, fine), dense, resamples=resamples)
        lines.append(controls.saving_line(controls.WAVE, reference, value))
    return lines


def by_seed(families: Known, split: str) -> list[SeedAnswers]:
    """The answers on a split of the WaveCLIP and the controls, of the seeds that all have; the teacher is seed 0's."""
    teacher = families["shapes-teacher"][split][0]
    wave, half, longer = (families[name][split] for name in ("shapes-waveclip", "shapes-half", "shapes-longer"))
    shared = [seed for seed in wave if seed in half and seed in longer]
    return [controls.seed_answers(teacher, wave[seed], half[seed], longer[seed]) for seed in shared]


def controlled(split: str) -> list[SeedAnswers]:
    """``by_seed`` of what is trained. ValueError: WaveCLIP or a control has left no answers."""
    families = trained.finished()
    if lacking := CONTROLLED - families.keys():
        raise ValueError(f"no answers of {', '.join(sorted(lacking))}; `make retrain ONLY='shapes-*'` trains them")
    return by_seed(families, split)


def rows(
    families: Known, costs: Mapping[str, float], resamples: int, lines: Sequence[Line] = LINES
) -> list[dict[str, Any]]:
    """Accuracy of every finished line with its interval, and its difference from its teacher's seed 0, Holm-adjusted.

    costs: GMACs by the lines' ``cost``.
    """
    result, gaps = [], {}
    for line in finished(families, lines):
        right = _right(families, line)
        row: dict[str, Any] = {"row": line.name, "gmacs": costs[line.cost], "seeds": len(right)}
        row["accuracy"] = mean_interval(right, resamples).ends
        teachers = families[line.teacher]["test"] if line.teacher in families else {}
        if 0 in teachers:
            gap = difference(right, teachers[0].correct[-1:], resamples=resamples)
            row["difference"], gaps[line.name] = gap.ends, gap
        result.append(row)
    adjusted = adjusted_p(gaps)
    return [row | ({"p": adjusted[row["row"]]} if row["row"] in adjusted else {}) for row in result]


def kept(families: Known, resamples: int) -> list[dict[str, Any]]:
    """What each finished line can do beyond the names it was trained on, by split of ``BEYOND``, with intervals."""
    return [
        {"row": line.name, "seeds": len(_right(families, line, "unseen"))}
        | {split: mean_interval(_right(families, line, split), resamples).ends for split in BEYOND}
        for line in finished(families)
    ]


def finished(families: Known, lines: Sequence[Line] = LINES) -> list[Line]:
    """The lines that have answers; of a teacher's seeds together only where there are several."""
    several = {name for name, splits in families.items() if splits["test"].keys() - {0}}
    return [
        line
        for line in lines
        if line.family in families
        and (line.seed is None or line.seed in families[line.family]["test"])
        and (line.family in several or not line.name.endswith(SPREAD))
    ]


def _right(families: Known, line: Line, split: str = "test") -> np.ndarray:
    """Right answers, bool [S,M]."""
    known = families[line.family][split]
    seeds = known if line.seed is None else [line.seed]
    return np.stack([known[seed].correct[line.level] for seed in seeds])


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
        p = p_value(row["p"]) if "p" in row else "–"
        gap = points(row.get("difference"))
        lines.append([row["row"], row["seeds"], _accuracy(row["accuracy"]), gap, p, f"{row['gmacs']:.4f}"])
    head = ["scenes of shape", "seeds", "accuracy [95 %]", "against its teacher", "p, Holm", "GMACs"]
    parts, figures = [table(head, lines), _kept_table(result["kept"])], {}
    if "savings" in result:
        seeds = len(result["savings"][0]["thresholds"])
        said = controls.headline(result["savings"], seeds, "`make retrain ONLY='shapes-*'`")
        parts += [said, controls.savings_table(result["savings"])]
        figures["waveclip-shapes"] = _draw(result)
    if "savings_from_longer" in result:
        count = result["seeds"][FROM_LONGER]
        said = f"{controls.LATER_WAVE}, {count} training seed{'s' if count > 1 else ''}:"
        parts += [said, controls.savings_table(result["savings_from_longer"])]
    return {"md": "\n\n".join([*parts, sentence(), _note(result)]) + "\n", "figures": figures}


def _kept_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["beyond the trained names", *heads_beyond()]
    return table(head, [[row["row"], *(_accuracy(row[split]) for split in BEYOND)] for row in rows])


def _accuracy(ends: Sequence[float]) -> str:
    middle, low, high = (100 * value for value in ends)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _note(result: dict[str, Any]) -> str:
    return (
        f"Zero-shot on {result['pictures']:,} test pictures of revision 2. Intervals resample training seeds and "
        f"pictures, and a saving's the threshold too: the cheapest whose paired interval on val stays above "
        f"-{100 * ALLOWANCE:.1f} points. Students, and the teachers that are trained on, start from the teacher of "
        "seed 0, the students of the teacher trained on from that. All rows are compared with the teacher of seed 0 "
        "(of these students: trained on), the half-resolution CLIP too, as in Table 2, though it shares no training "
        "with it; a teacher's own spread is in no difference. p is adjusted over the rows. GMACs "
        "count attention on both sides, the image tower's alone. The "
        "cascade asks the half-resolution CLIP first, then the teacher trained on, shares nothing, and pays both."
        f"{read_log.remark(result['conditions'])}"
    )


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.subplots()
    for name, curve in result["curves"].items():
        controls.draw_curve(axes, curve, name)
    single = [row for row in result["rows"] if row["row"].startswith(("teacher", "half"))]
    for row in single:
        middle, low, high = (100 * value for value in row["accuracy"])
        axes.errorbar(row["gmacs"], middle, [[middle - low], [high - middle]], fmt="o", capsize=3, label=row["row"])
    axes.set(xlabel="GMACs a picture", ylabel="test top-1, %", title="scenes of shape: early exit and its controls")
    figure.legend(loc="outside lower center", ncols=2)  # where it covers no curve
    return figure
