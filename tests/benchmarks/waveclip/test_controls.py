"""WaveCLIP beside its controls, on answers drawn by chance: what a row holds, what is compared, what is said."""

import numpy as np
import pytest
import torch

from benchmarks.statistics import adjusted_p, difference, mean_interval
from benchmarks.waveclip import controls
from benchmarks.waveclip.answers import Answers
from benchmarks.waveclip.controls import (
    CASCADE,
    HALF,
    TRAINED_ON,
    WAVE,
    Costs,
    SeedAnswers,
    curve,
    curves,
    headline,
    rows,
    savings,
    savings_table,
    seed_answers,
)
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.saving import Exits
from common.early_exit import NEVER, threshold_for
from common.flops import Macs

SHARES = {"half": 0.5}


def cost(tokens, gmacs):
    return Cost(tokens, Macs(gmacs, gmacs, 0.0, {}, 0))


COSTS = Costs(cost(65, 8.0), [cost(17, 2.0), cost(66, 8.5)], cost(17, 2.0))


def seen(seed, pictures=400):
    """Answers that are right with the given chances; confidence tells which first answers are."""
    rng = np.random.default_rng(seed)
    teacher, coarse, fine, trained_on, half = (rng.random(pictures) < p for p in (0.7, 0.6, 0.75, 0.72, 0.55))
    sure, unsure = (rng.random(pictures) * 0.5 + 0.5 * right for right in (coarse, half))
    return SeedAnswers(Exits(sure, coarse, fine, teacher), Exits(unsure, half, trained_on, teacher))


@pytest.fixture(scope="module")
def splits():
    return [seen(number) for number in (0, 1)], [seen(number) for number in (10, 11)]


def test_rows_are_the_teacher_waveclip_and_the_controls(splits):
    val, test = splits
    table = {row["method"]: row for row in rows(val, test, COSTS, SHARES)}
    points = [f"{WAVE} {point}" for point in ("coarse-only", "half", "full")]
    assert list(table) == ["teacher (dense)", *points, TRAINED_ON, HALF, f"{CASCADE} half"]
    for name, right in {
        "teacher (dense)": [part.wave.reference for part in test],
        f"{WAVE} coarse-only": [part.wave.first for part in test],
        f"{WAVE} full": [part.wave.second for part in test],
        TRAINED_ON: [part.cascade.second for part in test],
        HALF: [part.cascade.first for part in test],
    }.items():
        interval = mean_interval(right)
        assert (table[name]["accuracy"], *table[name]["interval"]) == interval.ends, name


def test_each_seed_refines_by_the_threshold_of_its_own_val(splits):
    val, test = splits
    row = next(row for row in rows(val, test, COSTS, SHARES) if row["method"] == f"{WAVE} half")
    thresholds = [threshold_for(torch.from_numpy(part.wave.confidence), 0.5) for part in val]
    assert row["thresholds"] == thresholds and thresholds[0] != thresholds[1]
    refined = np.mean([(part.wave.confidence < t).mean() for part, t in zip(test, thresholds, strict=True)])
    assert row["refined"] == pytest.approx(refined)
    assert row["gmacs"] == pytest.approx(2.0 + refined * 6.5) and row["tokens"] == pytest.approx(17 + refined * 49)


def test_a_cascade_pays_for_both_of_its_models():
    assert COSTS.steps(CASCADE) == [(17, 2.0), (82, 10.0)] and COSTS.steps(WAVE) == [(17, 2.0), (66, 8.5)]


def test_comparisons_with_the_teacher_are_corrected_together(splits, monkeypatch):
    val, test = splits
    families = []
    monkeypatch.setattr(controls, "adjusted_p", lambda found: families.append(found) or adjusted_p(found))
    table = rows(val, test, COSTS, SHARES)
    teacher = [part.wave.reference for part in test]
    raw = difference([part.wave.first for part in test], teacher, paired_seeds=True)
    assert table[0]["p"] is None and table[1]["against_teacher"] == raw.ends
    (compared,) = families
    assert list(compared) == [row["method"] for row in table[1:]]
    assert [row["p"] for row in table[1:]] == list(adjusted_p(compared).values())


