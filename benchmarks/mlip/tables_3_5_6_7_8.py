"""MLIP's Tables 3, 5, 6, 7 and 8: embedded by ``benchmarks.mlip.shapes``, at paper scale by `effclip evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Comparison, Result, missing_runs, points, table
from benchmarks.mlip import shapes
from benchmarks.mlip.paper_scale import COLUMNS, evaluated, how, keyed_table, stored
from benchmarks.mlip.shapes_runs import ANSWERS, BY_NAME, COMMAND, SEEDS, batch_size
from benchmarks.printed import paper_numbers
from benchmarks.statistics import RESAMPLES, difference
from common.conditions import conditions

TITLES = {
    "i2t": "own caption (I2T R@1)",
    "t2i": "own picture (T2I R@1)",
    "test": "zero-shot",
    "unseen": "held-out names",
}
"""Our columns, by kind of answer."""
_BESIDE = {"top1": "test", "i2t": "i2t", "t2i": "t2i"}
"""Our column that stands beside one of the paper's; the others have none."""


@dataclass(frozen=True)
class Table:
    """One of the paper's ablations beside ours.

    reference: the row that the others are compared with.  reading: what a reader must know.
    """

    number: str
    reference: str
    reading: str

    def run(self, smoke: bool = False, dry: Path | None = None) -> dict[str, Any]:
        """The paper's rows with the finished trainings' answers, and evaluations at paper scale. smoke: few resamples.

        dry: the folder of a dry run whose results take the stored ones' place.
        ValueError: two evaluations for one cell.
        """
        found, at_paper_scale, resamples = shapes.known(dry), stored(dry), 20 if smoke else RESAMPLES
        rows = [
            {
                "method": printed["method"],
                "run": printed.get("run"),
                "paper": {key: printed[key] for key in COLUMNS if key in printed},
                "evaluated": evaluated(at_paper_scale, printed),
                **self._ours(found, printed.get("run"), resamples),
            }
            for printed in paper_numbers("mlip")[f"table{self.number}"]
        ]
        stated = conditions("embedded", seeds=max(row["seeds"] for row in rows))
        return {"name": f"mlip-table{self.number}", "conditions": stated, "planned": len(SEEDS), "rows": rows}

    def _ours(self, found: shapes.Known, run: str | None, resamples: int) -> dict[str, Any]:
        """A row's seeds, shares of right answers and cost, and the differences that it has from the reference."""
        if run not in found:
            return {"seeds": 0}
        measured = shapes.measured_row(BY_NAME[run], found[run], resamples)
        gains = {}
        for about in ANSWERS if run != self.reference else ():
            if pair := shapes.paired(found, run, self.reference, about):
                gains[about] = difference(*pair, paired_seeds=True, resamples=resamples).ends
        known = {about: measured[about] for about in ANSWERS}
        return {"seeds": len(found[run]), "ours": known, "gmacs": measured["gmacs"], "gains": gains}

    def render(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result as {"md": Markdown, "figures": {}}."""
        rows = result["rows"]
        blocks = [_values(rows), *self._differences(rows), self.reading, _NOTE]
        if lacking := "; ".join(what for what, _ in self.missing(result)):
            blocks.append(f"{lacking}. `{COMMAND}` trains them.")
        blocks += self._at_paper_scale(rows)
        return {"md": "\n\n".join(blocks) + "\n", "figures": {}}

    def compare(self, result: Result) -> Iterator[Comparison]:
        """Every printed column, beside ours at paper scale where it was evaluated, else embedded.

        Where we have an embedded column, also each row's gain over the reference.
        """
        (reference,) = (row for row in result["rows"] if row["run"] == self.reference)
        for key in _BESIDE | COLUMNS:  # zero-shot first
            title, column = COLUMNS[key].title, _BESIDE.get(key)
            rows = [row for row in result["rows"] if key in row["paper"]]
            for row in rows:
                what, printed, alike = f"{row['method']}, {title}", row["paper"][key], row["evaluated"].get(key)
                beside = column if row["run"] else None
                value = 100 * row["ours"][beside][0] if beside and row["seeds"] else None
                if alike is None:
                    yield Comparison(what, printed, value, "%", beside is None)
                else:
                    yield Comparison(what, printed, alike, "%")
            for row in rows if column and key in reference["paper"] else ():
                if row["run"] and row is not reference:
                    gain = row.get("gains", {}).get(column)
                    what = f"{row['method']} against {reference['method']}, {title}"
                    of_paper = row["paper"][key] - reference["paper"][key]
                    yield Comparison(what, of_paper, gain and 100 * gain[0], "points", False)

    def missing(self, result: Result) -> Iterator[tuple[str, str]]:
        """The trainings of rows that were not run."""
        rows = ((row["method"], row["seeds"], result["planned"]) for row in result["rows"] if row["run"])
        yield from missing_runs(rows, COMMAND)

    def _at_paper_scale(self, rows: list[dict[str, Any]]) -> list[str]:
        """The table of the paper's rows at the paper's scale, and what fills it."""
        printed = paper_numbers("mlip")[f"table{self.number}"]
        columns = [column for key, column in COLUMNS.items() if any(key in row for row in printed)]
        ours = {row["method"]: row["evaluated"] for row in rows}
        return [keyed_table("paper scale", printed, ours), how(printed, columns)]

    def _differences(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """A table of each row's gains over the reference; nothing where no row shares a seed with it."""
        (reference,) = (row["method"] for row in rows if row["run"] == self.reference)
        gains = {row["method"]: row["gains"] for row in rows if row.get("gains")}
        if not gains:
            return []
        head = [f"against {reference}, points [95 %]", *TITLES.values()]
        return [table(head, [[method, *(points(gain[key]) for key in TITLES)] for method, gain in gains.items()])]


def _values(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the paper's numbers and ours, of the rows that have an embedded training."""
    rows = [row for row in rows if row["run"]]
    printed = [key for key in COLUMNS if any(key in row["paper"] for row in rows)]
    ours = ["seeds", *(f"{title} [95 %]" for title in TITLES.values()), "GMACs"]
    lines = []
    for row in rows:
        cells = [row["method"], *(f"{row['paper'][key]:.1f}" if key in row["paper"] else "–" for key in printed)]
        if row["seeds"]:
            cells += [row["seeds"], *(shapes.accuracy(row["ours"][key]) for key in TITLES), f"{row['gmacs']:.4f}"]
        else:
            cells += ["not run"] * len(ours)
        lines.append(cells)
    return table(["method", *(f"{COLUMNS[key].title}, paper" for key in printed), *ours], lines)


_NOTE = (
    "Embedded scale, in %: the trainings from scratch of `make reproduce-mlip-shapes`, which says how they were chosen "
    "and gives the verdicts on the paper's claims, with Holm's correction over all. Intervals resample seeds and "
    "pictures; differences are paired by both. The paper's columns are MS-COCO and ImageNet."
)
TABLE_3 = Table(
    "3",
    reference="clip",
    reading=(
        "90 % of the pictures are read as often, in 90 % of the steps. The paper keeps 95 % of CC3M, and 90 % of the "
        "others, and does not say which; here it is the first shards, at paper scale too. Its rows of YFCC15M are "
        "lower than those of its Table 1, so 25 epochs are taken for them."
    ),
)
_CHANGED = BY_NAME["smoothing"].settings["model"] | BY_NAME["neighbours"].settings["model"]
TABLE_5 = Table(
    "5",
    reference="mlip",
    reading=(
        f"The paper gives no coefficients: smoothing {_CHANGED['label_smoothing']}; nearest neighbours in DeCLIP's "
        f"form with half of InfoNCE's weight, {_CHANGED['neighbour_weight']}, in a queue of "
        f"{_CHANGED['neighbour_queue'] // batch_size()} batches. The last two rows are LightCLIP's "
        "additions, which publish no constants: smoothing that grows linearly from 0, and masked words of a corrupted "
        "copy of the caption at DeCLIP's weight."
    ),
)
TABLE_6 = Table(
    "6",
    reference="clip",
    reading=(
        "Three rows are not in the paper's table. The power spectrum of equation 10 forgets where the tokens were, so "
        "the frequency transform was also tried on the spectrum itself. InfoNCE + late interaction: plain CLIP with "
        "FILIP's late interaction of all pairs for half of its loss. FILIP: late interaction alone, of tokens with a "
        "head of their own; names are scored by tokens, retrieval by the tokens' means."
    ),
)
TABLE_7 = Table(
    "7",
    reference="mlip",
    reading="Methods name the matching of frequency tokens, then that of spatial tokens.",
)
TABLE_8 = Table(
    "8",
    reference="mlip",
    reading=(
        "The paper prints one triple for CLIP, SLIP, DeCLIP and MLIP without Guide; CLIP's is 10.4, 6.6, 16.3 in "
        "its Table 6, so only the last two rows can be trusted."
    ),
)
