"""The embedded block of WAVECLIP's Table 2: WaveCLIP and its controls on scenes of shape, over training seeds.

Shapes: B images of a batch.

Accuracies come from the answers that each training left: thresholds are chosen on ``val``, numbers are of ``test``.
What is measured here are times, with the models of seed 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import read_log
from benchmarks.cells import accuracy, p_value, points, saved, table
from benchmarks.embedded import LOGGED, MODELS, PART, REVISION, batches, models, prompts
from benchmarks.together.compositions import HalfResolution
from benchmarks.together.embedded_reference import sentence
from benchmarks.together.frontier import cascade
from benchmarks.training.shapes import HALF, LONGER
from benchmarks.waveclip import controls
from benchmarks.waveclip.controls import CASCADE, TEACHER, TRAINED_ON, WAVE
from benchmarks.waveclip.saving import ALLOWANCE, RESAMPLES
from benchmarks.waveclip.shapes import controlled, prices
from common.adaptive import probabilities
from common.clip import CLIP
from common.conditions import conditions, digest
from common.timing import seconds
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier

CONTROLS = (LONGER, HALF)
"""Weights of seed 0: the teacher trained on, and the half-resolution CLIP."""
COLUMNS = ("refined", "accuracy [95 %]", "against teacher", "p, Holm", "tokens", "GMACs", "saved")
"""The heads of ``row_cells``, after that of the method."""


def measure(shares: Mapping[str, float], smoke: bool = False) -> dict[str, Any]:
    """The block: a row of the teacher, each operating point and each control, the savings, and counts to check it by.

    shares: of refined images on val, by the operating point's name; coarse-only and full are added.
    ValueError: a training of WaveCLIP or of a control has left no answers.
    """
    val, test = (controlled(split) for split in ("val", "test"))
    run_conditions = conditions(
        "embedded",
        seeds=len(test),
        dtype="float32",
        batch=[1, 64],
        chosen_on="val",
        reported_on="test",
        weights={path.name: digest(path) for path in MODELS[REVISION]},
        names=len(prompts()),
    )
    run_conditions["test_reads"] = max(
        read_log.reads(path, LOGGED[REVISION]) for path in (*MODELS[REVISION], *CONTROLS)
    )
    price, resamples = prices(), 20 if smoke else RESAMPLES
    rows = controls.rows(val, test, price, shares)
    rates = throughput(rows, smoke)
    for row, rate in zip(rows, rates, strict=True):
        row["images_per_second"] = rate
        row["speed_ratio"] = {batch: rate[batch] / rates[0][batch] for batch in rate}
    return {
        "conditions": run_conditions,
        "pictures": {"val": len(val[0].wave.first), "test": len(test[0].wave.first)},
        "rows": rows,
        "savings": controls.savings(val, test, price, resamples),
        "counts": counts(test[0].right()),
    }


def counts(right: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Right answers among each PART consecutive images, by which a later evaluation of a part is checked.

    right: which answers of each model are right, bool [M].
    """
    return {
        name: [int(correct[start : start + PART].sum()) for start in range(0, len(correct), PART)]
        for name, correct in right.items()
    }


def throughput(rows: Sequence[Mapping[str, Any]], smoke: bool = False) -> list[dict[str, float]]:
    """Images/s of every row's classifier by batch size ("1", "64"), with the real early exit at seed 0's threshold.

    The images are test's, so that a gate lets through what it does there. The time includes the scores against all
    classes, and a half-resolution CLIP's shrinking of the pictures. Medians over alternating rounds.
    """
    images = torch.cat([batch["image"] for batch in batches("test", PART)])
    classifiers = _classifiers(rows)
    rates: list[dict[str, float]] = [{} for _ in rows]
    for batch, total in ((1, 8), (64, 64)) if smoke else ((1, 128), (64, 448)):
        parts = images[:total].split(batch)
        rounds = {row: partial(_answer, call, parts) for row, call in classifiers.items()}
        for rate, duration in zip(rates, seconds(rounds, 1 if smoke else 15).values(), strict=True):
            rate[str(batch)] = total / duration
    return rates


def _answer(classify: Callable[[Tensor], Any], parts: Sequence[Tensor]) -> None:
    for part in parts:
        classify(part)