def test_savings_name_what_waveclip_saves_beyond_the_cascade(splits):
    lines = savings(*splits, COSTS, resamples=40)
    assert [(line["method"], line["reference"]) for line in lines] == [
        (WAVE, "teacher"),
        (CASCADE, "teacher"),
        (f"{WAVE} less {CASCADE}", "teacher"),
        (WAVE, TRAINED_ON),
        (CASCADE, TRAINED_ON),
        (f"{WAVE} less {CASCADE}", TRAINED_ON),
        (WAVE, "WaveCLIP's fine level"),
    ]
    wave, cascade, more = lines[:3]
    assert more["saved"][0] == pytest.approx(wave["saved"][0] - cascade["saved"][0])
    assert wave["saved"][0] == pytest.approx(1 - (2.0 + wave["refined"] * 6.5) / 8.0)
    assert cascade["saved"][0] == pytest.approx(1 - (2.0 + cascade["refined"] * 8.0) / 8.0)


def line(method, saved, chosen=True):
    alone = {} if " less " in method else {"refined": 0.4, "difference": (0.0, -0.004, 0.004), "chosen": chosen}
    alone |= {"thresholds": [0.1 if chosen else NEVER]}
    return {"method": method, "reference": "teacher", "saved": saved} | alone


def test_a_headline_needs_three_seeds_and_a_saving_above_zero():
    lines = [
        line(WAVE, (0.3, 0.1, 0.4)),
        line(CASCADE, (0.1, -0.1, 0.3)),
        line(f"{WAVE} less {CASCADE}", (0.2, 0, 0.3)),
    ]
    assert headline(lines, 1, "SEEDS=3") == "One training seed: no headline is drawn; SEEDS=3 trains enough."
    said = headline(lines, 3, "SEEDS=3")
    assert "at its teacher's accuracy: 30.0 % [10.0, 40.0]; less what the cascade saves: +20.0" in said
    text = savings_table([*lines, line(WAVE, (0.0, 0.0, 0.0), chosen=False)])
    assert text.count("| saves |") == 1 and text.count("| no saving shown |") == 1
    assert "no saving shown: on val no threshold comes near enough" in text
    assert "+20.0" not in text and "not comparable: one of them has no threshold at that accuracy" in text
    lines[0]["saved"] = (0.3, 0.0, 0.4)
    assert "at its teacher's accuracy: no saving shown;" in headline(lines, 3, "SEEDS=3")


def test_curves_go_from_the_first_step_to_both(splits):
    _, test = splits
    drawn = curves(test, COSTS)
    for name, parts in ((WAVE, [part.wave for part in test]), (CASCADE, [part.cascade for part in test])):
        ends = [np.mean([part.first.mean() for part in parts]), np.mean([part.second.mean() for part in parts])]
        assert [drawn[name]["accuracy"][0], drawn[name]["accuracy"][-1]] == pytest.approx(ends)
        assert [drawn[name]["gmacs"][0], drawn[name]["gmacs"][-1]] == [gmacs for _, gmacs in COSTS.steps(name)]


def test_each_model_of_a_seed_has_its_place():
    rng = np.random.default_rng(0)
    teacher, wave, half, trained_on = (
        Answers(rng.random((levels, 50)) < 0.5, *rng.random((2, 1, 50), dtype=np.float32)) for levels in (1, 2, 1, 1)
    )
    result = seed_answers(teacher, wave, half, trained_on)
    right = {"teacher": teacher.correct[0], "coarse": wave.correct[0], "fine": wave.correct[1]}
    right |= {TRAINED_ON: trained_on.correct[0], HALF: half.correct[0]}
    assert {name: values.tolist() for name, values in result.right().items()} == {
        name: values.tolist() for name, values in right.items()
    }
    assert np.array_equal(result.cascade.reference, teacher.correct[0]), "the teacher is the reference of both"
    for exits, first in ((result.wave, wave), (result.cascade, half)):
        assert np.array_equal(exits.confidence, first.margin[0])


def test_a_curve_refines_the_least_confident_first_and_has_intervals():
    """Of a thousand pictures a coarse level knows the surer half, the fine one all."""
    confidence = np.linspace(0, 1, 1000)
    exits = Exits(confidence, confidence >= 0.5, np.ones(1000, bool), np.ones(1000, bool))
    line = curve([exits, exits], (1.0, 3.0), resamples=50)
    assert line["refined"][0] == 0 and line["refined"][-1] == 1 and (line["gmacs"][0], line["gmacs"][-1]) == (1, 3)
    points = zip(line["refined"], line["accuracy"], line["low"], line["high"], strict=True)
    for refined, accuracy, low, high in points:
        assert accuracy == pytest.approx(min(0.5 + refined, 1), abs=2e-3) and low <= accuracy <= high
    assert line["low"][0] < line["high"][0] and line["low"][-1] == line["high"][-1] == 1
