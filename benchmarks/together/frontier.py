"""The three methods and their controls on one frontier: accuracy against multiply-adds and time, alone and composed.

Shapes: B images of a batch, M images, L steps of a model (1 without early exit), C classes, E joint dim.

A method's operating points are its best settings on ``val`` within budgets of multiply-adds, measured on ``test``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import read_log
from benchmarks.embedded import LOGGED, MODELS, PART, REVISION, batches, models, prompts
from benchmarks.patchrank.methods import REVISION as REDUCERS
from benchmarks.together import compositions
from benchmarks.together.compositions import (
    BUDGETS,
    DENSE,
    FEW,
    RANDOM,
    SEEDED,
    TRAINED,
    WAVE,
    Family,
    compose,
    families,
    training_free,
    weights_of,
)
from benchmarks.together.frontier_tables import missing, render
from benchmarks.together.operating_points import (
    BySeed,
    Key,
    Setting,
    best_within,
    compare_rows,
    mark_dominated,
    operating_points,
    settings,
    table_row,
)
from benchmarks.waveclip.answers import answers_of_all
from benchmarks.waveclip.answers import read as read_answers
from common.adaptive import path_costs, probabilities
from common.clip import CLIP
from common.conditions import conditions
from common.stages import stages_of
from common.timing import seconds
from common.zeroshot import embed_prompts
from waveclip import MarginGate, ProgressiveClassifier, WaveTower
from waveclip.reduced import ReducedWaveTower

__all__ = ["measure", "missing", "render", "run"]

PICTURES = {"val": 2000, "test": 4000}
"""How many of the first images of each split: more would take longer than half an hour."""
TIMED, BATCH, ROUNDS = 256, 64, 3
Texts = Mapping[CLIP, tuple[Tensor, Tensor]]
"""Class embeddings [C,E] and the multiplier of the cosines, of each CLIP."""
Classify = Callable[[Tensor], Any]
"""Images [B,3,S,S] -> their class probabilities, [B,C] or in a ``Prediction``."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Every method's operating points with accuracy, GMACs and time, and what each composition adds.

    smoke: few reducers, two budgets, 250 pictures. ValueError: no weights of teacher or WaveCLIP.
    """
    teacher, wave = models()
    teachers = {0: teacher} | {seed: CLIP.load(path).eval() for seed, path in weights_of(DENSE).items() if seed}
    waves = {0: wave} | {seed: WaveTower.load(path).eval() for seed, path in weights_of(WAVE).items() if seed}
    students = {seed: (each, teacher) for seed, each in waves.items()}  # all start from the teacher of seed 0
    few = (dict.fromkeys(PICTURES, 250), BUDGETS[1:3], 1)
    pictures, budgets, rounds = few if smoke else (PICTURES, BUDGETS, ROUNDS)
    methods = families(teachers, students, FEW if smoke else training_free(), budgets)
    weights = {*MODELS[REVISION], *(path for path, _ in TRAINED.values() if path.is_file())}
    weights = sorted(weights.union(*(weights_of(name).values() for name in SEEDED)))
    if not smoke:
        read_log.record("frontier", LOGGED[REVISION], weights)
    run_conditions = conditions(
        "embedded",
        seeds=len(methods[-1].all_seeds),
        weights=read_log.digests(weights),
        **{"chosen_on": "val, its first pictures", "reported_on": "test, its first pictures"},
        test_reads=max(read_log.reads(path, LOGGED[REVISION]) for path in weights),
        **{"dtype": "float32", "batch": BATCH, "rounds": rounds, "reducers": REDUCERS, "names": len(prompts())},
    )
    timed = torch.cat([batch["image"] for batch in batches("test", PART)])[: BATCH if smoke else TIMED]
    splits = [list(batches(split, pictures[split])) for split in ("val", "test")]
    composing = partial(compose, students=students, smoke=smoke)
    rows = measure(methods, composing, *splits, prompts(), budgets, timed, rounds)
    return {
        "name": "frontier",
        "conditions": run_conditions,
        "pictures": pictures,
        "budgets": list(budgets),
        "rows": rows,
        "missing": compositions.missing(),
    }


def measure(
    alone: Sequence[Family],
    compose: Callable[[Sequence[str]], list[Family]],
    val: Iterable[Mapping[str, Any]],
    test: Iterable[Mapping[str, Any]],
    prompts: list[str],
    budgets: Sequence[float],
    timed: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for every method's best setting on ``val`` within each budget, with its numbers on ``test`` and its time.

    alone: the dense teacher first.  compose: names of reducers -> compositions with them.  val: batches, which are
    read twice.  prompts: one a class.  timed: the images that are timed [M,3,S,S].
    """
    costs = costs_of(alone, timed.shape[-1])
    limits = [costs[DENSE, None][0] * share for share in budgets]
    # 1. On val, every setting of each method alone, and of the compositions with the reducers that are best alone.
    on_val = observe(alone, val, prompts, "val")
    known = {method.name: settings(method, on_val, costs) for method in alone}
    best = best_reducers(alone, known, limits)
    joined = compose(best)
    costs |= costs_of(joined, timed.shape[-1])
    on_val |= observe([alone[0], *joined], val, prompts, "val")
    known |= {method.name: settings(method, on_val, costs) for method in joined}
    # 2. The best of them within each budget, and on test the numbers of those alone.
    methods = [*alone, *joined]
    chosen = [(method, point) for method in methods for point in operating_points(known[method.name], limits)]
    on_test = observe(methods, test, prompts, "test", {point.key for _, point in chosen})
    rows = [table_row(method, point, on_val, on_test, costs) for method, point in chosen]
    for row, (method, _) in zip(rows, chosen, strict=True):
        row["named"] = method.composed or not method.reducer or method.reducer in best
    # 3. WaveCLIP and each composition against the best other method alone, each reducer against the best one within
    # its budget, then all rows by the clock.
    compare_rows(rows, methods, on_val, on_test, costs, limits)
    texts = class_texts(methods, prompts)
    for row, duration in zip(rows, seconds_per_image(rows, methods, timed, texts, rounds), strict=True):
        row["seconds"] = duration
    mark_dominated(rows)
    return rows


