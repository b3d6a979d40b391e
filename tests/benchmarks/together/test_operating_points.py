"""The frontier's settings on answers drawn by chance: what is chosen, what a row holds, what it is compared with."""

import numpy as np
import pytest
import torch

from benchmarks.statistics import adjusted_p, difference, mean_interval
from benchmarks.together.compositions import Family
from benchmarks.together.operating_points import (
    best_within,
    compare_rows,
    mark_dominated,
    of_models,
    operating_points,
    outcome,
    settings,
    table_row,
)
from benchmarks.waveclip import controls
from benchmarks.waveclip.controls import CASCADE, HALF, TRAINED_ON, WAVE, SeedAnswers
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.saving import Exits
from common.flops import Macs

MODEL = torch.nn.Identity()


def exits(seed, pictures=200, first=0.6, second=0.8):
    """Answers that are right with the given chances; confidence tells which first answers are."""
    rng = np.random.default_rng(seed)
    right = rng.random(pictures) < first
    sure = (rng.random(pictures) + right).astype(np.float32) / 2
    return Exits(sure, right, rng.random(pictures) < second, right)


def family(name, seeds=(0,), keeps=(None,), composed=False):
    return Family(name, {keep: [MODEL] * len(seeds) for keep in keeps}, [None] * len(seeds), seeds, composed)


def test_the_best_setting_within_a_budget_by_trying_them_all():
    method = family("a", keeps=(0.25, 0.5))
    val = {("a", 0.25): [exits(0)], ("a", 0.5): [exits(1)]}
    costs = {("a", 0.25): [1.0, 2.0], ("a", 0.5): [1.0, 3.0]}
    known = settings(method, val, costs)
    for budget in (1.0, 1.5, 2.0, 3.0):
        tried = []
        for key, (answers,) in val.items():
            order, (first, second) = answers.confidence.argsort(), costs[key]
            for refined in range(0, 201, 2):
                if first + (second - first) * refined / 200 <= budget + 1e-9:
                    right = [answers.second[order[:refined]], answers.first[order[refined:]]]
                    tried.append(np.concatenate(right).mean())
        best = best_within(known, budget)
        assert best.accuracy == pytest.approx(max(tried)) and best.gmacs <= budget + 1e-6
    assert best_within(known, 0.5) is None
    points = operating_points(known, [0.5, 1.0, 1.0, 3.0])
    assert [point.gmacs for point in points] == sorted({point.gmacs for point in points})


def test_a_composition_refines_one_per_cent_at_least():
    answers, costs = {("a", 0.5): [exits(0)]}, {("a", 0.5): [1.0, 2.0]}
    alone, joined = (
        settings(family("a", keeps=(0.5,), composed=composed), answers, costs) for composed in (False, True)
    )
    assert (alone[0].share, joined[0].share) == (0.0, 0.01) and alone[1:] == joined


def test_a_row_is_the_mean_of_its_seeds_each_behind_its_own_threshold():
    method, costs = family("a", seeds=(0, 2)), [1.0, 3.0]
    val, test = ([exits(number) for number in numbers] for numbers in ((0, 1), (2, 3)))
    reached = outcome(val, test, costs, 0.25)
    expected = []
    for on_val, on_test, threshold in zip(val, test, reached.thresholds, strict=True):
        assert (on_val.confidence < threshold).mean() == 0.25
        expected.append(np.where(on_test.confidence < threshold, on_test.second, on_test.first))
    seen = [{("a", None): answers} for answers in (val, test)]
    row = table_row(method, settings(method, seen[0], {("a", None): costs})[25], *seen, {("a", None): costs})
    assert row["accuracy"] == pytest.approx(np.mean([right.mean() for right in expected]))
    assert (row["accuracy"], *row["interval"]) == mean_interval(expected).ends
    refined = np.mean([(seen.confidence < t).mean() for seen, t in zip(test, reached.thresholds, strict=True)])
    assert (row["seeds"], row["share"]) == (2, 0.25) and row["gmacs"] == pytest.approx(1 + 2 * refined)


def test_a_cascades_row_is_that_of_the_table_of_controls():
    def cost(gmacs):
        return Cost(1, Macs(gmacs, gmacs, 0.0, {}, 0))

    val, test = ([SeedAnswers(exits(n), exits(n + 10, first=0.5)) for n in numbers] for numbers in ((0, 1), (2, 3)))
    price = controls.Costs(cost(8.0), [cost(2.0), cost(8.5)], cost(2.5))
    (expected,) = (row for row in controls.rows(val, test, price, {"half": 0.5}) if row["method"] == f"{CASCADE} half")
    part = {name: family(name, (0, 1)) for name in (HALF, TRAINED_ON)}
    method = Family(CASCADE, {None: ()}, (), (0, 1), cascade=(part[HALF], part[TRAINED_ON]))
    on_val, on_test = ([seen.cascade for seen in split] for split in (val, test))
    costs = {(CASCADE, None): [2.5, 10.5]}
    (setting,) = (s for s in settings(method, {(CASCADE, None): on_val}, costs) if s.share == 0.5)
    row = table_row(method, setting, {(CASCADE, None): on_val}, {(CASCADE, None): on_test}, costs)
    for key in ("accuracy", "interval", "refined", "thresholds", "gmacs"):
        assert row[key] == pytest.approx(expected[key]), key


