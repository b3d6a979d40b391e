"""MLIP's Tables 3, 5, 6, 7 and 8: embedded by ``benchmarks.mlip.ablations``, at paper scale by `effclip evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Comparison, Result, mean, missing_runs, percent, points, student_interval, table
from benchmarks.embedded import RULES
from benchmarks.mlip import ablations
from benchmarks.mlip.paper_scale import COLUMNS, evaluated, how, keyed_table, stored
from benchmarks.printed import paper_numbers
from common.conditions import conditions
from common.data.embedded.module import SPLITS, class_names

OURS: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "i2t": ("I2T R@1", lambda run: run["retrieval"]["image_to_text"]["R@1"]),
    "t2i": ("T2I R@1", lambda run: run["retrieval"]["text_to_image"]["R@1"]),
    "test": ("zero-shot", lambda run: run["test"]["top1"]["accuracy"]),
    "unseen": ("held-out names among all", lambda run: run["unseen"]["top1"]),
    "unseen-alone": ("held-out names among themselves", lambda run: run["unseen-alone"]["top1"]),
}
"""Titles of our columns, and the fraction of a run's result that each shows."""
_BESIDE = {"top1": "test", "i2t": "i2t", "t2i": "t2i"}
"""Our column that stands beside one of the paper's; the others have none."""


