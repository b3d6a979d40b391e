"""README's first table: the main results of each method, read from the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from benchmarks import RESULTS, cells, registry
from benchmarks.cells import Result, points, saved
from benchmarks.mlip.table9 import PRINTED
from benchmarks.patchrank import comparisons
from benchmarks.together import frontier_tables
from benchmarks.training.shapes import COSINE_SHARES
from benchmarks.waveclip import controls
from benchmarks.waveclip.shapes import LEVELS, cosine_alone


class Found(NamedTuple):
    """What a line finds in a result.

    cell: the text.  seeds: training seeds behind it; None: nothing was trained for it.
    """

    cell: str
    seeds: int | None = None


@dataclass(frozen=True)
class Line:
    """One line of the table.

    data: on which it was measured.
    benchmark: the name of its result, or of its results on several devices.
    read: what a stored result says; None: it holds no such run.
    """

    method: str
    measured: str
    data: str
    benchmark: str
    read: Callable[[Result], Found | None]

    @property
    def command(self) -> str:
        """What makes the result."""
        return "make speed" if self.benchmark in ("speed", "loading") else registry.benchmark_of(self.benchmark).command

    def cells(self) -> list[str]:
        """The line's six cells."""
        every = [found for found in map(self.read, registry.results(self.benchmark, RESULTS)) if found]
        said = "; ".join(found.cell for found in every) or "not run"
        seeds = min((found.seeds for found in every if found.seeds), default=None)
        return [self.method, self.measured, self.data, "–" if seeds is None else f"{seeds}", said, f"`{self.command}`"]


def levels_of_waveclip(result: Result) -> Found | None:
    """What WaveCLIP's two levels alone lose against their teacher, over the finished seeds."""
    rows = {row["row"]: row for row in result["rows"]}
    both = [rows[name] for name in LEVELS if "difference" in rows.get(name, {})]
    if not both:
        return None
    return Found(f"{' and '.join(points(row['difference']) for row in both)} points", both[0]["seeds"])


def saved_beside_a_cascade(result: Result) -> Found | None:
    """The saving at the teacher's accuracy over the finished seeds, and how much more it is than a cascade's."""
    lines = {line["method"]: line for line in result.get("savings", ()) if line["reference"] == "teacher"}
    if not lines:
        return None
    wave = lines[controls.WAVE]
    shown = controls.verdict(wave)
    shown = controls.saved_share(wave) if shown == controls.SAVES else shown
    return Found(f"{shown}; {controls.beyond_cascade(result['savings'])}", len(wave["thresholds"]))


def speed_of_waveclip(result: Result) -> Found:
    """Measured images/s of both levels against the dense teacher, one picture at a time and in batches."""
    rows = {row["method"]: row["speed_ratio"] for row in result["embedded"]["rows"]}
    shown = [
        f"× {rows[f'{controls.WAVE} coarse-only'][batch]:.2f} and × {rows[f'{controls.WAVE} full'][batch]:.2f} {name}"
        for batch, name in (("1", "at batch 1"), ("64", "at 64"))
    ]
    return Found(f"{', '.join(shown)} on {result['embedded']['conditions']['device']}")


def papers_recipe(result: Result) -> Found | None:
    """What both levels lose by the paper's recipe, at the longest training that has enough seeds, or is finished."""
    lengths = []
    for share in COSINE_SHARES:
        rows = [row for row in result["rows"] if row["row"].startswith(cosine_alone(share)) and "difference" in row]
        lengths += [(share, rows)] if rows else []
    if not lengths:
        return None
    share, rows = max(lengths, key=lambda each: (each[1][0]["seeds"] >= controls.HEADLINE_SEEDS, each[0]))
    coarse, fine = (points(row["difference"]) for row in rows)
    return Found(f"{coarse} and {fine} points after {share} % of the teacher's steps", rows[0]["seeds"])


def margin_as_a_gate(result: Result) -> Found | None:
    """In how many comparisons the margin surely leads as the common gate of several data sets, or another gate does."""
    if not result["shares"]:
        return None
    said = []
    for measure, name in (("moved", "shares refined"), ("gained", "accuracy")):
        leads = [lead for at in result["shares"] for lead in at["leads"][measure].values()]
        sure = [lead["difference"][0] > 0 for lead in leads if lead["p"] < 0.05]
        said.append(f"{name}: surely ahead in {sum(sure)} of {len(leads)} comparisons, behind in {sure.count(False)}")
    return Found("; ".join(said), min(result["seeds"].values()))


def coarse_on_fashion_mnist(result: Result) -> Found:
    """WaveCLIP's loss and saving when every image exits at the coarse level."""
    dense, coarse = result["rows"][:2]
    loss = f"{points(coarse['against_teacher'])} points, {saved(coarse['gmacs'], dense['gmacs'])} saved"
    return Found(loss, result["conditions"]["seeds"])


def saved_by_mlip(result: Result) -> Found:
    """The saving of the paper's image tower with its Guide; attention is counted on both sides."""
    gmacs = {row["method"]: row["tower"]["gmacs"] for row in result["rows"] if row["architecture"] == PRINTED}
    return Found(saved(gmacs["MLIP"], gmacs["CLIP"]))


def mlip_against_clip(result: Result) -> Found | None:
    """The difference in zero-shot accuracy, paired by seeds and pictures, with the verdict on the paper's claim."""
    for claim in result["claims"]:
        if claim["rows"] == ["mlip", "clip"]:
            return Found(f"{points(claim['difference'])} points: {claim['verdict']}", claim["seeds"])
    return None