def _classifiers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Tensor], Any]]:
    """Images [B,3,S,S] -> their class probabilities, by the method of each row, with the models of seed 0."""
    teacher, student = models()
    longer, half = (CLIP.load(path).eval() for path in CONTROLS)
    towers = {TEACHER: (teacher, teacher), TRAINED_ON: (longer, longer), controls.HALF: (half, HalfResolution(half))}
    dense = {}
    for name, (clip, tower) in towers.items():
        classes, scale = embed_prompts(clip, prompts()), clip.logit_scale.exp()
        dense[name] = partial(probabilities, tower, classes=classes, scale=scale)
    calls = {}
    for row in rows:
        gate = MarginGate(row["thresholds"][0]) if row.get("thresholds") else None
        if row["method"] in dense:
            calls[row["method"]] = dense[row["method"]]
        elif row["method"].startswith(CASCADE):
            calls[row["method"]] = partial(cascade, first=dense[controls.HALF], second=dense[TRAINED_ON], gate=gate)
        else:
            assert row["method"].startswith(WAVE)
            classes, scale = dense[TEACHER].keywords["classes"], dense[TEACHER].keywords["scale"]
            calls[row["method"]] = ProgressiveClassifier(student, classes, scale, gate).eval()
    return calls


def markdown(block: dict[str, Any]) -> str:
    """The block as a Markdown table, with the savings and the conditions of the run."""
    rows, dense = [], block["rows"][0]["gmacs"]
    for row in block["rows"]:
        speed = [f"{row['images_per_second'][batch]:.0f} (×{row['speed_ratio'][batch]:.2f})" for batch in ("1", "64")]
        rows.append([*row_cells(row, dense), *speed])
    head = ["embedded scale", *COLUMNS, "images/s, batch 1", "batch 64"]
    seeds = block["conditions"]["seeds"]
    said = controls.headline(block["savings"], seeds, "`make retrain ONLY='shapes-*'`")
    parts = [table(head, rows), said, controls.savings_table(block["savings"]), *_won_nothing(block)]
    return "\n\n".join([*parts, sentence(), _note(block)]) + "\n"


def _won_nothing(block: dict[str, Any]) -> list[str]:
    """A sentence where the coarse level is surely better than the fine one, so that saving against it means little."""
    (own,) = (line for line in block["savings"] if line["reference"] == controls.FINE)
    if own["refined"] > 0 or own["difference"][1] <= 0:
        return []
    return ["In these runs refining won nothing: the coarse level alone is better than the fine one."]


def row_cells(row: dict[str, Any], dense: float) -> list[str]:
    """A row of ``controls.rows`` as text: the method, then ``COLUMNS``.

    dense: the teacher's GMACs.
    """
    refined, reference = row["refined"], row["method"] == TEACHER
    return [
        row["method"],
        "–" if refined is None else f"{100 * refined:.1f} %",
        accuracy(row["accuracy"], row["interval"]),
        points(None if reference else row["against_teacher"]),
        "–" if row.get("p") is None else p_value(row["p"]),
        f"{row['tokens']:.1f}",
        f"{row['gmacs']:.4f}",
        saved(row["gmacs"], dense),
    ]


def _note(block: dict[str, Any]) -> str:
    run, pictures = block["conditions"], block["pictures"]
    return (
        f"Zero-shot among {run['names']:,} names on scenes of shape, {run['seeds']} training seeds. "
        f"{pictures['test']:,} test pictures; thresholds are chosen on {pictures['val']:,} of val: a row's for the "
        f"refined share of the paper's row, a saving's as the cheapest whose paired interval stays above "
        f"-{100 * ALLOWANCE:.1f} points. Intervals resample seeds and pictures; the teacher is one training, that of "
        "seed 0, from which the students start, so its own spread is in none. GMACs count attention on both sides, "
        "the image tower's alone, and combine each exit's count by the shares measured on test. The cascade asks the "
        "half-resolution CLIP first, then the teacher trained on, shares nothing, and pays both; `make "
        "reproduce-waveclip-shapes` has WaveCLIPs from that teacher too. Test was read "
        f"{run['test_reads']} times with the most read of these models; this table reads the answers that their "
        f"trainings left. Images/s are of seed 0: {run['dtype']} on {run['device']}, {run['threads']} threads, torch "
        f"{run['torch']}; × is the ratio to the dense teacher."
    )
