"""MLIP and its rivals, from scratch on scenes of shape and of texture, by benchmarks/protocol.md.

Shapes: S training seeds, M pictures.

Every number is of test, from the answers that each training left (``benchmarks.mlip.shapes_runs``), in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cells import Result, p_value, points, table
from benchmarks.mlip import shapes_runs
from benchmarks.mlip.shapes_runs import BY_NAME, COMMAND, GUIDE, ROWS, SEEDS
from benchmarks.statistics import RESAMPLES, adjusted_p, difference, mean_interval
from common.conditions import conditions
from common.data.embedded.module import SPLITS, scenes_of


class Claim(NamedTuple):
    """What the paper says: one row names more pictures of test rightly than another one, trained alike."""

    text: str
    better: str
    worse: str


CLAIMS = (
    Claim("MLIP is better than CLIP", "mlip", "clip"),
    Claim("the frequency transform helps", "frequency", "clip"),
    Claim("token alignment helps", "tokens", "clip"),
    Claim("both together help", "frequency-tokens", "clip"),
    Claim("the Guide helps", "mlip", "no-guide"),
    Claim("without the Guide too MLIP is better than CLIP", "no-guide", "clip"),
    Claim("merging without the Guide loses", "frequency-tokens", "no-guide"),
    Claim("frequency one to many, spatial one to one is the best: not one to one, one to many", "mlip", "one-many"),
    Claim("nor one to one twice", "mlip", "one-one"),
    Claim("nor one to many twice", "mlip", "many-many"),
    Claim("label smoothing helps MLIP", "smoothing", "mlip"),
    Claim("nearest neighbours help MLIP", "neighbours", "mlip"),
    Claim("MLIP is better than FILIP", "mlip", "filip"),
    Claim("MLIP is better than SLIP", "mlip", "slip"),
    Claim("MLIP is better than DeCLIP without nearest neighbours", "mlip", "declip-no-neighbours"),
    Claim("DeCLIP is better than MLIP", "declip", "mlip"),
    Claim("MLIP with 90 % of the pictures is better than CLIP with all", "mlip-part", "clip"),
    Claim("frequency features help where texture alone tells the classes", "texture-frequency", "texture-clip"),
)
"""The paper's claims that these rows can test; its Table 1 has DeCLIP above MLIP."""
COMPARISONS = (
    Claim("smoothing that grows, as LightCLIP's, helps MLIP", "growing-smoothing", "mlip"),
    Claim("it is better than smoothing that does not grow", "growing-smoothing", "smoothing"),
    Claim("masked language modelling, as LightCLIP's, helps MLIP", "masking", "mlip"),
    Claim("a filter of the spectrum itself is better than one of its square", "frequency-linear", "frequency"),
    Claim("late interaction helps InfoNCE", "late-interaction", "clip"),
)
"""Further comparisons of these rows, which the paper does not make; no headline rests on them."""
LEVEL = 0.05
"""Of the tests, after Holm's correction over all claims of a table."""
Known = dict[str, list[tuple[dict[str, Any], dict[str, np.ndarray]]]]
"""By row: the result and the answers, bool [M] by kind (ANSWERS), of every finished seed."""


def known(dry: Path | None = None) -> Known:
    """What every finished run left; a row without any is left out.

    dry: the folder of a dry run (``benchmarks.mlip.dry_run``) whose results take their place.
    """
    found: Known = {}
    for row, seed in product(BY_NAME, SEEDS):
        path = dry / "trained" / f"{row}-{seed}.npz" if dry else shapes_runs.answers_file(row, seed)
        if path.is_file() and path.with_suffix(".json").is_file():
            with np.load(path, allow_pickle=False) as file:
                result = json.loads(path.with_suffix(".json").read_text())
                found.setdefault(row, []).append((result, dict(file)))
    return found