def pruned_and_tuned(result: Result) -> Found | None:
    """Patch Ranking's headline: tuned and pruned against tuned and unpruned, mean of the tasks."""
    headline = result["headline"]
    return headline and Found(
        f"{points(headline['all'])} points at keep {result['conditions']['keep']}", headline["seeds"]
    )


def ahead_of(rival: str, result: Result) -> Found | None:
    """Patch Ranking's lead over a reducer without training, both untuned, at equal GMACs, by task."""
    rows = [row for row in result["rivals"] if (row["rival"], row["basis"]) == (rival, "equal GMACs")]
    if not rows:
        return None
    leads = ", ".join(f"{points(row['lead'])} ({row['task']}: {comparisons.verdict(row)})" for row in rows)
    return Found(f"{leads} points at equal GMACs", min(row["seeds"] for row in rows))


def best_composition(result: Result) -> Found | None:
    """The composition with the highest lower end of its gain; one that refines no picture is WaveCLIP itself.

    The gain has the seeds that both it and its rival have.
    """
    joined = frontier_tables.composed(result["rows"])
    if not joined:
        return None
    best = max(joined, key=lambda row: row["rival"]["difference"][1])
    gain = f"{best['method']}: {points(best['rival']['difference'])} points, best of {len(joined)}"
    shown = gain if frontier_tables.verdict(best) > 0 else f"no gain shown ({gain})"
    rivals = [row["seeds"] for row in result["rows"] if row["method"] == best["rival"].get("method")]
    seeds = min([best["seeds"], *rivals])
    return Found(shown if seeds >= controls.HEADLINE_SEEDS else f"{shown}; too few seeds for a headline", seeds)


def speed_of_towers(result: Result) -> Found:
    """Images/s of our image tower over open_clip's."""
    return _on_device(result, (f"× {row['ratio']:.2f} ({row['dtype']})" for row in result["towers"]))


def speed_of_loading(result: Result) -> Found:
    """Pairs/s of our shard loader over open_clip's."""
    return _on_device(result, (f"× {row['ratio']:.2f} ({row['pictures']})" for row in result["rows"]))


def _on_device(result: Result, ratios: Iterable[str]) -> Found:
    return Found(f"{', '.join(ratios)} on {result['conditions']['device']}")


SHAPES = "scenes of shape"
CIFAR, FASHION = "CIFAR-10", "Fashion-MNIST"
ALL_THREE, BIG = f"{SHAPES}, {CIFAR}, {FASHION}", "ViT-B/16 at 224 px"
_SAVED = "multiply-adds saved at its teacher's accuracy, and more than by a cascade of two CLIPs"
LINES = (
    Line(
        "WaveCLIP", "coarse and fine level alone against their teacher", SHAPES, "waveclip-shapes", levels_of_waveclip
    ),
    Line("WaveCLIP", _SAVED, SHAPES, "waveclip-shapes", saved_beside_a_cascade),
    Line("WaveCLIP", "the paper's recipe, both levels against the teacher", SHAPES, "waveclip-shapes", papers_recipe),
    Line("WaveCLIP", "the margin as one gate for several data sets", ALL_THREE, "waveclip-gates", margin_as_a_gate),
    Line("WaveCLIP", _SAVED, CIFAR, "photos-cifar10", saved_beside_a_cascade),
    Line("WaveCLIP", _SAVED, FASHION, "fashion-mnist", saved_beside_a_cascade),
    Line("WaveCLIP", "coarse level alone against its teacher", FASHION, "fashion-mnist", coarse_on_fashion_mnist),
    Line(
        "WaveCLIP",
        "images/s of its coarse level and of both, against its teacher's",
        SHAPES,
        "table2",
        speed_of_waveclip,
    ),
    Line("MLIP", "multiply-adds saved by the image side", BIG, "mlip-table9", saved_by_mlip),
    Line("MLIP", "zero-shot accuracy against CLIP trained alike", SHAPES, "mlip-shapes", mlip_against_clip),
    Line(
        "Patch Ranking",
        "accuracy against the unpruned model, both tuned, mean of the sets",
        ALL_THREE,
        "patchrank-table1",
        pruned_and_tuned,
    ),
    *(
        Line(
            "Patch Ranking",
            f"accuracy against {rival}, untuned",
            ALL_THREE,
            "patchrank-table1",
            partial(ahead_of, rival),
        )
        for rival in ("class attention", "ToMe")
    ),
    Line("composed", "best gain over the best method alone that costs no more", SHAPES, "frontier", best_composition),
    Line("towers", "images/s against open_clip's", BIG, "speed", speed_of_towers),
    Line("loader", "pairs/s against open_clip's", "shards of pictures", "loading", speed_of_loading),
)


def table() -> str:
    """The lines as a Markdown table."""
    head = ["method", "measured", "data", "seeds", "found [95 %]", "command"]
    lines = cells.table(head, [line.cells() for line in LINES], left=(0, 1, 2, 4, 5))
    note = (
        "Accuracies are of the embedded scale, small models that anyone can train again; counts and speeds of ViT-B/16 "
        "are of its real size. Seeds: trainings behind a line, which is no headline with fewer than three. Intervals "
        "resample seeds and pictures; counts and speeds have none here. Each command "
        "prints the whole table with its conditions."
    )
    return f"{lines}\n\n{note}\n"
