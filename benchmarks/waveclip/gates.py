"""One threshold for several data sets: does the margin need less tuning than the maximum probability?

The paper calls the margin the more stable gate. Here a threshold common to all data sets refines a share of the
pictures of their val splits together, each set having the same weight; each set's own threshold refines that share of
its own val. Compared between gates, on test: the share of the pictures that the common one treats otherwise than the
set's own, which is how far the two refined shares lie apart, and what that does to the accuracy. The accuracy alone
does not measure stability: where refining lowers it, a gate gains by refining few (benchmarks/protocol.md).

Shapes: S training seeds, M pictures of a data set, D data sets.

Answers are read from the files that the trainings left; nothing is evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import read_log
from benchmarks.cells import Result, accuracy, p_value, points, table
from benchmarks.embedded import LOGGED, REVISION
from benchmarks.statistics import RESAMPLES, Interval, adjusted_p, difference, mean_interval, mean_over_sets
from benchmarks.together.embedded_reference import sentence
from benchmarks.training.run import STORED
from benchmarks.waveclip import answers
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.fig4 import SHARES
from common.conditions import conditions
from common.data.embedded.shapes import class_names

SEEDS = 3


class Pictures(NamedTuple):
    """A data set: its name, where its WaveCLIPs' answers lie by training seed, its classes, what trains them."""

    name: str
    logged: str
    files: tuple[Path, ...]
    classes: int
    command: str


def _by_seed(pattern: str) -> tuple[Path, ...]:
    """The files of a photo set's runs: the first seed's name has no ending."""
    return tuple(STORED / (pattern + (f"-seed{seed}" if seed else "") + ".npz") for seed in range(SEEDS))


SETS = (
    Pictures(
        "scenes of shape",
        LOGGED[REVISION],
        tuple(STORED / f"shapes-waveclip-{seed}.npz" for seed in range(SEEDS)),
        len(class_names()),
        "make retrain ONLY='shapes-waveclip-*'",
    ),
    Pictures(
        "CIFAR-10",
        "photos-cifar10",
        _by_seed("photos-cifar10-waveclip"),
        10,
        "make reproduce-photos PHOTOS=DIR/cifar10 OUT=benchmarks SEEDS=3",
    ),
    Pictures(
        "Fashion-MNIST",
        "fashion-mnist",
        _by_seed("fashion-mnist-waveclip"),
        10,
        "make reproduce-fashion-mnist SEEDS=3",
    ),
)
Gate = Callable[[Answers, int], np.ndarray]
"""(answers, number of classes) -> the first level's confidence [M]."""
MARGIN = "margin"
GATES: dict[str, Gate] = {
    MARGIN: lambda given, classes: given.margin[0],
    "maximum probability": lambda given, classes: given.maximum[0],
    "maximum probability above chance": lambda given, classes: (given.maximum[0] - 1 / classes) / (1 - 1 / classes),
    "margin × classes": lambda given, classes: given.margin[0] * classes,
}
"""The third is 0 at chance and 1 at certainty, however many classes there are; a threshold of the last is relative to
their number."""
MEASURES = ("moved", "gained")
"""The names of ``_Outcome``'s values of each picture; the margin leads by less of the first, and by more of the second.
"""
Splits = Mapping[str, Answers]


def known() -> dict[str, list[Splits]]:
    """The answers of every data set that has some, one entry a training seed. Sets share no seeds."""
    found = {each.name: [answers.read(path) for path in each.files if path.is_file()] for each in SETS}
    return {name: seeds for name, seeds in found.items() if seeds}


def run(smoke: bool = False) -> dict[str, Any]:
    """The comparison over the data sets that are trained; none where there are fewer than two. smoke: few resamples."""
    found = known()
    return {
        "name": "waveclip-gates",
        "conditions": conditions(
            "embedded",
            seeds=min(map(len, found.values()), default=0),
            chosen_on="val",
            reported_on="test",
            reads_of_test={each.name: read_log.reads_of_all(each.logged) for each in SETS},
        ),
        "seeds": {name: len(seeds) for name, seeds in found.items()},
        "refining": refining_gains(found, 20 if smoke else RESAMPLES),
        "shares": at_shares(found, 20 if smoke else RESAMPLES) if len(found) > 1 else [],
    }