def run(smoke: bool = False) -> dict[str, Any]:
    """All rows whose trainings are finished, and the verdicts on the claims. smoke: few resamples."""
    found, resamples = known(), 20 if smoke else RESAMPLES
    guide = shapes_runs.stored(GUIDE)
    return {
        "name": "mlip-shapes",
        "conditions": conditions("embedded", seeds=len(SEEDS), chosen_on="val", reported_on="test"),
        "seeds": {row: [result["conditions"]["seed"] for result, _ in runs] for row, runs in found.items()},
        "trials": {row: shapes_runs.tried(row) for row in (shapes_runs.CLIP, shapes_runs.MLIP_ROW)},
        "chosen": shapes_runs.choice(),
        "precisions": sorted({_alike(result)[1] for runs in found.values() for result, _ in runs}),
        "rows": [measured_row(each, found[each.name], resamples) for each in ROWS if each.name in found],
        "claims": claims(found, resamples),
        "comparisons": claims(found, resamples, COMPARISONS),
        "guide_minutes": guide and guide["minutes"],
    }


def measured_row(of: shapes_runs.Row, runs: Sequence[tuple[dict, dict]], resamples: int = RESAMPLES) -> dict[str, Any]:
    """The share of right answers of each kind with its interval, cost, and means of ``shapes_runs.terms``."""
    results = [result for result, _ in runs]
    accuracies = {
        about: mean_interval(np.stack([answers[about] for _, answers in runs]), resamples).ends for about in runs[0][1]
    }
    means = {name: fmean(result["terms"][name] for result in results) for name in results[0]["terms"]}
    minutes = fmean(result["minutes"] for result in results)
    return {"row": of.name, "gmacs": results[0]["gmacs"], "minutes": minutes, "terms": means} | accuracies


