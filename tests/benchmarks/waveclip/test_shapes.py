"""WaveCLIP's table on scenes of shape: rows, references and verdicts from drawn answers."""

import numpy as np
import pytest

from benchmarks.training import shapes as trained
from benchmarks.waveclip import shapes
from benchmarks.waveclip.answers import Answers

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
    return {split: [drawn(right, seed) for seed in range(3)] for split in trained.SPLITS}


@pytest.fixture
def families():
    return {
        "shapes-teacher": family(0.7),
        "shapes-longer": family(0.75),
        "shapes-half": family(0.45),
        "shapes-waveclip": family(0.5, 0.7),
    }


def test_rows_have_the_accuracy_and_its_distance_from_the_teacher(families):
    rows = {row["row"]: row for row in shapes.rows(families, COSTS, 200)}
    assert list(rows) == [line.name for line in shapes.LINES[:5]]
    fine, half = rows["WaveCLIP, fine level"], rows["half-resolution CLIP"]
    right = np.mean([part.correct[1].mean() for part in families["shapes-waveclip"]["test"]])
    assert fine["accuracy"][0] == pytest.approx(right) and fine["gmacs"] == COSTS["fine"]
    assert half["difference"][2] < 0 and half["p"] < 0.05
    assert "difference" not in rows["teacher"]


def test_a_student_is_compared_with_its_own_teacher_and_a_cascade_with_that_of_its_seed(families):
    by_name = {contest.name: contest for contest in shapes.CONTESTS}
    teachers = [part.last for part in families["shapes-teacher"]["test"]]
    student = shapes.exits(families, by_name["WaveCLIP against its teacher"], "test")
    assert all(np.array_equal(part.reference, teachers[0]) for part in student) and len(student) == 3
    cascade = shapes.exits(families, shapes.CONTESTS[3], "test")
    assert all(np.array_equal(part.reference, teacher) for part, teacher in zip(cascade, teachers, strict=True))


def test_a_cascade_pays_for_both_towers_where_it_goes_on(families):
    curve = shapes.curves(families, COSTS)["cascade of two CLIPs"]
    assert curve[0][0] == COSTS["half"] and curve[-1][0] == COSTS["half"] + COSTS["dense"]
    assert curve[-1][1] == pytest.approx(np.mean([part.last.mean() for part in families["shapes-teacher"]["test"]]))


def test_the_verdict_is_the_lower_end_of_the_saving():
    row = {"contest": "A against B", "seeds": 3, "saved": (0.2, 0.05, 0.3), "chosen": True}
    assert shapes.verdict(row) == "A against B: saves at least 5 % of the dense tower's multiply-adds."
    assert "no saving shown" in shapes.verdict(row | {"saved": (0.2, -0.01, 0.3)})
    assert "no threshold on val" in shapes.verdict(row | {"chosen": False})
    assert "1 training seed(s): no headline" in shapes.verdict(row | {"seeds": 1})


def test_the_page_shows_what_is_trained_and_names_the_command_of_the_rest(families, monkeypatch):
    del families["shapes-longer"]
    monkeypatch.setattr(shapes, "known", lambda: families)
    result = shapes.run(smoke=True)
    page = shapes.render(result)
    assert "half-resolution CLIP | 3 |" in page["md"] and "trained on" not in page["md"].split("Zero-shot")[0]
    assert ("3 of 3 runs of shapes-longer", "make retrain ONLY='shapes-longer-*'") in list(shapes.missing(result))
    assert set(page["figures"]) == {"waveclip-shapes"}


def test_without_any_training_the_page_says_so(monkeypatch):
    monkeypatch.setattr(shapes, "known", dict)
    assert "No training of revision 2 is finished" in shapes.render(shapes.run(smoke=True))["md"]
