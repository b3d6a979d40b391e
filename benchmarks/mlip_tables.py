"""MLIP's Tables 3, 5, 6, 7 and 8 at embedded scale, collected from the runs of ``benchmarks.mlip_ablations``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

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
    "test": ("zero-shot", lambda run: run["test"]["top1"]),
    "unseen": ("zero-shot, held-out names", lambda run: run["unseen-alone"]["top1"]),
}
"""Our columns, fractions, and where a run's result has them; held-out names are scored among themselves."""


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
        printed = [key for key in PRINTED if any(key in row["paper"] for row in result["rows"])]
        head = [
            "method",
            *(f"{PRINTED[key]}, paper" for key in printed),
            *(title for title, _ in OURS.values()),
            f"zero-shot against {self.reference}",
            "GMACs",
        ]
        lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
        (reference,) = (row["seeds"] for row in result["rows"] if row["run"] == self.reference)
        for row in result["rows"]:
            cells = [row["method"], *(f"{row['paper'][key]:.1f}" if key in row["paper"] else "–" for key in printed)]
            lines.append(f"| {' | '.join([*cells, *_ours(row, reference)])} |")
        seeds = {len(row["seeds"]) for row in result["rows"] if row["run"]}
        missing = f" Not run yet: `python -m benchmarks mlip-ablations --table {self.number}`." if 0 in seeds else ""
        note = (
            f"Embedded scale, mean ± standard deviation over {max(seeds)} training seeds; the last difference is that "
            "of runs with the same seed. Same steps and data for every row. The paper's columns are MS-COCO and "
            f"ImageNet.{missing}"
        )
        return {"md": "\n".join([*lines, "", self.reading, "", note]) + "\n", "figures": {}}


def _ours(row: dict[str, Any], reference: dict[str, dict[str, float]]) -> list[str]:
    """The cells of what we measured, and of the difference to the reference."""
    seeds = row["seeds"]
    if not seeds:
        return ["not run" if row["run"] else "–"] * (len(OURS) + 2)
    cells = [_spread([found[key] for found in seeds.values()]) for key in OURS]
    paired = [found["test"] - reference[seed]["test"] for seed, found in seeds.items() if seed in reference]
    difference = _spread(paired, signed=True) if paired and seeds is not reference else "–"
    return [*cells, difference, f"{row['gmacs']:.4f}"]


def _spread(values: list[float], signed: bool = False) -> str:
    """Mean ± standard deviation of fractions, in %."""
    mean = f"{100 * fmean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {100 * stdev(values):.1f}" if len(values) > 1 else mean
