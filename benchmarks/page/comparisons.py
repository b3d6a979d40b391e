"""The papers' numbers beside ours, one by one, read out of the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

_PAPERS = Path(__file__).parent.parent / "paper"
Result = dict[str, Any]


class Comparison(NamedTuple):
    """One number that a paper prints, and ours.

    ours: None where it was not run.  unit: "GMACs", "tokens", "%" or "points" (of 1 %).
    same: whether both are of the same thing. The embedded benchmark stands in for ImageNet only in direction, so
    there no difference is taken.
    """

    what: str
    paper: float
    ours: float | None
    unit: str
    same: bool = True

    def cells(self) -> list[str]:
        """what, paper, ours, difference, as text."""
        written = {"GMACs": "{:.2f}", "tokens": "{:g}", "%": "{:.1f}", "points": "{:+.1f}"}[self.unit]
        ours = "not run" if self.ours is None else written.format(round(self.ours, 2))
        return [f"{self.what}, {self.unit}", written.format(self.paper), ours, self._difference()]

    def _difference(self) -> str:
        if self.ours is None:
            return "–"
        if not self.same:
            return "other scale"
        if self.unit in ("GMACs", "tokens"):
            return f"{round(100 * (self.ours / self.paper - 1), 1) + 0.0:+.1f} %"
        return f"{self.ours - self.paper:+.1f}"


def compare(name: str, result: Result) -> list[Comparison]:
    """All comparisons that a benchmark's result holds; none for one that the papers have no numbers for."""
    return list(_READERS[name](result)) if name in _READERS else []


def _table1(result: Result) -> Iterator[Comparison]:
    for row in result["rows"]:
        if row["levels"] < 2:
            what = f"the full set with {row['levels']} level{'' if row['levels'] == 1 else 's'}"
            yield Comparison(what, result["paper_full"], row["tokens"][-1], "tokens")


def _table2(result: Result) -> Iterator[Comparison]:
    for row in result["paper_scale"]["rows"]:
        method = row["method"]
        if row["paper_tokens"] is not None and row["tokens"] is not None:
            yield Comparison(method, row["paper_tokens"], row["tokens"], "tokens")
        yield Comparison(f"{method}, attention's products counted", row["paper_gflops"], row["gmacs"], "GMACs")
        yield Comparison(f"{method}, left out", row["paper_gflops"], row["gmacs_paper"], "GMACs")
        found = row["accuracy"]
        yield Comparison(f"{method}, top-1", row["paper_accuracy"], found and found["top1"], "%")
    savings = result["paper_scale"]["savings"]
    yield Comparison(
        "saved at WAVECLIP-high, as stated, against ours counted alike", savings["stated"], savings["gmacs"], "%"
    )


def _figure1(result: Result) -> Iterator[Comparison]:
    dense = next(row["accuracy"] for row in result["paper"] if row["method"] == "CLIP ViT-B/16")
    for row in result["paper"]:
        if row.get("refined") is not None:
            nearest = min(result["frontier"], key=lambda point: abs(point["refined"] - row["refined"]))
            ours = 100 * (nearest["accuracy"] - result["teacher"]["accuracy"])
            yield Comparison(f"{row['method']} against its teacher", row["accuracy"] - dense, ours, "points", False)


def _figure3(result: Result) -> Iterator[Comparison]:
    for point in result["points"]:
        yield Comparison(f"extra without a cache, {point['method']}", point["printed"], point["overhead"], "GMACs")


def _ablation(result: Result) -> Iterator[Comparison]:
    """Zero-shot accuracy, and what each row gains over the first that both sides have."""
    rows = [row for row in result["rows"] if "top1" in row["paper"]]
    base = next((row for row in rows if row["run"]), None)
    for row in rows:
        yield Comparison(f"{row['method']}, zero-shot", row["paper"]["top1"], _accuracy(row), "%", False)
        if base is not None and row["run"] and row is not base:
            ours = [
                100 * (found["test"] - base["seeds"][seed]["test"])
                for seed, found in row["seeds"].items()
                if seed in base["seeds"]
            ]
            gain = row["paper"]["top1"] - base["paper"]["top1"]
            what = f"{row['method']} against {base['method']}"
            yield Comparison(what, gain, fmean(ours) if ours else None, "points", False)


def _accuracy(row: dict[str, Any]) -> float | None:
    return 100 * fmean(found["test"] for found in row["seeds"].values()) if row["seeds"] else None


def _patch_ranking(result: Result) -> Iterator[Comparison]:
    """Means over data sets, and the loss that tuning leaves."""
    known = {row["row"]: row["accuracy"] for row in result["rows"]}
    printed = {row["row"]: row for row in _of_paper("patchrank")["table1"]}
    for name, row in printed.items():
        tasks = known.get(name, {})
        ours = 100 * fmean(fmean(seeds) for seeds in tasks.values()) if tasks else None
        yield Comparison(
            f"{row['method']} at one keep rate, mean over data sets", fmean(row["accuracy"]), ours, "%", False
        )
    lost = result["headline"] and -100 * result["headline"]["all"][0]
    yield Comparison(
        "lost by dropping 40 % of the patches, after tuning", _of_paper("patchrank")["loss"], lost, "points", False
    )


def _of_paper(name: str) -> Result:
    return yaml.safe_load((_PAPERS / f"{name}.yaml").read_text())


def _table9(result: Result) -> Iterator[Comparison]:
    for printed in result["paper"]:
        rows = [r for r in result["rows"] if (r["method"], r["architecture"]) == (printed["method"], "ViT-B-16")]
        for account, said in (("gmacs", "attention's products counted"), ("gmacs_paper", "left out")):
            for row in rows:
                ours = row["tower"][account] + row["text"][account]
                yield Comparison(f"{printed['method']} ViT-B/16 with text, {said}", printed["gflops"], ours, "GMACs")
        if not rows:
            yield Comparison(f"{printed['method']} ViT-B/16 with text", printed["gflops"], None, "GMACs")


_READERS: dict[str, Callable[[Result], Iterator[Comparison]]] = {
    "waveclip-table1": _table1,
    "table2": _table2,
    "waveclip-fig1": _figure1,
    "waveclip-fig3": _figure3,
    "mlip-table9": _table9,
    "patchrank-table1": _patch_ranking,
    **{f"mlip-table{number}": _ablation for number in (3, 5, 6, 7, 8)},
}