@dataclass(frozen=True)
class Table:
    """One of the paper's ablations beside ours.

    reference: the run that the others are compared with, seed by seed.  reading: what a reader must know.
    """

    number: str
    reference: str
    reading: str

    @property
    def command(self) -> str:
        """The command that trains its rows."""
        return f"{ablations.COMMAND} --table {self.number}"

    def run(self, smoke: bool = False, dry: Path | None = None) -> dict[str, Any]:
        """The paper's rows with the finished runs' results, and evaluations at paper scale. smoke: the same.

        dry: the folder of a dry run whose results take the stored ones' place.

        ValueError: see ``ablations.results``; two evaluations for one cell.
        """
        known, at_paper_scale, rows, shown = ablations.results(dry), stored(dry), [], []
        for printed in paper_numbers("mlip")[f"table{self.number}"]:
            results = known.get(printed.get("run"), [])
            shown += results
            rows.append(
                {
                    "method": printed["method"],
                    "run": printed.get("run"),
                    "paper": {key: printed[key] for key in COLUMNS if key in printed},
                    "evaluated": evaluated(at_paper_scale, printed),
                    "gmacs": results[0]["gmacs"] if results else None,
                    "seeds": {
                        str(result["conditions"]["seed"]): {key: read(result) for key, (_, read) in OURS.items()}
                        for result in results
                    },
                    "superseded": ablations.reasons(results),
                    "revisions": sorted({str(result["conditions"]["revision"]) for result in results}),
                }
            )
        setting = conditions(
            "embedded",
            seeds=len({result["conditions"]["seed"] for result in shown}),
            names={split: len(class_names(split)) for split in ("seen", "unseen")},
            rule=RULES[1],
            pictures={
                **{split: SPLITS[1][split][0] for split in ("train", "retrieval")},
                "test": ablations.PICTURES,
                "unseen": ablations.HELD_OUT,
            },
            batch=ablations.batch_size(),
            steps=shown[0]["steps"] if shown else None,
        )
        planned = list(ablations.SEEDS)
        return {"name": f"mlip-table{self.number}", "conditions": setting, "planned": planned, "rows": rows}

    def render(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result as {"md": Markdown, "figures": {}}."""
        rows = result["rows"]
        blocks = [_values(rows), *self._differences(rows), self.reading, _setting(result["conditions"])]
        blocks += ablations.superseded({row["method"]: row.get("superseded", []) for row in rows})
        if lacking := _lacking(rows, result["planned"]):
            blocks.append(f"Not run: {lacking}. `{self.command}` trains them.")
        blocks += self._at_paper_scale(rows)
        return {"md": "\n\n".join(blocks) + "\n", "figures": {}}

    def compare(self, result: Result) -> Iterator[Comparison]:
        """Every printed column, beside ours at paper scale where it was evaluated, else embedded.

        Where we have an embedded column, also each row's gain over the first row that was run.
        """
        for key in _BESIDE | COLUMNS:  # zero-shot first
            title, column = COLUMNS[key].title, _BESIDE.get(key)
            rows = [row for row in result["rows"] if key in row["paper"]]
            paper = {row["method"]: row["paper"][key] for row in rows}
            alike = {row["method"]: row.get("evaluated", {}).get(key) for row in rows}
            ours = {row["method"]: _by_seed(row, column) for row in rows if row["run"] and column}
            for method, printed in paper.items():
                if alike[method] is not None:
                    yield Comparison(f"{method}, {title}", printed, alike[method], "%")
                else:
                    value = mean(ours.get(method, {}).values())
                    yield Comparison(f"{method}, {title}", printed, value, "%", method not in ours)
            first = next((method for method, by_seed in ours.items() if by_seed), next(iter(ours), None))
            for method in (method for method in ours if method != first):
                pairs = [(value, ours[first][seed]) for seed, value in ours[method].items() if seed in ours[first]]
                gain = mean([value - reference for value, reference in pairs])
                what = f"{method} against {first}, {title}"
                yield Comparison(what, paper[method] - paper[first], gain, "points", False)

    def missing(self, result: Result) -> Iterator[tuple[str, str]]:
        """The trainings of rows that were not run."""
        rows = ((row["method"], len(row["seeds"]), len(result["planned"])) for row in result["rows"] if row["run"])
        yield from missing_runs(rows, self.command)

    def _at_paper_scale(self, rows: list[dict[str, Any]]) -> list[str]:
        """The table of the paper's rows at the paper's scale, and what fills it."""
        printed = paper_numbers("mlip")[f"table{self.number}"]
        columns = [column for key, column in COLUMNS.items() if any(key in row for row in printed)]
        ours = {row["method"]: row.get("evaluated", {}) for row in rows}
        return [keyed_table("paper scale", printed, ours), how(printed, columns)]

    def _differences(self, rows: list[dict[str, Any]]) -> list[str]:
        """A table of each row's gains over the reference, and a verdict; nothing where no row shares a seed with it."""
        (reference,) = (row for row in rows if row["run"] == self.reference)
        gains = {row["method"]: _gains(row, reference) for row in rows if row["run"] not in (None, self.reference)}
        gains = {method: by_seed for method, by_seed in gains.items() if by_seed}
        if not gains:
            return []
        head = [f"against {reference['method']}, points [95 %]", "seeds", *(title for title, _ in OURS.values())]
        lines = [
            [method, ", ".join(by_seed), *(_points([gain[key] for gain in by_seed.values()]) for key in OURS)]
            for method, by_seed in gains.items()
        ]
        verdicts = "; ".join(
            f"{verdict}: {', '.join(methods)}"
            for verdict in ("better", "worse", "no clear difference", "one seed alone")
            if (methods := [method for method, by_seed in gains.items() if _verdict(by_seed) == verdict])
        )
        note = (
            f"Each run less {reference['method']}'s of the same seed; mean over the seeds that both have, and in "
            "brackets, where they are at least two, Student's 95 % interval of that mean. Zero-shot accuracy beside "
            f"{reference['method']}: {verdicts}."
        )
        return [table(head, lines, left=(0, 1)), note]


def _values(rows: list[dict[str, Any]]) -> str:
    """The table of the paper's numbers and ours, of the rows that have an embedded run."""
    rows = [row for row in rows if row["run"]]
    printed = [key for key in COLUMNS if any(key in row["paper"] for row in rows)]
    ours = ["seeds", *(title for title, _ in OURS.values()), "GMACs"]
    lines = []
    for row in rows:
        cells = [row["method"], *(f"{row['paper'][key]:.1f}" if key in row["paper"] else "–" for key in printed)]
        if row["seeds"]:
            cells.append(", ".join(row["seeds"]))
            cells += [percent([values[key] for values in row["seeds"].values()]) for key in OURS]
            cells.append(f"{row['gmacs']:.4f}")
        else:
            cells += ["not run"] * len(ours)
        lines.append(cells)
    return table(["method", *(f"{COLUMNS[key].title}, paper" for key in printed), *ours], lines)


def _setting(setting: dict[str, Any]) -> str:
    """The note on what all rows have in common, from a result's conditions."""
    names, pictures = setting["names"], setting["pictures"]
    length = ""
    if setting["steps"] is not None:
        length = f" ({setting['steps']:,} steps of {setting['batch']} of the {pictures['train']:,} training pictures)"
    return (
        "Embedded scale, in %: mean ± standard deviation over a row's training seeds, without deviation where there is "
        f"one. All rows start alike, are trained alike long{length}, and read the same pictures where they do not say "
        f"otherwise. Zero-shot: {pictures['test']:,} test pictures among {names['seen']:,} names, by chance "
        f"{100 / names['seen']:.2f}; {setting['rule']}. Held-out names: {names['unseen']}, {pictures['unseen']:,} "
        f"pictures. Retrieval: {pictures['retrieval']:,} pictures with a caption each. The paper's columns are MS-COCO "
        "and ImageNet."
    )


def _lacking(rows: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The seeds that our rows lack: "seeds 1, 2 of MLIP; seed 2 of CLIP"."""
    lacking: dict[str, list[str]] = {}
    for row in (row for row in rows if row["run"]):
        left = [str(seed) for seed in seeds if str(seed) not in row["seeds"]]
        if left:
            lacking.setdefault(f"seed{'s' * (len(left) > 1)} {', '.join(left)}", []).append(row["method"])
    return "; ".join(f"{left} of {', '.join(methods)}" for left, methods in lacking.items())


def _gains(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A row's fractions minus the reference's, by seed and column, for the seeds that both have."""
    return {
        seed: {key: values[key] - reference["seeds"][seed][key] for key in OURS}
        for seed, values in row["seeds"].items()
        if seed in reference["seeds"]
    }


def _verdict(by_seed: dict[str, dict[str, float]]) -> str:
    """The verdict on a row's gains in zero-shot accuracy."""
    if len(by_seed) < 2:
        return "one seed alone"
    _, low, high = student_interval([gain["test"] for gain in by_seed.values()])
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def _points(differences: Sequence[float]) -> str:
    """The mean of paired differences in points; with its interval where there are at least two."""
    if len(differences) == 1:
        return f"{100 * differences[0]:+.1f}"
    return points(student_interval(differences))


def _by_seed(row: dict[str, Any], column: str) -> dict[str, float]:
    """One of our columns of a row, in %."""
    return {seed: 100 * values[column] for seed, values in row["seeds"].items()}


TABLE_3 = Table(
    "3",
    reference="clip",
    reading=(
        "A row's steps show 25,600 pictures: none twice where all 60,000 are read, each about twice of 20 % and eight "
        "to nine times of 5 %. The common start has seen all of them, so a row that reads fewer has lost less here "
        "than one trained on those alone. The paper does not say which part it keeps; here it is the first shards, at "
        "paper scale too. Its rows of YFCC15M are lower than those of its Table 1, so 25 epochs are taken for them."
    ),
)
_SETTINGS = {**ablations.ROWS["smoothing"], **ablations.ROWS["neighbours"]}
TABLE_5 = Table(
    "5",
    reference="mlip",
    reading=(
        f"The paper gives no coefficients: smoothing {_SETTINGS['label_smoothing']}; nearest neighbours in DeCLIP's "
        f"form with half of InfoNCE's weight, {_SETTINGS['neighbour_weight']}, in a queue of "
        f"{_SETTINGS['neighbour_queue'] // ablations.batch_size()} batches. The last two rows are LightCLIP's "
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
