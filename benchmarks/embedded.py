"""The embedded block of Table 2: teacher and WaveCLIP from the committed weights, on real pictures.

Shapes: B images of a batch, M images in all, C classes, E joint dim.

Thresholds are chosen on ``val``; ``test`` gives the numbers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks import WEIGHTS
from benchmarks.timing import seconds
from benchmarks.waveclip.costs import Cost, cost, exit_costs, expected
from benchmarks.waveclip.exits import Outcomes, headline, headline_lines
from common.clip import CLIP
from common.conditions import conditions, digest
from common.data.embedded.module import EmbeddedDataModule, class_names
from common.deploy.early_exit import threshold_for
from common.evaluate.accuracy import paired_difference, wilson_interval
from common.zeroshot import embed_prompts
from waveclip import MarginGate, MaxProbabilityGate, ProgressiveClassifier, WaveTower

TEACHER, STUDENT = WEIGHTS / "embedded_clip.safetensors", WEIGHTS / "embedded_waveclip.safetensors"
TEACHER_96, STUDENT_96 = WEIGHTS / "embedded_clip_96.safetensors", WEIGHTS / "embedded_waveclip_96.safetensors"
"""The same at 96 px, and of two levels: benchmarks/waveclip_highres.py."""
GUIDE = WEIGHTS / "embedded_guide.safetensors"
FASHION_MNIST_ATTRIBUTION = (
    "Trained on the training pictures of Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017), copyright Zalando "
    "SE, MIT licence."
)
RULE = (
    "every emoji of one code point that Twemoji draws and whose CLDR short name has at most 11 characters "
    "(no country flags, keycaps, skin tones or joined sequences), held-out names aside"
)
PART = 500
"""Pictures in one entry of ``counts``, by which a later evaluation of a part is compared with this one."""
_BATCH = 250


def models() -> tuple[CLIP, WaveTower]:
    """The committed teacher and student. ValueError: they are not there (`make retrain` makes them)."""
    for path in (TEACHER, STUDENT):
        if not path.is_file():
            raise ValueError(f"no weights at {path}; `make retrain` trains them")
    return CLIP.load(TEACHER).eval(), WaveTower.load(STUDENT).eval()


def batches(split: str, pictures: int | None, image_size: int | None = None) -> Iterable[Mapping[str, Any]]:
    """A split's batches in its fixed order: all of them, or the first ``pictures`` (a multiple of 250).

    image_size: at which the scenes are drawn; see EmbeddedDataModule.
    """
    loader = EmbeddedDataModule(batch_size=_BATCH, image_size=image_size).dataloader(split, train=False)
    return loader if pictures is None else islice(loader, pictures // _BATCH)


@torch.no_grad()
def readings(
    teacher: CLIP, student: WaveTower, loader: Iterable[Mapping[str, Any]], prompts: list[str]
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """For each batch: the student's class probabilities [B,C] by level, the teacher's cosines [B,C], labels [B].

    loader: batches with "image" [B,3,S,S] and "label".  prompts: one a class, in the order of the labels.
    """
    classes, scale = embed_prompts(teacher, prompts), teacher.logit_scale.exp()
    classifier = ProgressiveClassifier(student, classes, scale, MarginGate(0.0))
    for batch in track(loader, "evaluating"):
        levels = [classifier.probabilities(z) for z in student(batch["image"])]
        yield levels, teacher.encode_image(batch["image"]) @ classes.T, batch["label"]


def observe(teacher: CLIP, student: WaveTower, loader: Iterable[Mapping[str, Any]], prompts: list[str]) -> Outcomes:
    """One pass over ``readings``: what both models say about every picture.

    ValueError: a student of more than one level.
    """
    if student.steps != 2:
        raise ValueError(f"this student has {student.steps - 1} levels; the block is of one")
    found: list[tuple[Tensor, ...]] = []
    for (coarse, fine), dense, labels in readings(teacher, student, loader, prompts):
        guesses = [scores.argmax(-1) for scores in (coarse, fine, dense)]
        right = [guess == labels for guess in guesses]
        confidence = (MarginGate(0.0).confidence(coarse), MaxProbabilityGate(0.0).confidence(coarse))
        found.append((*confidence, *right, guesses[0] == guesses[1]))
    return Outcomes(*(torch.cat(column) for column in zip(*found, strict=True)))


def outcomes(split: str, smoke: bool = False) -> Outcomes:
    """The committed models' outcomes on a split (smoke: its first 500), evaluated once in a process."""
    return _outcomes(split, PART if smoke else None, digest(TEACHER), digest(STUDENT))


@cache
def _outcomes(split: str, pictures: int | None, *weights: str) -> Outcomes:
    prompts = EmbeddedDataModule().class_prompts
    return observe(*models(), batches(split, pictures), prompts)


def costs(teacher: CLIP, student: WaveTower) -> tuple[Cost, list[Cost]]:
    """One picture's cost in the dense teacher, and in the student at each exit; image towers alone."""
    size = teacher.image_tower.image_size
    return cost(teacher.image_tower, size), exit_costs(student, size)


def counts(of: Outcomes) -> dict[str, list[int]]:
    """Right answers among each PART consecutive pictures."""
    return {name: [int(part.sum()) for part in getattr(of, name).split(PART)] for name in ("teacher", "coarse", "fine")}