def compared(costs_alone, test_seed=5):
    """A composition's row beside a method alone and WaveCLIP, all of two seeds but the former."""
    methods = [family("alone"), family(WAVE, (0, 1)), family("both", (0, 1), (0.5,), composed=True)]
    costs = {("alone", None): [costs_alone], (WAVE, None): [1.0, 3.0], ("both", 0.5): [1.0, 2.0]}
    val, test = (
        {
            ("alone", None): [exits(seed).second],
            (WAVE, None): [exits(seed + 1), exits(seed + 2)],
            ("both", 0.5): [exits(seed + 3, second=1.0), exits(seed + 4, second=1.0)],
        }
        for seed in (0, test_seed)
    )
    known = {method.name: settings(method, val, costs) for method in methods}
    (setting,) = (s for s in known["both"] if s.share == 0.5)
    row = table_row(methods[2], setting, val, test, costs)
    compare_rows([row], methods, val, test, costs, [3.0])
    return row, known, val, test, costs


def test_a_composition_is_compared_with_the_best_method_alone_that_costs_no_more():
    row, known, val, test, costs = compared(costs_alone=1.6)
    rival = best_within(known[WAVE], row["val"]["gmacs"])
    assert row["rival"]["method"] == WAVE and rival.gmacs <= row["val"]["gmacs"] == 1.5
    theirs = outcome(val[WAVE, None], test[WAVE, None], costs[WAVE, None], rival.share)
    ours = outcome(val["both", 0.5], test["both", 0.5], costs["both", 0.5], 0.5)
    gap = difference(ours.correct, theirs.correct, paired_seeds=True)
    assert row["rival"]["difference"] == list(gap.ends)
    assert row["rival"]["p"] == pytest.approx(adjusted_p({"": gap})[""])


def test_a_composition_meets_waveclip_by_the_seed_that_both_have():
    """Seed 0 came out far better than seeds 1 and 2, whose answers alone are left."""
    wave = Family(WAVE, {None: [MODEL]}, [None], (0,), left={1: None, 2: None})
    both = family("both", keeps=(0.5,), composed=True)
    costs = {(WAVE, None): [1.0, 2.0], ("both", 0.5): [1.0, 2.0]}
    lucky, others = exits(1, first=0.8, second=0.95), [exits(2, 200, 0.4, 0.5), exits(3, 200, 0.4, 0.5)]
    answers = {(WAVE, None): [lucky, *others], ("both", 0.5): [lucky]}
    setting = best_within(settings(both, answers, costs), 2.0)
    row, of_wave = (
        table_row(method, point, answers, answers, costs)
        for method, point in (
            (both, setting),
            (wave, best_within(settings(wave, of_models([wave], {(WAVE, None): answers[WAVE, None]}), costs), 2.0)),
        )
    )
    compare_rows([row], [wave, both], answers, answers, costs, [2.0])
    assert row["rival"]["method"] == WAVE and row["rival"]["difference"] == [0, 0, 0]
    rows = [row | {"seconds": 1.0}, of_wave | {"seconds": 0.9}]
    mark_dominated(rows)
    assert of_wave["accuracy"] < row["accuracy"] - 0.2 and rows[0]["dominated"] == ["seconds"]


def test_a_cheap_and_better_method_of_one_seed_is_the_rival():
    row, _, _, test, _ = compared(costs_alone=1.4)
    assert row["rival"]["method"] == "alone"
    assert row["rival"]["difference"][0] == pytest.approx(row["accuracy"] - test["alone", None][0].mean())


def test_a_reducer_is_compared_with_the_best_one_on_val_within_its_budget_and_all_p_are_adjusted_together():
    """Within 2 GMACs "b" is the best on val, "d" costs more; "a" is far behind it on test, "c" close to it."""
    draw, shares = np.random.default_rng(0), {"a": 0.5, "b": 0.8, "c": 0.79, "d": 0.9}
    methods = [Family(name, {0.5: [MODEL]}, [None], reducer=name) for name in shares]
    costs = {(name, 0.5): [3.0 if name == "d" else 1.5] for name in shares}
    val, test = ({(name, 0.5): [draw.random(2000) < share] for name, share in shares.items()} for _ in range(2))
    val["b", 0.5] = [val["a", 0.5][0] | True]
    rows = [table_row(method, settings(method, val, costs)[0], val, test, costs) for method in methods]
    compare_rows(rows, methods, val, test, costs, [2.0, 4.0])
    a, b, c, d = (row["best"] for row in rows)
    assert b is None and a["method"] == c["method"] == "b", "d is dearer than the budget"
    assert d["method"] == "b", "within 4 GMACs"
    gaps = {name: difference(test[name, 0.5], test["b", 0.5], paired_seeds=True) for name in "acd"}
    assert a["difference"] == list(gaps["a"].ends)
    assert [each["p"] for each in (a, c, d)] == list(adjusted_p(gaps).values())


def row_at(gmacs, seconds, accuracy, composed=False, of_models=None):
    row = {"gmacs": gmacs, "seconds": seconds, "accuracy": accuracy, "composed": composed}
    return row | {"of_models": {"gmacs": gmacs, "accuracy": accuracy if of_models is None else of_models}}


def test_a_row_is_dominated_where_another_is_as_accurate_for_no_more():
    rows = [row_at(1.0, 2.0, 0.5), row_at(2.0, 1.0, 0.5), row_at(3.0, 3.0, 0.6), row_at(3.0, 4.0, 0.6)]
    mark_dominated(rows)
    assert [row["dominated"] for row in rows] == [["seconds"], ["gmacs"], [], ["seconds"]]
