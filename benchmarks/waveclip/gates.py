"""One threshold for several data sets: does the margin need less tuning than the maximum probability?

The paper calls the margin the more stable gate. Here a threshold common to all data sets refines a share of the
pictures of their val splits together, each set having the same weight; each set's own threshold refines that share of
its own val. What the common one loses on test is compared between gates (benchmarks/protocol.md).

Shapes: S training seeds, M pictures of a data set, D data sets.

Answers are read from the files that the trainings left; nothing is evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cells import Result, p_value, points, table
from benchmarks.statistics import RESAMPLES, Interval, adjusted_p, mean_interval, mean_over_sets
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
    files: tuple[Path, ...]
    classes: int
    command: str


def _by_seed(pattern: str) -> tuple[Path, ...]:
    """The files of a photo set's runs: the first seed's name has no ending."""
    return tuple(STORED / (pattern + (f"-seed{seed}" if seed else "") + ".npz") for seed in range(SEEDS))


SETS = (
    Pictures(
        "scenes of shape",
        tuple(STORED / f"shapes-waveclip-{seed}.npz" for seed in range(SEEDS)),
        len(class_names()),
        "make retrain ONLY='shapes-waveclip-*'",
    ),
    Pictures(
        "CIFAR-10",
        _by_seed("photos-cifar10-waveclip"),
        10,
        "make reproduce-photos PHOTOS=DIR/cifar10 OUT=benchmarks SEEDS=3",
    ),
    Pictures("Fashion-MNIST", _by_seed("fashion-mnist-waveclip"), 10, "make reproduce-fashion-mnist SEEDS=3"),
)
Gate = Callable[[Answers, int], np.ndarray]
"""(answers, number of classes) -> the first level's confidence [M]."""
MARGIN = "margin"
GATES: dict[str, Gate] = {
    MARGIN: lambda given, classes: given.margin[0],
    "maximum probability": lambda given, classes: given.maximum[0],
    "maximum probability above chance": lambda given, classes: (given.maximum[0] - 1 / classes) / (1 - 1 / classes),
}
"""The last one is 0 at chance and 1 at certainty, however many classes there are."""
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
            "embedded", seeds=min(map(len, found.values()), default=0), chosen_on="val", reported_on="test"
        ),
        "seeds": {name: len(seeds) for name, seeds in found.items()},
        "shares": at_shares(found, 20 if smoke else RESAMPLES) if len(found) > 1 else [],
    }


def at_shares(found: Mapping[str, Sequence[Splits]], resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """For every share: what each gate's common threshold loses on each set, and the margin's lead over the others.

    found: the answers on "val" and "test" by data set and training seed. Sets are compared over the seeds that all
    have. The p-values of all leads are adjusted together.
    """
    shares, leads = [], {}
    for share in SHARES:
        at, of_margin = _at_share(found, share, resamples)
        shares.append(at)
        leads |= {f"{share} {gate}": lead for gate, lead in of_margin.items()}
    adjusted = adjusted_p(leads)
    for at in shares:
        for gate, lead in at["leads"].items():
            lead["p"] = adjusted[f"{at['share']} {gate}"]
    return shares


def _at_share(
    found: Mapping[str, Sequence[Splits]], share: float, resamples: int
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """What a share comes to, and the margin's lead over each other gate."""
    classes = {each.name: each.classes for each in SETS}
    rows, gained = [], {}
    for gate, confidence in GATES.items():
        # 1. The common threshold of each training seed, and what it answers on every set's test.
        outcomes = [
            _one_seed({name: seeds[seed] for name, seeds in found.items()}, classes, confidence, share)
            for seed in range(min(map(len, found.values())))
        ]
        # 2. Right answers gained over each set's own threshold, [S,M]; mostly lost.
        gained[gate] = {name: np.stack([of_seed[name].gained for of_seed in outcomes]) for name in found}
        for name, values in gained[gate].items():
            refined, own = (
                float(np.mean([getattr(of_seed[name], which) for of_seed in outcomes])) for which in ("refined", "own")
            )
            difference = mean_interval(values, resamples).ends
            rows.append({"gate": gate, "data": name, "refined": refined, "own": own, "difference": difference})
    # 3. The margin against each other gate, on the same pictures.
    leads = {
        gate: mean_over_sets([gained[MARGIN][name] - gained[gate][name] for name in found], resamples)
        for gate in GATES
        if gate != MARGIN
    }
    means = {gate: mean_over_sets(list(values.values()), resamples).ends for gate, values in gained.items()}
    shown = {gate: {"difference": lead.ends} for gate, lead in leads.items()}
    return {"share": share, "rows": rows, "means": means, "leads": shown}, leads


class _Outcome(NamedTuple):
    """On one set's test: the shares that the common and its own threshold refine, and the first's gain [M]."""

    refined: float
    own: float
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
        right = [np.where(test[name] < each, given.last, given.correct[0]) for each in (common, own)]
        shares = (float((test[name] < each).mean()) for each in (common, own))
        outcomes[name] = _Outcome(*shares, right[0].astype(float) - right[1].astype(float))
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
    head = ["refined", "gate", *result["seeds"], "mean of the sets [95 %]", "the margin's lead", "p, Holm"]
    lines = []
    for at in result["shares"]:
        for gate, mean in at["means"].items():
            rows = [row for row in at["rows"] if row["gate"] == gate]
            cells = [
                f"{points(row['difference'])} ({100 * row['refined']:.0f} %, {100 * row['own']:.0f} %)" for row in rows
            ]
            lead = at["leads"].get(gate)
            said = ["–", "–"] if lead is None else [points(lead["difference"]), p_value(lead["p"])]
            lines.append([f"{100 * at['share']:.1f} %", gate, *cells, points(mean), *said])
    seeds = min(result["seeds"].values())
    note = (
        "Points of accuracy on test that one threshold for all sets gains over each set's own, when both refine this "
        "share of val; below 0 it loses. In brackets, how much of a set's test the common one refines, and its own. "
        "Pictures of equal confidence are refined together, so a share may not be met. "
        f"{'One training seed' if seeds == 1 else f'{seeds} training seeds'}; intervals resample seeds and pictures, p "
        "is adjusted over the leads."
    )
    parts = [table(head, lines, left=(1,)), note, *([f"Not run:\n\n{lacking}"] if lacking else [])]
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}
