"""The embedded block of WAVECLIP's Table 2: the committed teacher and WaveCLIP on scenes of shape.

Shapes: M images, L levels.

Thresholds are chosen on ``val``; ``test`` gives the numbers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import read_log
from benchmarks.cells import accuracy, accuracy_of, points, saved, table
from benchmarks.embedded import LOGGED, MODELS, PART, REVISION, batches, models, prompts
from benchmarks.together.embedded_reference import sentence
from benchmarks.waveclip import controls
from benchmarks.waveclip.costs import Cost, expected
from benchmarks.waveclip.observed import Observed, costs, counts, observed
from benchmarks.waveclip.saving import ALLOWANCE, RESAMPLES, Exits, saving
from common.clip import CLIP
from common.conditions import conditions, digest
from common.early_exit import threshold_for
from common.evaluate.accuracy import paired_difference
from common.timing import seconds
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

COLUMNS = ("refined", "accuracy [95 %]", "against teacher", "tokens", "GMACs", "saved")
"""The heads of ``row_cells``, after that of the method."""


def measure(shares: Mapping[str, float], smoke: bool = False) -> dict[str, Any]:
    """The block: a row of the teacher and of each operating point, the savings, and counts to check it by.

    shares: see ``operating_points``.
    """
    teacher, student = models()
    run_conditions = conditions(
        "embedded",
        seeds=1,
        dtype="float32",
        batch=[1, 64],
        chosen_on="val",
        reported_on="test",
        weights={path.name: digest(path) for path in MODELS[REVISION]},
        names=len(prompts()),
    )
    val, test = observed("val", smoke), observed("test", smoke)
    run_conditions["test_reads"] = max(read_log.reads(path, LOGGED[REVISION]) for path in MODELS[REVISION])
    dense, exits = costs(teacher, student)
    rows = operating_points(val, test, dense, exits, shares)
    rates = throughput(teacher, student, {row["method"]: row["threshold"] for row in rows[1:]}, smoke)
    for row, rate in zip(rows, rates, strict=True):
        row["images_per_second"] = rate
        row["speed_ratio"] = {batch: rate[batch] / rates[0][batch] for batch in rate}
    return {
        "conditions": run_conditions,
        "pictures": {"val": len(val.teacher), "test": len(test.teacher)},
        "rows": rows,
        "savings": savings(val, test, exits, dense, 20 if smoke else RESAMPLES),
        "counts": counts(test),
    }


def operating_points(
    val: Observed, test: Observed, dense: Cost, exits: Sequence[Cost], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of the teacher and of each operating point: thresholds by their shares on ``val``, numbers of ``test``.

    shares: of refined images, by the operating point's name; coarse-only and full are added.
    ValueError: a student of more than one level.
    """
    if len(exits) != 2:
        raise ValueError(f"this student has {len(exits) - 1} levels; the block is of one")
    rows = [{"method": "teacher (dense)", "refined": None} | _row(test.teacher, test, dense)]
    for name, share in {"coarse-only": 0.0, **shares, "full": 1.0}.items():
        threshold = threshold_for(val.margin[0], share)
        correct, (_, refined) = test.at(threshold)
        point = {"method": f"WaveCLIP {name}", "threshold": threshold, "refined": refined}
        rows.append(point | _row(correct, test, expected(exits, [1 - refined, refined])))
    return rows


def _row(correct: Tensor, test: Observed, cost: Cost) -> dict[str, Any]:
    return {
        **accuracy_of(correct),
        "against_teacher": paired_difference(correct, test.teacher),
        "tokens": cost.tokens,
        "gmacs": cost.macs.gmacs,
        "gmacs_paper": cost.macs.gmacs_paper,
    }