def claims(found: Known, resamples: int, among: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Every claim whose rows are both there: the paired difference on test, p by Holm over them, and a verdict.

    Rows are paired by the seeds that both have in the same precision, and by picture.
    """
    measured = []
    for claim in among:
        if pair := paired(found, claim.better, claim.worse):
            measured.append((claim, difference(*pair, paired_seeds=True, resamples=resamples)))
    adjusted = adjusted_p({claim.text: gap for claim, gap in measured})
    return [
        {
            "claim": claim.text,
            "rows": [claim.better, claim.worse],
            "seeds": gap.seeds,
            "difference": gap.ends,
            "p": adjusted[claim.text],
            "verdict": verdict(gap.seeds, gap.middle, adjusted[claim.text]),
        }
        for claim, gap in measured
    ]


def paired(found: Known, better: str, worse: str, about: str = "test") -> tuple[np.ndarray, np.ndarray] | None:
    """Two rows' answers of one kind, bool [S,M] each, of the seeds that both have in one precision; None: no seed."""
    sides = [{_alike(result): answers[about] for result, answers in found.get(row, [])} for row in (better, worse)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    return tuple(np.stack([side[each] for each in shared]) for side in sides) if shared else None


def _alike(result: Mapping[str, Any]) -> tuple[int, str]:
    """Seed and precision of a training: what two trainings that are compared have in common."""
    return result["conditions"]["seed"], result["conditions"]["precision"]


def verdict(seeds: int, middle: float, p: float) -> str:
    """What a difference says about a claim. Fewer than three seeds say nothing, and p is Holm's."""
    if seeds < len(SEEDS):
        return "one seed alone" if seeds == 1 else f"{seeds} seeds alone"
    if p >= LEVEL:
        return "not shown"
    return "holds here" if middle > 0 else "the opposite here"


def missing(result: Result) -> Iterator[tuple[str, str]]:
    """The trials and rows that are not finished, with the command that trains them."""
    if result["guide_minutes"] is None:
        yield "the Guide", f"{COMMAND} --only guide"
    if result["chosen"] is None:
        yield "trials that choose learning rate and weight decay", f"{COMMAND} --only 'trial-*'"
    for row in ROWS:
        lacking = len(SEEDS) - len(result["seeds"].get(row.name, ()))
        if lacking:
            yield f"{lacking} of {len(SEEDS)} runs of {row.name}", f"{COMMAND} --only '{row.name}-?'"


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    parts = [_trials(result)] if any(result["trials"].values()) else []
    if result["rows"]:
        parts += [_accuracies(result["rows"]), _terms(result["rows"])]
    if result["claims"]:
        parts.append(_verdicts("claim of the paper", result["claims"]))
    if result["comparisons"]:
        parts.append(_verdicts("no claim of the paper", result["comparisons"]))
    if any(missing(result)):
        commands = ", then ".join(f"`{command}`" for command in _commands(result))
        finished = "Not all" if result["rows"] else "None"
        parts.append(f"{finished} of its trainings {'are' if result['rows'] else 'is'} finished: {commands}.")
    return {"md": "\n\n".join([*parts, _note(result)]) + "\n", "figures": {}}


def _commands(result: Result) -> list[str]:
    """The command of each missing part; of many rows that of all."""
    commands = [command for _, command in missing(result)]
    return commands if len(commands) <= 3 else [COMMAND]


def _titles() -> dict[str, str]:
    return {row.name: row.title for row in ROWS}


def _accuracies(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row: accuracy by kind of answer, cost and minutes."""
    names, captions = len(scenes_of(2).class_names("unseen")), SPLITS[2]["retrieval"][0]
    head = [
        "trained from scratch",
        "zero-shot [95 %]",
        f"{names} held-out names",
        f"own caption among {captions:,}",
        "own picture",
        "GMACs",
        "minutes",
    ]
    lines = []
    for row in rows:
        shown = [accuracy(row[about]) if about in row else "–" for about in shapes_runs.ANSWERS]
        lines.append([_titles()[row["row"]], *shown, f"{row['gmacs']:.4f}", f"{row['minutes']:.1f}"])
    return table(head, lines)


def accuracy(ends: Sequence[float]) -> str:
    """A share of right answers and its interval, in %."""
    middle, low, high = (100 * value for value in ends)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _terms(rows: Sequence[dict[str, Any]]) -> str:
    """Each loss's terms, on val or in training: whether each trains at all."""
    names = list(dict.fromkeys(name for row in rows for name in row["terms"]))
    lines = [
        [_titles()[row["row"]], *(f"{row['terms'][name]:.3f}" if name in row["terms"] else "–" for name in names)]
        for row in rows
        if row["terms"]
    ]
    chance = f"In a batch of 128, chance has InfoNCE {np.log(128):.2f} and top-1 {1 / 128:.3f}"
    return (
        table(["terms, on val but where it says so", *(name.replace("_", " ") for name in names)], lines)
        + f"\n\n{chance}; a token term is minus the mean cosine of matched tokens."
    )


def _verdicts(title: str, claims: Sequence[dict[str, Any]]) -> str:
    lines = [
        [claim["claim"], claim["seeds"], points(claim["difference"]), p_value(claim["p"]), claim["verdict"]]
        for claim in claims
    ]
    head = [title, "seeds", "difference, points [95 %]", "p, Holm", "verdict"]
    return table(head, lines, left=(0, 4))


def _trials(result: Result) -> str:
    """Accuracy on val of every finished trial; in bold what was chosen."""
    lines = []
    for row, tried in result["trials"].items():
        for settings, accuracy in tried:
            cells = [f"{settings['learning_rate']:g}", f"{settings['weight_decay']:g}", f"{100 * accuracy:.2f}"]
            if result["chosen"] and settings == result["chosen"][row]:
                cells = [f"**{cell}**" for cell in cells]
            lines.append([_titles()[row], *cells])
    return table(["trials of half the length", "learning rate", "weight decay", "val, %"], lines)


def _note(result: Result) -> str:
    whole = {row["row"]: row["minutes"] for row in result["rows"]}
    share = ""
    if result["guide_minutes"] is not None and "mlip" in whole:
        of = 100 * result["guide_minutes"] / whole["mlip"]
        share = f" The Guide's training took {of:.0f} % of an MLIP row's minutes, once for all rows that read it."
    return (
        f"Embedded scale, from scratch. Scenes of shape: {SPLITS[2]['test'][0]:,} test pictures, "
        f"{len(scenes_of(2).class_names('seen'))} names; scenes of texture: {SPLITS[3]['test'][0]:,}, "
        f"{len(scenes_of(3).class_names('seen'))} textures. Intervals resample seeds and pictures; differences are "
        "paired by both, and p is adjusted over all claims of a table. All rows train with Muon and AdamW"
        f"{' in ' if result['precisions'] else ''}{' or '.join(result['precisions'])}. "
        f"Learning rate and weight decay are the best on val, of {len(shapes_runs.RATES) * len(shapes_runs.DECAYS)} "
        "trials with CLIP for rows of CLIP's tower and as many with MLIP for rows of MLIP's. The Guide saw all "
        f"pictures of train without captions.{share}"
    )