def best_reducers(
    methods: Sequence[Family], known: Mapping[str, Sequence[Setting]], budgets: Sequence[float]
) -> list[str]:
    """The reducers that are the best on ``val`` within a budget of GMACs, and random as their control; in list order.

    methods, known: those alone, and their settings by name.
    """
    by_name = {method.name: method.reducer for method in methods if method.reducer}
    candidates = [setting for name in by_name for setting in known[name]]
    best = {by_name[setting.method] for budget in budgets if (setting := best_within(candidates, budget))}
    return [name for name in by_name.values() if name in best | {RANDOM}]


def costs_of(methods: Sequence[Family], image_size: int) -> dict[Key, Sequence[float]]:
    """GMACs of one image that leaves each model at each step [L]; a cascade pays both of its models."""
    costs = {
        (method.name, keep): path_gmacs(of_seed[0], image_size)
        for method in methods
        for keep, of_seed in method.models.items()
        if not method.cascade
    }
    for method in (method for method in methods if method.cascade):
        (first,), (second,) = (costs[part.name, None] for part in method.cascade)
        costs[method.name, None] = [first, first + second]
    return costs


def path_gmacs(model: nn.Module, image_size: int) -> list[float]:
    """GMACs of one image that exits at each level of a model [L]."""
    return [macs.gmacs for macs in path_costs(stages_of(model), image_size)]


def observe(
    methods: Sequence[Family],
    loader: Iterable[Mapping[str, Any]],
    prompts: Sequence[str],
    split: str,
    chosen: Collection[Key] | None = None,
) -> dict[Key, BySeed]:
    """The answers of every model of every seed, in one pass over the images.

    loader: the first images of ``split``, from which answers that trainings left are taken, too.
    chosen: the models to evaluate, the dense teacher among them, and with a cascade both its parts; None: all.
    """
    keys = [(m, keep) for m in methods for keep in m.models if chosen is None or (m.name, keep) in chosen]
    read = answers_of_all(
        {
            (method.name, keep, seed): (model, clip)
            for method, keep in keys
            if not method.cascade
            for seed, model, clip in zip(method.seeds, method.models[keep], method.clips, strict=True)
        },
        loader,
        prompts,
    )
    teacher, seen = read[DENSE, None, 0].last, {}
    for method, keep in keys:
        if method.cascade:
            parts = ([read[part.name, None, seed] for seed in method.seeds] for part in method.cascade)
            seen[method.name, keep] = [first.cascade(second, teacher) for first, second in zip(*parts, strict=True)]
        else:
            answers = [read[method.name, keep, seed] for seed in method.seeds]
            answers += [read_answers(path)[split].first(len(teacher)) for path in method.left.values()]
            seen[method.name, keep] = [
                answer.exits(teacher) if len(answer.correct) > 1 else answer.last for answer in answers
            ]
    return seen


def class_texts(methods: Iterable[Family], prompts: list[str]) -> Texts:
    """Class embeddings by the CLIP of each method's first seed. prompts: one a class."""
    clips = {method.clips[0] for method in methods if method.clips}
    return {clip: (embed_prompts(clip, prompts), clip.logit_scale.exp()) for clip in clips}


def seconds_per_image(
    rows: Sequence[dict[str, Any]], methods: Sequence[Family], images: Tensor, texts: Texts, rounds: int
) -> list[float]:
    """Measured seconds of every row, from images [M,3,S,S] to class probabilities, with the real early exit.

    The models are those of each method's first seed.
    """
    by_name, parts = {method.name: method for method in methods}, images.split(BATCH)
    calls: dict[int, Callable[[], object]] = {}
    for number, row in enumerate(rows):
        threshold = row["thresholds"][0] if row["thresholds"] else None
        call = classifier(by_name[row["method"]], row["keep"], threshold, texts)
        calls[number] = lambda call=call: [call(part) for part in parts]
    return [duration / len(images) for duration in seconds(calls, rounds).values()]


def classifier(method: Family, keep: float | None, threshold: float | None, texts: Texts) -> Classify:
    """What a method's first seed answers at a setting. threshold: of the margin; None without early exit."""
    if method.cascade:
        first, second = (classifier(part, None, None, texts) for part in method.cascade)
        return partial(cascade, first=first, second=second, gate=MarginGate(threshold))
    model, (classes, scale) = method.models[keep][0], texts[method.clips[0]]
    if isinstance(model, WaveTower | ReducedWaveTower):
        return ProgressiveClassifier(model, classes, scale, MarginGate(threshold)).eval()
    return partial(probabilities, model, classes=classes, scale=scale)


def cascade(images: Tensor, first: Classify, second: Classify, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """Class probabilities [B,C] by ``first``, and by ``second`` for the images whose gate stays closed."""
    scores = first(images)
    rows = (~gate(scores)).nonzero().squeeze(1)
    if len(rows):
        scores[rows] = second(images[rows])
    return scores