def savings(
    val: Observed, test: Observed, exits: Sequence[Cost], dense: Cost, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """What early exit saves at the accuracy of the teacher, and of its own fine level; one training seed."""
    price, lines = (exits[0].macs.gmacs, exits[-1].macs.gmacs), []
    for name, key in (("teacher", "teacher"), (controls.FINE, "fine")):
        chosen, measured = (
            Exits(*(tensor.numpy() for tensor in (seen.margin[0], seen.coarse, seen.fine, getattr(seen, key))))
            for seen in (val, test)
        )
        value = saving([chosen], [measured], price, dense.macs.gmacs, resamples=resamples)
        lines.append(controls.saving_line(controls.WAVE, name, value))
    return lines


def throughput(
    teacher: CLIP, student: WaveTower, thresholds: Mapping[str, float], smoke: bool = False
) -> list[dict[str, float]]:
    """Images/s by batch size ("1", "64") of the dense teacher, then of the real early exit at each threshold.

    The images are test's, so that the gate lets through what it does there. The time includes the scores against all
    classes, for both models. Medians over alternating rounds.
    """
    classes, scale = embed_prompts(teacher, prompts()), teacher.logit_scale.exp()
    images = torch.cat([batch["image"] for batch in batches("test", PART)])
    calls: dict[str, Callable[[Tensor], object]] = {
        "teacher": lambda part: (scale * teacher.encode_image(part) @ classes.T).softmax(-1)
    }
    for name, threshold in thresholds.items():
        calls[name] = ProgressiveClassifier(student, classes, scale, MarginGate(threshold)).eval()
    rates: list[dict[str, float]] = [{} for _ in calls]
    for batch, total in ((1, 8), (64, 64)) if smoke else ((1, 128), (64, 448)):
        parts = images[:total].split(batch)
        rounds = {name: lambda call=call, parts=parts: [call(part) for part in parts] for name, call in calls.items()}
        for rate, duration in zip(rates, seconds(rounds, 1 if smoke else 7).values(), strict=True):
            rate[str(batch)] = total / duration
    return rates


def markdown(block: dict[str, Any]) -> str:
    """The block as a Markdown table, with the savings and the conditions of the run."""
    rows, dense = [], block["rows"][0]["gmacs"]
    for row in block["rows"]:
        speed = [f"{row['images_per_second'][batch]:.0f} (×{row['speed_ratio'][batch]:.2f})" for batch in ("1", "64")]
        rows.append([*row_cells(row, dense), *speed])
    head = ["embedded scale", *COLUMNS, "images/s, batch 1", "batch 64"]
    parts = [table(head, rows), controls.savings_table(block["savings"]), *_won_nothing(block), sentence(REVISION)]
    parts.append(_note(block))
    return "\n\n".join(parts) + "\n"


def _won_nothing(block: dict[str, Any]) -> list[str]:
    """A sentence where the coarse level is surely better than the fine one, so that saving against it means little."""
    (own,) = (line for line in block["savings"] if line["reference"] == controls.FINE)
    if own["refined"] > 0 or own["difference"][1] <= 0:
        return []
    return ["In this run refining won nothing: the coarse level alone is better than the fine one."]


def row_cells(row: dict[str, Any], dense: float) -> list[str]:
    """A row of ``operating_points`` as text: method, refined, accuracy, against the teacher, tokens, GMACs, saved.

    dense: the teacher's GMACs.
    """
    refined = row["refined"]
    return [
        row["method"],
        "–" if refined is None else f"{100 * refined:.1f} %",
        accuracy(row["accuracy"], row["interval"]),
        points(None if refined is None else row["against_teacher"]),
        f"{row['tokens']:.1f}",
        f"{row['gmacs']:.4f}",
        saved(row["gmacs"], dense),
    ]


def _note(block: dict[str, Any]) -> str:
    run, pictures = block["conditions"], block["pictures"]
    return (
        f"Zero-shot among {run['names']:,} names on scenes of shape. {pictures['test']:,} test pictures; thresholds "
        f"are chosen on {pictures['val']:,} of val: a row's for the refined share of the paper's row, a saving's as "
        f"the cheapest whose paired interval stays above -{100 * ALLOWANCE:.1f} points. GMACs count attention on both "
        "sides, the image tower's alone, and combine each exit's count by the shares measured on test. One training "
        "seed, so no headline is drawn; `make reproduce-waveclip-shapes` has the controls and all seeds. Test was read "
        f"{run['test_reads']} times with these models. {run['dtype']} on {run['device']}, {run['threads']} "
        f"threads, torch {run['torch']}; × is the ratio to the dense teacher."
    )
