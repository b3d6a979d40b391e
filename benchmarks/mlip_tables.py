"""MLIP's Tables 3, 5, 6, 7 and 8 at embedded scale, collected from the runs of ``benchmarks.mlip_ablations``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks import mlip_ablations
from benchmarks.mlip_table9 import paper
from common.conditions import conditions

PRINTED = {
    "i2t": "I2T R@1",
    "t2i": "T2I R@1",
    "top1": "zero-shot",
    "lp": "linear probe",
    "top1_b32": "zero-shot, B/32",
    "lp_b32": "linear probe, B/32",
}
"""The paper's columns, those that a table has."""
OURS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "i2t": ("I2T R@1", lambda run: run["retrieval"]["image_to_text"]["R@1"]),
    "t2i": ("T2I R@1", lambda run: run["retrieval"]["text_to_image"]["R@1"]),
    "test": ("zero-shot", lambda run: run["test"]["top1"]["accuracy"]),
    "unseen": ("held-out names among all", lambda run: run["unseen"]["top1"]),
    "unseen-alone": ("held-out names among themselves", lambda run: run["unseen-alone"]["top1"]),
}
"""Our columns, fractions, and where a run's result has them."""


@dataclass(frozen=True)
class Table:
    """One of the paper's ablations beside ours.

    reference: the run that the others are compared with, seed by seed.  reading: what the reader must know.
    """

    number: str
    reference: str
    reading: str

    def run(self, smoke: bool = False) -> dict[str, Any]:
        """What the finished runs found; ``python -m benchmarks mlip-ablations`` makes them. smoke: the same."""
        known, rows = mlip_ablations.results(), []
        for printed in paper()[f"table{self.number}"]:
            made = known.get(printed.get("run"), [])
            rows.append(
                {
                    "method": printed["method"],
                    "run": printed.get("run"),
                    "paper": {key: printed[key] for key in PRINTED if key in printed},
                    "gmacs": made[0]["gmacs"] if made else None,
                    "seeds": {
                        str(run["conditions"]["seed"]): {key: take(run) for key, (_, take) in OURS.items()}
                        for run in made
                    },
                    "revisions": sorted({str(run["conditions"]["revision"]) for run in made}),
                }
            )
        return {"name": f"mlip-table{self.number}", "conditions": conditions("embedded"), "rows": rows}

    def render(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result as {"md": Markdown, "figures": {}}."""
        rows = result["rows"]
        seeds = {len(row["seeds"]) for row in rows if row["run"]}
        missing = f" Not run yet: `{mlip_ablations.COMMAND} --table {self.number}`." if 0 in seeds else ""
        note = (
            f"Embedded scale, mean ± standard deviation over {max(seeds)} training seeds, in %. Same start, steps and "
            f"data for every row. The paper's columns are MS-COCO and ImageNet.{missing}"
        )
        blocks = [_values(rows), *self._differences(rows), self.reading, note]
        return {"md": "\n\n".join(blocks) + "\n", "figures": {}}

    def _differences(self, rows: list[dict[str, Any]]) -> list[str]:
        """A table of what each row has more than the reference, and what follows; nothing where there is no pair."""
        (reference,) = (row for row in rows if row["run"] == self.reference)
        pairs = {row["method"]: _paired(row, reference) for row in rows if row["run"] not in (None, self.reference)}
        pairs = {method: found for method, found in pairs.items() if found}
        if not pairs:
            return []
        head = [f"against {reference['method']}, points [95 %]", *(title for title, _ in OURS.values())]
        lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * len(OURS)}"]
        for method, found in pairs.items():
            lines.append(f"| {' | '.join([method, *(_points(found[key]) for key in OURS)])} |")
        groups: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
        for method, found in pairs.items():
            _, low, high = found["test"]
            groups["better" if low > 0 else "worse" if high < 0 else "no clear difference"].append(method)
        said = "; ".join(f"{word}: {', '.join(methods)}" for word, methods in groups.items() if methods)
        note = (
            "Differences of runs with one seed; brackets: Student's 95 % interval of their mean. Zero-shot accuracy "
            f"beside {reference['method']}: {said}."
        )
        return ["\n".join(lines), note]


def _values(rows: list[dict[str, Any]]) -> str:
    """The table of the paper's numbers and ours."""
    printed = [key for key in PRINTED if any(key in row["paper"] for row in rows)]
    head = ["method", *(f"{PRINTED[key]}, paper" for key in printed), *(title for title, _ in OURS.values()), "GMACs"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["method"], *(f"{row['paper'][key]:.1f}" if key in row["paper"] else "–" for key in printed)]
        if row["seeds"]:
            cells += [spread([found[key] for found in row["seeds"].values()]) for key in OURS]
            cells.append(f"{row['gmacs']:.4f}")
        else:
            cells += ["not run" if row["run"] else "–"] * (len(OURS) + 1)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _paired(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """A row's fractions less the reference's, over the seeds that both have: by column the mean and its interval."""
    shared = [seed for seed in row["seeds"] if seed in reference["seeds"]]
    if not shared:
        return {}
    return {key: interval([row["seeds"][seed][key] - reference["seeds"][seed][key] for seed in shared]) for key in OURS}


def interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of differences between paired runs, and Student's interval of it: without bounds where there is one pair."""
    mean, pairs = fmean(differences), len(differences)
    if pairs < 2:
        return mean, float("-inf"), float("inf")
    half = student.ppf((1 + confidence) / 2, pairs - 1) * stdev(differences) / pairs**0.5
    return mean, mean - half, mean + half


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of fractions, in %."""
    mean = f"{100 * fmean(values):.1f}"
    return f"{mean} ± {100 * stdev(values):.1f}" if len(values) > 1 else mean


def _points(found: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f}" if high == float("inf") else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
