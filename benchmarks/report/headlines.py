"""README's first table: the main results of each method, read from the result files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from benchmarks import RESULTS, cells, registry
from benchmarks.cells import Result, points, saved, student_interval
from benchmarks.mlip.table9 import PRINTED
from benchmarks.patchrank import comparisons
from benchmarks.together import frontier_tables
from benchmarks.training.shapes import COSINE_SHARES
from benchmarks.waveclip import controls
from benchmarks.waveclip.shapes import LEVELS, cosine_alone


@dataclass(frozen=True)
class Line:
    """One line of the table.

    benchmark: the name of its result, or of its results on several devices.
    read: a stored result -> the cell; None: it holds no such run.
    """

    method: str
    measured: str
    benchmark: str
    read: Callable[[Result], str | None]

    @property
    def command(self) -> str:
        """What makes the result."""
        return "make speed" if self.benchmark in ("speed", "loading") else registry.benchmark_of(self.benchmark).command

    def cells(self) -> list[str]:
        """The line's four cells."""
        found = map(self.read, registry.results(self.benchmark, RESULTS))
        cell = "; ".join(part for part in found if part)
        return [self.method, self.measured, cell or "not run", f"`{self.command}`"]


def levels_of_waveclip(result: Result) -> str | None:
    """What WaveCLIP's two levels alone lose against their teacher, over the finished seeds."""
    rows = {row["row"]: row for row in result["rows"]}
    both = [rows[name] for name in LEVELS if "difference" in rows.get(name, {})]
    if not both:
        return None
    return f"{' and '.join(points(row['difference']) for row in both)} points{_remark(both[0]['seeds'])}"


def saved_beside_a_cascade(result: Result) -> str | None:
    """The saving at the teacher's accuracy over the finished seeds, and how much more it is than a cascade's."""
    lines = {line["method"]: line for line in result.get("savings", ()) if line["reference"] == "teacher"}
    if not lines:
        return None
    wave = lines[controls.WAVE]
    shown = controls.verdict(wave)
    shown = controls.saved_share(wave) if shown == controls.SAVES else shown
    return f"{shown}; {controls.beyond_cascade(result['savings'])}{_remark(len(wave['thresholds']))}"


def papers_recipe(result: Result) -> str | None:
    """What both levels lose by the paper's recipe, at the longest training that has enough seeds, or is finished."""
    lengths = []
    for share in COSINE_SHARES:
        rows = [row for row in result["rows"] if row["row"].startswith(cosine_alone(share)) and "difference" in row]
        lengths += [(share, rows)] if rows else []
    if not lengths:
        return None
    share, rows = max(lengths, key=lambda each: (each[1][0]["seeds"] >= controls.HEADLINE_SEEDS, each[0]))
    coarse, fine = (points(row["difference"]) for row in rows)
    return f"{coarse} and {fine} points after {share} % of the teacher's steps{_remark(rows[0]['seeds'])}"


def margin_as_a_gate(result: Result) -> str | None:
    """In how many comparisons the margin surely leads as the common gate of several data sets, or another gate does."""
    if not result["shares"]:
        return None
    said = []
    for measure, name in (("moved", "shares refined"), ("gained", "accuracy")):
        leads = [lead for at in result["shares"] for lead in at["leads"][measure].values()]
        sure = [lead["difference"][0] > 0 for lead in leads if lead["p"] < 0.05]
        said.append(f"{name}: surely ahead in {sum(sure)} of {len(leads)} comparisons, behind in {sure.count(False)}")
    return "; ".join(said) + _remark(min(result["seeds"].values()))


def coarse_on_fashion_mnist(result: Result) -> str:
    """WaveCLIP's loss and saving when every image exits at the coarse level."""
    dense, coarse = result["rows"][:2]
    loss = f"{points(coarse['against_teacher'])} points, {saved(coarse['gmacs'], dense['gmacs'])} saved"
    return loss + _remark(result["conditions"]["seeds"])


def saved_by_mlip(result: Result) -> str:
    """The saving of the paper's image tower with its Guide; attention is counted on both sides."""
    gmacs = {row["method"]: row["tower"]["gmacs"] for row in result["rows"] if row["architecture"] == PRINTED}
    return saved(gmacs["MLIP"], gmacs["CLIP"])


def mlip_against_clip(result: Result) -> str | None:
    """Zero-shot accuracy, mean over the training seeds that both have, with Student's 95 % interval."""
    rows = {row["run"]: row for row in result["rows"]}
    clip, mlip = (rows[name]["seeds"] for name in ("clip", "mlip"))
    differences = [mlip[seed]["test"] - clip[seed]["test"] for seed in mlip if seed in clip]
    again = "".join(f"; being made again, since {why}" for why in rows["mlip"].get("superseded", ()))
    if len(differences) < 2:
        return f"{100 * fmean(differences):+.1f} points (one seed){again}" if differences else None
    found = student_interval(differences)
    shown = "" if found[1] > 0 or found[2] < 0 else "no difference shown: "
    return f"{shown}{points(found)} points{again}"


