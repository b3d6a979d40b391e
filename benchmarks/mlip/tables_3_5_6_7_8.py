"""MLIP's Tables 3, 5, 6, 7 and 8 at embedded scale, collected from the runs of ``benchmarks.mlip.ablations``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import Comparison, Result, mean, missing_runs, percent, points, student_interval
from benchmarks.embedded import RULE
from benchmarks.mlip import ablations
from benchmarks.printed import paper_numbers
from common.conditions import conditions
from common.data.embedded.module import SPLITS, class_names

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


_COMPARED = {
    "top1": ("zero-shot", "test"),
    "i2t": ("I2T R@1", "i2t"),
    "t2i": ("T2I R@1", "t2i"),
    "lp": ("linear probe", None),
    "top1_b32": ("zero-shot, B/32", None),
    "lp_b32": ("linear probe, B/32", None),
}
"""What MLIP's ablations print: each column's title, and the embedded one beside it, if there is one."""


@dataclass(frozen=True)
class Table:
    """One of the paper's ablations beside ours.

    reference: the run that the others are compared with, seed by seed.  reading: what the reader must know.
    """

    number: str
    reference: str
    reading: str

    def run(self, smoke: bool = False) -> dict[str, Any]:
        """What the finished runs found; ``python -m benchmarks mlip-ablations`` makes them. smoke: the same.

        ValueError: see ``ablations.results``.
        """
        known, rows, every = ablations.results(), [], []
        for printed in paper_numbers("mlip")[f"table{self.number}"]:
            made = known.get(printed.get("run"), [])
            every += made
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
        stated = conditions(
            "embedded",
            seeds=len({run["conditions"]["seed"] for run in every}),
            names={split: len(class_names(split)) for split in ("seen", "unseen")},
            rule=RULE,
            pictures={
                **{split: SPLITS[split][0] for split in ("train", "retrieval")},
                "test": ablations.PICTURES,
                "unseen": ablations.HELD_OUT,
            },
            batch=ablations.batch_size(),
            steps=every[0]["steps"] if every else None,
        )
        planned = list(ablations.SEEDS)
        return {"name": f"mlip-table{self.number}", "conditions": stated, "planned": planned, "rows": rows}

    def render(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result as {"md": Markdown, "figures": {}}."""
        rows, stated = result["rows"], result["conditions"]
        blocks = [_values(rows), *self._differences(rows), self.reading, _setting(stated)]
        if missing := _missing(rows, result["planned"]):
            blocks.append(f"Not run: {missing}. `{ablations.COMMAND} --table {self.number}` trains them.")
        return {"md": "\n\n".join(blocks) + "\n", "figures": {}}

    def compare(self, result: Result) -> Iterator[Comparison]:
        """Every printed column; of those that we have too, what each row gains over the first that both sides have."""
        for key, (title, own) in _COMPARED.items():
            rows = [row for row in result["rows"] if key in row["paper"]]
            paper = {row["method"]: row["paper"][key] for row in rows}
            ours = {row["method"]: _by_seed(row, own) for row in rows if row["run"] and own}
            for method, printed in paper.items():
                value = mean(ours.get(method, {}).values())
                yield Comparison(f"{method}, {title}", printed, value, "%", method not in ours)
            base = next(iter(ours), None)
            for method, found in ours.items():
                if method != base:
                    gains = {seed: value - ours[base][seed] for seed, value in found.items() if seed in ours[base]}
                    gain = paper[method] - paper[base]
                    yield Comparison(f"{method} against {base}, {title}", gain, mean(gains.values()), "points", False)

    def missing(self, result: Result) -> Iterator[tuple[str, str]]:
        """The rows' trainings that were not run."""
        rows = ((row["method"], len(row["seeds"]), len(result["planned"])) for row in result["rows"] if row["run"])
        yield from missing_runs(rows, f"{ablations.COMMAND} --table {self.number}")

    def _differences(self, rows: list[dict[str, Any]]) -> list[str]:
        """A table of what each row has more than the reference, and what follows; nothing where there is no pair."""
        (reference,) = (row for row in rows if row["run"] == self.reference)
        pairs = {row["method"]: _paired(row, reference) for row in rows if row["run"] not in (None, self.reference)}
        pairs = {method: found for method, found in pairs.items() if found}
        if not pairs:
            return []
        head = [f"against {reference['method']}, points [95 %]", "seeds", *(title for title, _ in OURS.values())]
        lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * len(OURS)}"]
        for method, found in pairs.items():
            cells = [method, ", ".join(found), *(_points([each[key] for each in found.values()]) for key in OURS)]
            lines.append(f"| {' | '.join(cells)} |")
        said = "; ".join(
            f"{word}: {', '.join(methods)}"
            for word in ("better", "worse", "no clear difference", "one seed alone")
            if (methods := [method for method, found in pairs.items() if _judged(found) == word])
        )
        note = (
            f"Each run less {reference['method']}'s of the same seed; mean over the seeds that both have, and in "
            "brackets, where they are at least two, Student's 95 % interval of that mean. Zero-shot accuracy beside "
            f"{reference['method']}: {said}."
        )
        return ["\n".join(lines), note]


