"""The papers' numbers beside ours, one by one, read out of the result files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

_PAPERS = Path(__file__).parent.parent / "paper"
Result = dict[str, Any]
ELSEWHERE = ("SLIP", "DeCLIP", "UniCLIP")
"""Methods that the papers compare with and that are not part of this suite."""
_WRITTEN = {
    "GMACs": "{:.2f}",
    "tokens": "{:g}",
    "%": "{:.1f}",
    "points": "{:+.1f}",
    "times": "{:.2f}",
    "GPU hours": "{:g}",
    "% a GMAC": "{:.2f}",
    "% an hour": "{:.2f}",
}
"""Units, and how a number of each is written."""
_COLUMNS = {
    "top1": ("zero-shot", "test"),
    "i2t": ("I2T R@1", "i2t"),
    "t2i": ("T2I R@1", "t2i"),
    "lp": ("linear probe", None),
    "top1_b32": ("zero-shot, B/32", None),
    "lp_b32": ("linear probe, B/32", None),
}
"""What MLIP's ablations print: each column's title, and the embedded one beside it, if there is one."""


class Comparison(NamedTuple):
    """One number that a paper prints, and ours.

    what: begins with the method, if it is of one.  ours: None where it was not run.  unit: one of _WRITTEN; "points"
    are of 1 %, "times" as long or as much.  same: whether both are of the same thing. The embedded benchmark stands in
    for the papers' data only in direction, so there no difference is taken.
    """

    what: str
    paper: float
    ours: float | None
    unit: str
    same: bool = True

    @property
    def elsewhere(self) -> bool:
        """Whether it is of a method that this suite does not have."""
        return self.what.startswith(ELSEWHERE)

    def cells(self) -> list[str]:
        """what, paper, ours, difference, as text."""
        written = _WRITTEN[self.unit].format
        missing = "not part of this suite" if self.elsewhere else "not run"
        ours = missing if self.ours is None else written(round(self.ours, 2))
        return [f"{self.what}, {self.unit}", written(self.paper), ours, self._difference()]

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
        yield Comparison(f"{method}, with attention's products", row["paper_gflops"], row["gmacs"], "GMACs")
        yield Comparison(f"{method}, without", row["paper_gflops"], row["gmacs_paper"], "GMACs")
        found = row["accuracy"]
        yield Comparison(f"{method}, top-1", row["paper_accuracy"], found and found["top1"], "%")
    costs = {row["method"]: row["gmacs"] for row in result["paper_scale"]["rows"]}
    stated = _of_paper("waveclip")["savings"]
    for method, key in (("WAVECLIP-high (ViT-B/16)", "high"), ("WAVECLIP at 11.7 GFLOPs (section 4.1)", "prose")):
        saved = 100 * (1 - costs[method] / costs["CLIP ViT-B/16"])
        yield Comparison(f"{method}, saved as stated, against ours counted alike", stated[key], saved, "%")


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
    """Every printed column; of those that we have too, what each row gains over the first that both sides have."""
    for key, (title, own) in _COLUMNS.items():
        rows = [row for row in result["rows"] if key in row["paper"]]
        paper = {row["method"]: row["paper"][key] for row in rows}
        ours = {row["method"]: _by_seed(row, own) for row in rows if row["run"] and own}
        for method, printed in paper.items():
            mean = _mean(ours.get(method, {}).values())
            yield Comparison(f"{method}, {title}", printed, mean, "%", method not in ours)
        base = next(iter(ours), None)
        for method, found in ours.items():
            if method != base:
                gains = {seed: value - ours[base][seed] for seed, value in found.items() if seed in ours[base]}
                gain = paper[method] - paper[base]
                yield Comparison(f"{method} against {base}, {title}", gain, _mean(gains.values()), "points", False)


def _by_seed(row: dict[str, Any], column: str) -> dict[str, float]:
    """One column of a row, in %."""
    return {seed: 100 * found[column] for seed, found in row["seeds"].items()}


def _mean(values: Collection[float]) -> float | None:
    return fmean(values) if values else None


def _evaluated(result: Result) -> Iterator[Comparison]:
    """Tables of `effclip evaluate`'s results, cell by cell."""
    for titles, rows in zip(result["columns"], result["blocks"], strict=True):
        for row in rows:
            for title, paper, ours in zip(titles, row["values"], row["ours"], strict=False):  # means follow
                if paper is not None:
                    yield Comparison(f"{row['method']}, {title}", paper, ours, "%")
            for count, paper in enumerate(row["values"][len(titles) :], start=len(titles)):
                of = row["ours"][:count]
                yield Comparison(f"{row['method']}, mean of {count}", paper, None if None in of else fmean(of), "%")


