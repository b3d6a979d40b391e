"""Stored numbers still come out: committed weights on a part of test, and the first losses of each recipe."""

import json

import pytest

from benchmarks import RESULTS, read_log
from benchmarks.embedded import MODELS, PART, REVISION, batches, models, prompts
from benchmarks.mlip import shapes_runs
from benchmarks.training import shapes
from benchmarks.training.drift import SMALL, first_losses
from benchmarks.training.retrain import RUNS, evaluate
from benchmarks.waveclip.answers import answers_of_all
from benchmarks.waveclip.table2_embedded import counts
from common.conditions import digest
from common.inference import BF16_PRODUCTS
from common.weights import read_record

PARTS = 4
"""How many parts of test are answered again."""
OF_MLIP = [shapes_runs.GUIDE, *shapes_runs.rows(shapes_runs.choice() or {"clip": {}, "mlip": {}})]
COMMITTED = [run for run in [*RUNS, *OF_MLIP] if run.output and run.output.is_file()]
SCORED = [run for run in COMMITTED if run.output not in MODELS[REVISION] and "architecture" in read_record(run.output)]
"""Those that name pictures, beside the two of table 2: a Guide's weights do not."""


def test_committed_weights_give_the_stored_accuracy():
    stored = json.loads((RESULTS / "table2.json").read_text())["embedded"]
    assert stored["conditions"]["weights"] == {path.name: digest(path) for path in MODELS[REVISION]}
    teacher, student = models()
    asked = {"teacher": (teacher, teacher), "student": (student, teacher)}
    answers = answers_of_all(asked, batches("test", PARTS * PART), prompts())
    coarse, fine = answers["student"].correct
    right = {"teacher": answers["teacher"].last, "coarse": coarse, "fine": fine}
    for name, by_part in counts(right).items():
        expected = sum(stored["counts"][name][:PARTS])
        assert abs(sum(by_part) - expected) <= 0.001 * PARTS * PART, f"{name}: {sum(by_part)}, stored {expected}"


def test_other_committed_weights_give_the_stored_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(read_log, "LOG", tmp_path / "reads.jsonl")  # a check of stored answers is no new look at test
    for run in SCORED:
        stored = json.loads((RESULTS / "retrain" / f"{run.name}.json").read_text())
        if run in OF_MLIP:
            split = "unseen" if "unseen" in stored else "test"
            measured = shapes_runs.evaluate(run.output, run.recipe, [split], batches=PART // 250)
        elif run in shapes.RUNS:
            split = SMALL[2]
            measured = shapes.evaluate(run.output, run.recipe, None, [split], PART // 250, run.settings)
        else:
            (split, *_) = [split for split in ("val", "test") if "first" in str(stored.get(split))]
            measured = evaluate(run.output, run.recipe, [split], PART)
        for name, level in measured[split].items():
            assert abs(level["first"] - stored[split][name]["first"]) <= 1, f"{run.name}, {name}"


@pytest.mark.parametrize("run", COMMITTED, ids=lambda run: run.name)
def test_recipes_start_with_the_stored_losses(run):
    stored = json.loads((RESULTS / "retrain" / f"{run.name}.json").read_text())["first_losses"]
    # Without bf16 products the check runs in fp32, whose steps part from the stored ones after the second.
    steps = len(stored) if BF16_PRODUCTS else 2
    assert first_losses(run.recipe, steps, settings=run.settings) == pytest.approx(stored[:steps], rel=0.02)