def refining_gains(found: Mapping[str, Sequence[Splits]], resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """What refining every picture of test gains: the fine level less the coarse one, with Holm's p over the sets.

    It bounds what any gate wins by refining others. found: as of ``at_shares``.
    """
    gains = {}
    for name, seeds in found.items():
        fine, coarse = (np.stack([splits["test"].correct[level] for splits in seeds]) for level in (-1, 0))
        gains[name] = difference(fine, coarse, paired_seeds=True, resamples=resamples)
    adjusted = adjusted_p(gains)
    return [{"data": name, "gain": gain.ends, "p": adjusted[name]} for name, gain in gains.items()]


def at_shares(found: Mapping[str, Sequence[Splits]], resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """For every share: what each gate's common threshold does to each set, and the margin's lead over the others.

    found: the answers on "val" and "test" by data set and training seed. Sets are compared over the seeds that all
    have. The p-values of all leads by one measure are adjusted together.
    """
    shares, leads = [], {}
    for share in SHARES:
        at, of_margin = _at_share(found, share, resamples)
        shares.append(at)
        leads |= {(measure, f"{share} {gate}"): lead for (measure, gate), lead in of_margin.items()}
    for measure in MEASURES:
        adjusted = adjusted_p({name: lead for (which, name), lead in leads.items() if which == measure})
        for at in shares:
            for gate, lead in at["leads"][measure].items():
                lead["p"] = adjusted[f"{at['share']} {gate}"]
    return shares


def _at_share(
    found: Mapping[str, Sequence[Splits]], share: float, resamples: int
) -> tuple[dict[str, Any], dict[tuple[str, str], Interval]]:
    """What a share comes to, and the margin's lead over each other gate by each measure."""
    classes = {each.name: each.classes for each in SETS}
    rows, values = [], {}
    for gate, confidence in GATES.items():
        # 1. The common threshold of each training seed, and what it answers on every set's test.
        outcomes = [
            _one_seed({name: seeds[seed] for name, seeds in found.items()}, classes, confidence, share)
            for seed in range(min(map(len, found.values())))
        ]
        # 2. What it changes of each set's own, [S,M] by measure.
        for measure in MEASURES:
            values[measure, gate] = {
                name: np.stack([getattr(of_seed[name], measure) for of_seed in outcomes]) for name in found
            }
        for name, gained in values["gained", gate].items():
            refined, own = (
                float(np.mean([getattr(of_seed[name], which) for of_seed in outcomes])) for which in ("refined", "own")
            )
            ends = mean_interval(gained, resamples).ends
            rows.append({"gate": gate, "data": name, "refined": refined, "own": own, "difference": ends})
    # 3. The margin against each other gate, on the same pictures.
    sign = {"moved": -1, "gained": 1}
    leads = {
        (measure, gate): mean_over_sets(
            [sign[measure] * (values[measure, MARGIN][name] - values[measure, gate][name]) for name in found], resamples
        )
        for measure, gate in values
        if gate != MARGIN
    }
    means: dict[str, dict[str, Any]] = {measure: {} for measure in MEASURES}
    shown: dict[str, dict[str, Any]] = {measure: {} for measure in MEASURES}
    for (measure, gate), of_sets in values.items():
        means[measure][gate] = mean_over_sets(list(of_sets.values()), resamples).ends
    for (measure, gate), lead in leads.items():
        shown[measure][gate] = {"difference": lead.ends}
    return {"share": share, "rows": rows, "means": means, "leads": shown}, leads


class _Outcome(NamedTuple):
    """On one set's test, of M pictures: the shares that the common and its own threshold refine; by picture, whether
    the two differ on it, and what the first one gains. The pictures that differ all lie between the two thresholds, so
    their share is the distance of the refined shares.
    """

    refined: float
    own: float
    moved: np.ndarray
    gained: np.ndarray


def _one_seed(
    found: Mapping[str, Splits], classes: Mapping[str, int], confidence: Gate, share: float
) -> dict[str, _Outcome]:
    val, test = (
        {name: confidence(splits[split], classes[name]).astype(np.float64) for name, splits in found.items()}
        for split in ("val", "test")
    )
    common = common_threshold(list(val.values()), share)
    outcomes = {}
    for name, splits in found.items():
        own = common_threshold([val[name]], share)
        given = splits["test"]
        refined = [test[name] < each for each in (common, own)]
        right = [np.where(each, given.last, given.correct[0]).astype(float) for each in refined]
        shares = (float(each.mean()) for each in refined)
        outcomes[name] = _Outcome(*shares, (refined[0] != refined[1]).astype(float), right[0] - right[1])
    return outcomes


def common_threshold(confidences: Sequence[np.ndarray], share: float) -> float:
    """The threshold below which ``share`` of the pictures of D sets lie, each set having the same weight.

    confidences: of each set's pictures, [M].
    """
    values = np.concatenate(confidences)
    weights = np.concatenate([np.full(len(each), 1 / (len(each) * len(confidences))) for each in confidences])
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(np.cumsum(weights[order]), share, side="right")
    return float(values[order[min(place, len(order) - 1)]])


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The data sets with fewer finished seeds than a headline needs."""
    for each in SETS:
        lacking = SEEDS - result["seeds"].get(each.name, 0)
        if lacking:
            yield f"{lacking} of {SEEDS} WaveCLIPs on {each.name}", each.command


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    lacking = "\n".join(f"- {what}: `{command}`" for what, command in missing(result))
    if not result["shares"]:
        return {"md": f"Not run: the comparison needs two data sets.\n\n{lacking}\n", "figures": {}}
    head = ["refined", "gate", *result["seeds"], "refined otherwise, % [95 %]", "the margin's lead", "p, Holm"]
    lines = []
    for at in result["shares"]:
        for gate in GATES:
            rows = [row for row in at["rows"] if row["gate"] == gate]
            cells = [
                f"{points(row['difference'])} ({100 * row['refined']:.0f} %, {100 * row['own']:.0f} %)" for row in rows
            ]
            moved, gained = (
                [show(at["means"][measure][gate]), *_lead(at["leads"][measure].get(gate))]
                for measure, show in (("moved", lambda ends: accuracy(ends[0], ends[1:])), ("gained", points))
            )
            lines.append([f"{100 * at['share']:.1f} %", gate, *cells, *moved, *gained])
    head += ["accuracy, mean of the sets [95 %]", "the margin's lead", "p, Holm"]
    seeds = min(result["seeds"].values())
    note = (
        "Under each set: points of accuracy on test that one threshold for all sets gains over the set's own, when "
        "both refine this share of val; below 0 it loses. In brackets, how much of a set's test the common one "
        "refines, and its own. Refined otherwise: the pictures that only one of the two refines, mean of the sets, "
        "which is how far the brackets lie apart in each training; less is more stable. A lead is the margin's: fewer "
        "such pictures, or more accuracy, in points. Pictures of equal confidence are refined together, so a share may "
        "not be met. "
        f"{'One training seed' if seeds == 1 else f'{seeds} training seeds'}; intervals resample seeds and pictures, p "
        f"is adjusted over the leads of a column.{read_log.remark(result['conditions'])}"
    )
    refining = table(
        ["refining every picture", "fine level less coarse, points [95 %]", "p, Holm"],
        [[row["data"], points(row["gain"]), p_value(row["p"])] for row in result.get("refining", ())],
    )
    parts = [
        table(head, lines, left=(1,)),
        note,
        refining,
        sentence(),
        *([f"Not run:\n\n{lacking}"] if lacking else []),
    ]
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def _lead(lead: Mapping[str, Any] | None) -> list[str]:
    return ["–", "–"] if lead is None else [points(lead["difference"]), p_value(lead["p"])]