def _table10(result: Result) -> Iterator[Comparison]:
    """What is printed; then MLIP beside CLIP, all of its time that an embedded step on another machine can say."""
    printed, ours = ({row[key]: row for row in result[of]} for of, key in (("paper", "method"), ("rows", "run")))
    reached = {run: _mean(row["seeds"]) for run, row in ours.items()}
    for method, row in printed.items():
        found = reached.get(row.get("run"))
        yield Comparison(f"{method}, zero-shot", row["accuracy"], found and 100 * found, "%", "run" not in row)
        yield Comparison(f"{method}, training", row["gpu_hours"], None, "GPU hours")
        yield Comparison(f"{method}, zero-shot for the hours of all GPUs", row["ratio"], None, "% an hour")
    clip, mlip, slower = printed["CLIP"], printed["MLIP"], ours["mlip"]["of_reference"]
    what = "MLIP's training, in CLIP's time (ours: a step's)"
    yield Comparison(what, mlip["gpu_hours"] / clip["gpu_hours"], slower, "times", False)
    worth = reached["mlip"] / reached["clip"] / slower if reached["mlip"] and reached["clip"] else None
    yield Comparison("MLIP's zero-shot for its time, in CLIP's", mlip["ratio"] / clip["ratio"], worth, "times", False)


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
        for account, said in (("gmacs", "with attention's products"), ("gmacs_paper", "without")):
            for row in rows:
                ours = row["tower"][account] + row["text"][account]
                yield Comparison(f"{printed['method']} ViT-B/16 and text, {said}", printed["gflops"], ours, "GMACs")
        if not rows:
            yield Comparison(f"{printed['method']} ViT-B/16 and text", printed["gflops"], None, "GMACs")
        yield Comparison(f"{printed['method']}, zero-shot", printed["accuracy"], None, "%")
        yield Comparison(f"{printed['method']}, zero-shot for its cost", printed["ratio"], None, "% a GMAC")


def _costs(result: Result) -> Iterator[Comparison]:
    """What all of Patch Ranking's rows are said to cost, beside a tower with all tokens, and one with 60 % of them."""
    printed = _of_paper("patchrank")["gflops"]
    (pruned,) = (r for r in result["rows"] if (r["layer"], r["keep"], r["method"]) == (3, 0.6, "Patch Ranking"))
    for row, what in ((result["dense"], "all tokens"), (pruned, "60 % of the patches from block 3 on")):
        for account, said in (("gmacs", "with attention's products"), ("gmacs_paper", "without")):
            yield Comparison(f"all rows of its table, ours with {what}, {said}", printed, row[account], "GMACs")


_READERS: dict[str, Callable[[Result], Iterator[Comparison]]] = {
    "waveclip-table1": _table1,
    "table2": _table2,
    "waveclip-fig1": _figure1,
    "waveclip-fig3": _figure3,
    "mlip-table9": _table9,
    **{f"mlip-table{number}": _evaluated for number in (1, 2, 4)},
    "mlip-table10": _table10,
    "patchrank-table1": _patch_ranking,
    "patchrank-costs": _costs,
    **{f"mlip-table{number}": _ablation for number in (3, 5, 6, 7, 8)},
}