def measure(shares: Mapping[str, float], smoke: bool = False) -> dict[str, Any]:
    """The block: rows of the teacher and of each operating point, the headline, and counts to check it by.

    shares: see ``operating_points``.
    """
    teacher, student = models()
    names = len(class_names("seen"))
    stated = conditions(
        "embedded",
        seeds=1,
        dtype="float32",
        batch=[1, 64],
        chosen_on="val",
        reported_on="test, read once",
        weights={path.name: digest(path) for path in (TEACHER, STUDENT)},
        names=names,
        rule=RULE,
    )
    val, test = outcomes("val", smoke), outcomes("test", smoke)
    dense, exits = costs(teacher, student)
    rows = operating_points(val, test, dense, exits, shares)
    rates = throughput(teacher, student, {row["method"]: row["threshold"] for row in rows[1:]}, smoke)
    for row, rate in zip(rows, rates, strict=True):
        row["images_per_second"] = rate
        row["speed_ratio"] = {batch: rate[batch] / rates[0][batch] for batch in rate}
    return {
        "conditions": stated,
        "pictures": {"val": len(val.coarse), "test": len(test.coarse)},
        "rows": rows,
        "headline": headline(val, test, exits, dense.macs.gmacs),
        "counts": counts(test),
    }


def operating_points(
    val: Outcomes, test: Outcomes, dense: Cost, exits: Sequence[Cost], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of the teacher and of each operating point: thresholds by their shares on ``val``, numbers of ``test``.

    shares: of refined pictures, by the operating point's name; coarse-only and full are added.
    """
    rows = [{"method": "teacher (dense)", "refined": None} | _row(test.teacher, test, dense)]
    for name, share in {"coarse-only": 0.0, **shares, "full": 1.0}.items():
        threshold = threshold_for(val.margin, share)
        correct, refined = test.at(threshold)
        point = {"method": f"WaveCLIP {name}", "threshold": threshold, "refined": refined}
        rows.append(point | _row(correct, test, expected(exits, [1 - refined, refined])))
    return rows


def _row(correct: Tensor, test: Outcomes, paid: Cost) -> dict[str, Any]:
    return {
        "accuracy": correct.double().mean().item(),
        "interval": wilson_interval(int(correct.sum()), len(correct)),
        "against_teacher": paired_difference(correct, test.teacher),
        "tokens": paid.tokens,
        "gmacs": paid.macs.gmacs,
        "gmacs_paper": paid.macs.gmacs_paper,
    }


def throughput(
    teacher: CLIP, student: WaveTower, thresholds: Mapping[str, float], smoke: bool = False
) -> list[dict[str, float]]:
    """Images/s by batch size ("1", "64") of the dense teacher, then of the real early exit at each threshold.

    The pictures are test's, so that the gate lets through what it does there; scores against all classes are
    part of the time for both. Medians over alternating rounds.
    """
    classes, scale = embed_prompts(teacher, EmbeddedDataModule().class_prompts), teacher.logit_scale.exp()
    pictures = torch.cat([batch["image"] for batch in batches("test", PART)])
    calls: dict[str, Callable[[Tensor], object]] = {
        "teacher": lambda images: (scale * teacher.encode_image(images) @ classes.T).softmax(-1)
    }
    for name, threshold in thresholds.items():
        calls[name] = ProgressiveClassifier(student, classes, scale, MarginGate(threshold)).eval()
    rates: list[dict[str, float]] = [{} for _ in calls]
    for batch, total in ((1, 8), (64, 64)) if smoke else ((1, 128), (64, 448)):
        parts = pictures[:total].split(batch)
        timed = {name: lambda call=call, parts=parts: [call(part) for part in parts] for name, call in calls.items()}
        for rate, taken in zip(rates, seconds(timed, 1 if smoke else 7).values(), strict=True):
            rate[str(batch)] = total / taken
    return rates


def markdown(block: dict[str, Any]) -> str:
    """The block as a Markdown table with the headline and the conditions that it needs to be read rightly."""
    lines = [
        "| embedded scale | refined | accuracy [95 %] | against teacher | tokens | GMACs | saved "
        "| images/s, batch 1 | batch 64 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    dense = block["rows"][0]["gmacs"]
    for row in block["rows"]:
        speed = [f"{row['images_per_second'][batch]:.0f} (×{row['speed_ratio'][batch]:.2f})" for batch in ("1", "64")]
        lines.append(f"| {' | '.join([*cells(row, dense), *speed])} |")
    return "\n\n".join(["\n".join(lines), *headline_lines(block["headline"]), _reading(block)]) + "\n"


def cells(row: dict[str, Any], dense: float) -> list[str]:
    """A row of ``operating_points`` as text: method, refined, accuracy, against the teacher, tokens, GMACs, saved.

    dense: the teacher's GMACs.
    """
    low, high = row["interval"]
    change, least, most = row["against_teacher"]
    return [
        row["method"],
        "–" if row["refined"] is None else f"{100 * row['refined']:.1f} %",
        f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        "–" if row["refined"] is None else f"{100 * change:+.1f} [{100 * least:+.1f}, {100 * most:+.1f}]",
        f"{row['tokens']:.1f}",
        f"{row['gmacs']:.4f}",
        f"{100 * (1 - row['gmacs'] / dense):.1f} %",
    ]


def _reading(block: dict[str, Any]) -> str:
    stated, pictures = block["conditions"], block["pictures"]
    return (
        f"Zero-shot among {stated['names']:,} names: {stated['rule']}. {pictures['test']:,} test pictures; "
        f"thresholds chosen on {pictures['val']:,} of val for the refined shares of the paper's rows. "
        "GMACs count attention on both sides, the image tower's alone, and combine each exit's count by the "
        f"shares measured on test. One training seed. {stated['dtype']} on {stated['device']}, "
        f"{stated['threads']} threads, torch {stated['torch']}; × is the ratio to the dense teacher."
    )