def _values(rows: list[dict[str, Any]]) -> str:
    """The table of the paper's numbers and ours."""
    printed = [key for key in PRINTED if any(key in row["paper"] for row in rows)]
    ours = ["seeds", *(title for title, _ in OURS.values()), "GMACs"]
    head = ["method", *(f"{PRINTED[key]}, paper" for key in printed), *ours]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["method"], *(f"{row['paper'][key]:.1f}" if key in row["paper"] else "–" for key in printed)]
        if row["seeds"]:
            cells.append(", ".join(row["seeds"]))
            cells += [percent([found[key] for found in row["seeds"].values()]) for key in OURS]
            cells.append(f"{row['gmacs']:.4f}")
        else:
            cells += ["not run" if row["run"] else "–"] * len(ours)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(stated: dict[str, Any]) -> str:
    """What all rows have in common, from a result's conditions."""
    names, pictures = stated["names"], stated["pictures"]
    length = ""
    if stated["steps"] is not None:
        length = f" ({stated['steps']:,} steps of {stated['batch']} of the {pictures['train']:,} training pictures)"
    return (
        "Embedded scale, in %: mean ± standard deviation over a row's training seeds, without deviation where there is "
        f"one. All rows start alike, are trained alike long{length}, and read the same pictures where they do not say "
        f"otherwise. Zero-shot: {pictures['test']:,} test pictures among {names['seen']:,} names, by chance "
        f"{100 / names['seen']:.2f}; {stated['rule']}. Held-out names: {names['unseen']}, {pictures['unseen']:,} "
        f"pictures. Retrieval: {pictures['retrieval']:,} pictures with a caption each. The paper's columns are MS-COCO "
        "and ImageNet."
    )


def _missing(rows: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The seeds that rows of ours lack: "seeds 1, 2 of MLIP; seed 2 of CLIP"."""
    lacking: dict[str, list[str]] = {}
    for row in (row for row in rows if row["run"]):
        left = [str(seed) for seed in seeds if str(seed) not in row["seeds"]]
        if left:
            lacking.setdefault(f"seed{'s' * (len(left) > 1)} {', '.join(left)}", []).append(row["method"])
    return "; ".join(f"{left} of {', '.join(methods)}" for left, methods in lacking.items())


def _paired(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A row's fractions less the reference's, by column, for each seed that both have."""
    return {
        seed: {key: found[key] - reference["seeds"][seed][key] for key in OURS}
        for seed, found in row["seeds"].items()
        if seed in reference["seeds"]
    }


def _judged(found: dict[str, dict[str, float]]) -> str:
    """What the paired differences of zero-shot accuracy say of a row."""
    if len(found) < 2:
        return "one seed alone"
    _, low, high = student_interval([each["test"] for each in found.values()])
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def _points(differences: Sequence[float]) -> str:
    """The mean of paired differences in points, with its interval where there are several."""
    if len(differences) == 1:
        return f"{100 * differences[0]:+.1f}"
    return points(student_interval(differences))


def _by_seed(row: dict[str, Any], column: str) -> dict[str, float]:
    """One column of a row, in %."""
    return {seed: 100 * found[column] for seed, found in row["seeds"].items()}


TABLE_3 = Table(
    "3",
    reference="clip",
    reading=(
        "A row's steps show 25,600 pictures: none twice where all 60,000 are read, each about twice of 20 % and eight "
        "to nine times of 5 %. The common start has seen all of them, so a row that reads fewer has lost less here "
        "than one trained on those alone. The paper does not say which part it keeps; here it is the first shards."
    ),
)
_SETTINGS = {**ablations.ROWS["smoothing"], **ablations.ROWS["neighbours"]}
TABLE_5 = Table(
    "5",
    reference="mlip",
    reading=(
        f"The paper gives no coefficients: smoothing {_SETTINGS['label_smoothing']}; nearest neighbours with DeCLIP's "
        f"weight {_SETTINGS['neighbour_weight']} in a queue of "
        f"{_SETTINGS['neighbour_queue'] // ablations.batch_size()} batches."
    ),
)
TABLE_6 = Table(
    "6",
    reference="clip",
    reading=(
        "Two rows are not in the paper's table. The power spectrum of equation 10 forgets where the tokens were, so "
        "the frequency transform was also tried on the spectrum itself. FILIP: plain CLIP with late interaction of all "
        "pairs for half of its loss."
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
