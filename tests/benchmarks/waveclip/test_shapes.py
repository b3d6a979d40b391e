"""WaveCLIP's table on scenes of shape: rows, references and verdicts from drawn answers."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.training import shapes as trained
from benchmarks.waveclip import controls, shapes
from benchmarks.waveclip.answers import Answers
from common.early_exit import NEVER

COSTS = {"dense": 4.0, "half": 1.0, "coarse": 1.0, "fine": 4.4}
PICTURES = 3000


def drawn(right, seed):
    """Answers of a model whose levels are right with these probabilities; the first level is surer where right."""
    luck = np.random.default_rng(0).random(PICTURES)  # hard pictures are hard for all
    noise = np.random.default_rng(seed).random((2, PICTURES))
    correct = np.stack([0.8 * luck + 0.2 * noise[0] < level for level in right])
    margin = (0.5 * noise[1] + 0.5 * correct[0]).astype(np.float16)[None]
    return Answers(correct, margin, margin)


def family(*right):
    return {split: {seed: drawn(right, seed) for seed in range(3)} for split in trained.SPLITS}


@pytest.fixture
def families():
    return {
        "shapes-teacher": family(0.7),
        "shapes-longer": family(0.75),
        "shapes-half": family(0.45),
        "shapes-waveclip": family(0.5, 0.7),
        "shapes-waveclip-longer": family(0.55, 0.76),
    }


def test_rows_have_the_accuracy_and_its_distance_from_the_teacher(families):
    rows = {row["row"]: row for row in shapes.rows(families, COSTS, 400)}
    assert list(rows) == [line.name for line in shapes.LINES[:8]]
    fine, half = rows["WaveCLIP, fine level"], rows["half-resolution CLIP"]
    right = np.mean([part.correct[1].mean() for part in families["shapes-waveclip"]["test"].values()])
    assert fine["accuracy"][0] == pytest.approx(right) and fine["gmacs"] == COSTS["fine"]
    assert half["difference"][2] < 0 and half["p"] < 0.05
    assert "difference" not in rows["teacher, seed 0 (students start here)"]


def test_what_is_kept_beyond_the_trained_names_is_each_lines_own(families):
    rows = {row["row"]: row for row in shapes.kept(families, 200)}
    assert list(rows) == [line.name for line in shapes.LINES[:8]]
    for split in ("unseen", "retrieval"):
        right = np.mean([part.correct[0].mean() for part in families["shapes-waveclip"][split].values()])
        assert rows["WaveCLIP, coarse level"][split][0] == pytest.approx(right)


def test_students_and_controls_are_compared_with_the_teacher_of_seed_0(families):
    teacher = families["shapes-teacher"]["test"][0].last
    seeds = shapes.by_seed(families, "test")
    assert len(seeds) == 3
    for seed, part in enumerate(seeds):
        assert np.array_equal(part.wave.reference, teacher) and np.array_equal(part.cascade.reference, teacher)
        assert np.array_equal(part.cascade.confidence, families["shapes-half"]["test"][seed].margin[0])
        assert np.array_equal(part.cascade.second, families["shapes-longer"]["test"][seed].last)


def test_models_of_one_seed_meet_also_where_other_seeds_are_not_finished(families):
    for name, seed in (("shapes-waveclip", 0), ("shapes-half", 1)):
        for split in families[name].values():
            del split[seed]
    (part,) = shapes.by_seed(families, "test")
    assert np.array_equal(part.wave.first, families["shapes-waveclip"]["test"][2].correct[0])
    assert np.array_equal(part.cascade.second, families["shapes-longer"]["test"][2].last)
    half = next(row for row in shapes.rows(families, COSTS, 200) if row["row"] == "half-resolution CLIP")
    right = [families[name]["test"] for name in ("shapes-half", "shapes-teacher")]
    unpaired = np.mean([part.last.mean() for part in right[0].values()]) - right[1][0].last.mean()
    assert half["difference"][0] == pytest.approx(unpaired)


def test_of_three_teachers_all_rows_meet_seed_0_and_the_others_show_the_spread(families):
    families["shapes-teacher"] = {
        split: {seed: drawn([right], seed) for seed, right in enumerate((0.7, 0.6, 0.65))} for split in trained.SPLITS
    }
    by_seed = {seed: part.last.mean() for seed, part in families["shapes-teacher"]["test"].items()}
    rows = {row["row"]: row for row in shapes.rows(families, COSTS, 200)}
    first, spread = rows["teacher, seed 0 (students start here)"], rows["teacher, all seeds (spread)"]
    assert (first["seeds"], first["accuracy"][0]) == (1, pytest.approx(by_seed[0]))
    assert (spread["seeds"], spread["accuracy"][0]) == (3, pytest.approx(np.mean(list(by_seed.values()))))
    assert "difference" not in first and "difference" not in spread
    for name in ("half-resolution CLIP", "teacher, trained on", "WaveCLIP, fine level"):
        assert rows[name]["difference"][0] == pytest.approx(rows[name]["accuracy"][0] - by_seed[0]), name


def test_both_tables_compare_the_half_resolution_clip_alike(families):
    """This one and Table 2."""
    families["shapes-teacher"] = family(0.65)
    half = {row["row"]: row for row in shapes.rows(families, COSTS, 2000)}["half-resolution CLIP"]
    val, test = (shapes.by_seed(families, split) for split in ("val", "test"))
    beside = {row["method"]: row for row in controls.rows(val, test, shapes.prices(), {})}[controls.HALF]
    assert half["difference"][0] == pytest.approx(beside["against_teacher"][0])


def test_one_teacher_has_one_row(families):
    for split in families["shapes-teacher"].values():
        del split[1], split[2]
    assert "teacher, all seeds (spread)" not in {row["row"] for row in shapes.rows(families, COSTS, 200)}


def test_a_wave_clip_of_the_longer_training_is_compared_with_its_own_teacher(families):
    rows = {row["row"]: row for row in shapes.rows(families, COSTS, 200)}
    fine = rows["WaveCLIP from the teacher trained on, fine level"]
    right, teacher = (families[name]["test"] for name in ("shapes-waveclip-longer", "shapes-longer"))
    gap = np.mean([part.last.mean() for part in right.values()]) - teacher[0].last.mean()
    assert fine["difference"][0] == pytest.approx(gap)
    lines = shapes.savings_from_longer(families, shapes.costs(), 20)
    assert [line["reference"] for line in lines] == ["teacher trained on", "WaveCLIP's fine level"]
    assert all(line["chosen"] and line["saved"][0] > 0 for line in lines)


def test_thresholds_are_chosen_on_val_and_refine_test(families, monkeypatch):
    """Half as sure on val: half the threshold, which fewer pictures of test are below."""
    monkeypatch.setattr(shapes.trained, "finished", lambda: families)
    before = saving_lines(shapes.run(smoke=True))
    for splits in families.values():
        splits["val"] = {seed: replace(part, margin=part.margin / 2) for seed, part in splits["val"].items()}
    after = saving_lines(shapes.run(smoke=True))
    assert len(before) == len(after) == 7
    for whole, half in zip(before, after, strict=True):
        assert half["thresholds"] == [each if each == NEVER else each / 2 for each in whole["thresholds"]]
        assert half["refined"] < whole["refined"] or not whole["chosen"]


def saving_lines(result):
    """The lines of both tables that have a threshold."""
    return [line for line in result["savings"] + result["savings_from_longer"] if "thresholds" in line]


def test_the_page_shows_what_is_trained_and_names_the_command_of_the_rest(families, monkeypatch):
    monkeypatch.setattr(shapes.trained, "finished", lambda: families)
    page = shapes.render(shapes.run(smoke=True))
    assert "**Headline** (3 training seeds)" in page["md"] and set(page["figures"]) == {"waveclip-shapes"}
    del families["shapes-longer"], families["shapes-waveclip-longer"]
    result = shapes.run(smoke=True)
    page = shapes.render(result)
    assert "half-resolution CLIP | 3 |" in page["md"] and "trained on" not in page["md"].split("Zero-shot")[0]
    assert ("3 of 3 runs of shapes-longer", "make retrain ONLY='shapes-longer-*'") in list(shapes.missing(result))
    assert "Headline" not in page["md"] and page["figures"] == {}


def test_without_any_training_the_page_says_so(monkeypatch):
    monkeypatch.setattr(shapes.trained, "finished", dict)
    assert "No training of revision 2 is finished" in shapes.render(shapes.run(smoke=True))["md"]