def pruned_and_tuned(result: Result) -> str | None:
    """Patch Ranking's headline: tuned and pruned against tuned and unpruned, mean of the tasks."""
    headline = result["headline"]
    return headline and (
        f"{points(headline['all'])} points at keep {result['conditions']['keep']}{_remark(headline['seeds'])}"
    )


def ahead_of(rival: str, result: Result) -> str | None:
    """Patch Ranking's lead over a reducer without training, both untuned, at equal GMACs, by task."""
    rows = [row for row in result["rivals"] if (row["rival"], row["basis"]) == (rival, "equal GMACs")]
    if not rows:
        return None
    leads = ", ".join(f"{points(row['lead'])} ({row['task']}: {comparisons.verdict(row)})" for row in rows)
    return f"{leads} points at equal GMACs"


def _remark(seeds: int) -> str:
    """What a cell adds where there is one training seed: its interval is over images alone."""
    return " (one seed)" if seeds == 1 else ""


def best_composition(result: Result) -> str | None:
    """The composition with the highest lower end of its gain; one that refines no picture is WaveCLIP itself."""
    joined = frontier_tables.composed(result["rows"])
    if not joined:
        return None
    best = max(joined, key=lambda row: row["rival"]["difference"][1])
    gain = f"{best['method']}: {points(best['rival']['difference'])} points, best of {len(joined)}"
    shown = gain if frontier_tables.verdict(best) > 0 else f"no gain shown ({gain})"
    if "names" not in result["conditions"]:
        return f"{shown} (revision 1)"
    seeds = best["seeds"]
    return shown if seeds >= controls.HEADLINE_SEEDS else f"{shown} ({controls.counted(seeds, '')})"


def speed_of_towers(result: Result) -> str:
    """Images/s of our image tower over open_clip's."""
    return _on_device(result, (f"× {row['ratio']:.2f} ({row['dtype']})" for row in result["towers"]))


def speed_of_loading(result: Result) -> str:
    """Pairs/s of our shard loader over open_clip's."""
    return _on_device(result, (f"× {row['ratio']:.2f} ({row['pictures']})" for row in result["rows"]))


def _on_device(result: Result, ratios: Iterable[str]) -> str:
    return f"{', '.join(ratios)} on {result['conditions']['device']}"


LINES = (
    Line("WaveCLIP", "coarse and fine level alone against their teacher", "waveclip-shapes", levels_of_waveclip),
    Line(
        "WaveCLIP",
        "multiply-adds saved at its teacher's accuracy, and more than by a cascade of two CLIPs",
        "waveclip-shapes",
        saved_beside_a_cascade,
    ),
    Line("WaveCLIP", "the paper's recipe, both levels against the teacher", "waveclip-shapes", papers_recipe),
    Line("WaveCLIP", "the margin as one gate for several data sets", "waveclip-gates", margin_as_a_gate),
    Line(
        "WaveCLIP",
        "saved on CIFAR-10, and more than by a cascade of two CLIPs",
        "photos-cifar10",
        saved_beside_a_cascade,
    ),
    Line(
        "WaveCLIP",
        "saved on Fashion-MNIST, and more than by a cascade of two CLIPs",
        "fashion-mnist",
        saved_beside_a_cascade,
    ),
    Line("WaveCLIP", "coarse level alone against its teacher, Fashion-MNIST", "fashion-mnist", coarse_on_fashion_mnist),
    Line("MLIP", "multiply-adds saved by the image side of ViT-B/16", "mlip-table9", saved_by_mlip),
    Line("MLIP", "zero-shot accuracy against CLIP trained alike", "mlip-table3", mlip_against_clip),
    Line("Patch Ranking", "accuracy against the unpruned model, both tuned", "patchrank-table1", pruned_and_tuned),
    *(
        Line("Patch Ranking", f"accuracy against {rival}, untuned", "patchrank-table1", partial(ahead_of, rival))
        for rival in ("class attention", "ToMe")
    ),
    Line("composed", "best gain over the best method alone that costs no more", "frontier", best_composition),
    Line("towers", "images/s against open_clip's, ViT-B/16", "speed", speed_of_towers),
    Line("loader", "pairs/s against open_clip's", "loading", speed_of_loading),
)


def table() -> str:
    """The lines as a Markdown table."""
    head = ["method", "measured", "found [95 %]", "command"]
    lines = cells.table(head, [line.cells() for line in LINES], left=range(4))
    note = (
        "Embedded scale, but for the image side of ViT-B/16 and the speeds, which are those of real sizes. WaveCLIP's "
        "first four lines and Patch Ranking's are of revision 2, scenes of shape, Patch Ranking's of CIFAR-10 and "
        "Fashion-MNIST too. The accuracies of MLIP are still of revision 1, which measures colours, as are those whose "
        "cell says so. Each command prints the whole table with its conditions."
    )
    return f"{lines}\n\n{note}\n"
