"""What deployed models cost: the same early exit on every engine, thresholds of val, which models are measured."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.together import deploy_cases, deploy_costs, deploy_tables
from benchmarks.together.deploy_cases import CASCADE, DENSE, RANDOM, SHAPES, WAVE
from benchmarks.together.deploy_costs import POINTS
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Prepared, engines
from benchmarks.together.deploy_workers import Levels
from common.clip import CLIP
from common.stages import stages_of
from tests.common.towers import pictures
from waveclip import MarginGate, ProgressiveClassifier, WaveTower


@pytest.fixture(scope="module")
def wave():
    """A tiny random WaveCLIP of three levels."""
    torch.manual_seed(0)
    return WaveTower.from_image_tower(CLIP.tiny().eval().image_tower, 2).eval()


@torch.no_grad()
def test_graphs_exit_as_their_tower_does(wave):
    classes, images = torch.eye(32)[:5], pictures(12)
    first = ProgressiveClassifier(wave, classes, 10.0, MarginGate(2.0)).probabilities(wave(images)[0])
    # Between two pictures: no margin is at the threshold, where rounding would decide.
    gate = MarginGate(MarginGate(0.0).confidence(first).sort().values[5:7].mean().item())
    graphs = [stage.module for stage in stages_of(wave)]
    expected, found = (ProgressiveClassifier(tower, classes, 10.0, gate)(images) for tower in (wave, Levels(graphs)))
    assert 0 < (expected.exit_step == 0).sum() < 12
    assert (found.exit_step == expected.exit_step).all()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)


def answers(margin, correct, dense, dense_int8):
    """What ``_answers`` gives for one WaveCLIP and both dense references."""
    none = torch.zeros(0, len(dense))
    return {
        ("new", WAVE): (torch.tensor([margin]), torch.tensor(correct)),
        (REFERENCE, DENSE): (none, torch.tensor([dense])),
        (REFERENCE_INT8, DENSE): (none, torch.tensor([dense_int8])),
    }


def test_thresholds_are_of_val_and_numbers_of_test():
    val = answers([0.1 * n for n in range(100)], [[True] * 100, [True] * 100], [True] * 100, [True] * 100)
    test = answers(
        [0.0, 1.0, 5.0, 20.0], [[False, False, True, True], [True, True, False, False]], [True] * 4, [False] * 4
    )
    rows = {row["point"]: row for row in deploy_costs._points(("new", WAVE), {"val": val, "test": test})}
    assert list(rows) == list(POINTS) and rows["low"]["threshold"] == pytest.approx(1.45), "below it are 15 of 100"
    assert rows["low"]["refined"] == 0.5 and rows["low"]["accuracy"] == 1, "the first two go on, and are then right"
    assert rows["high"]["refined"] == 0.75 and rows["high"]["accuracy"] == 0.75
    assert rows["low"]["against"][0] == 0 and rows["low"]["against_int8"][0] == 1
    (dense,) = deploy_costs._points((REFERENCE, DENSE), {"val": val, "test": test})
    assert dense["accuracy"] == 1 and dense["refined"] == 0


def test_a_smoke_run_measures_every_pair(photographs, monkeypatch, tmp_path):
    """PyTorch stands for both engines, so that nothing is exported."""

    def prepare(deployed, options, labels, folder, images):
        folder.mkdir(parents=True)
        assert all(map(len, images)), "the ranges of int8-static have pictures"
        return Prepared.of(deployed, options, labels, folder)

    monkeypatch.setenv("DATA", str(photographs))
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(deploy_cases, "prepare", prepare)
    for module in (deploy_cases, deploy_costs, deploy_tables):
        monkeypatch.setattr(module, "BATCHES", (1, 8))
    both = dict.fromkeys((REFERENCE, REFERENCE_INT8), replace(engines()[0][REFERENCE], program=None))
    monkeypatch.setattr(deploy_costs, "engines", lambda: (both, {}))
    monkeypatch.setattr(deploy_costs.read_log, "record", lambda *given: pytest.fail("a smoke run is no read"))
    result = json.loads(json.dumps(deploy_costs.measure(smoke=True)))
    assert list(result["tables"]) == [SHAPES, "cifar10", RANDOM] and result["missing"] == {}
    for name, file, count in ((SHAPES, "shapes_waveclip", 16), ("cifar10", "photos_cifar10_waveclip", 16)):
        table = result["tables"][name]
        assert f"{file}.safetensors" in table["weights"][WAVE] and table["pictures"]["test"] == count
        assert {row["engine"] for row in table["rows"]} == set(both) and len(table["rows"]) == 2 * (1 + 2 * len(POINTS))
        first, second = f"first/{file.replace('waveclip', 'clip_half')}", file.replace("waveclip", "clip")
        assert table["weights"][CASCADE].keys() == {f"{first}.safetensors", f"{second}.safetensors"}
    text = "\n".join(deploy_tables.parts(result, {}))
    assert text.count("- batch") == 8, "two goals, two batches, two data sets"
    assert text.count("- its control, the cascade") == 4
    assert not (tmp_path / "runs/data").exists(), "nothing is packed"


def test_a_run_that_was_interrupted_goes_on_behind_its_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    for name in ("DENSE", "WAVECLIP", "FIRST", "DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(deploy_costs, "engines", lambda: ({}, {}))
    monkeypatch.setattr(deploy_costs, "of_shapes", lambda folder, smoke: SHAPES)
    monkeypatch.setattr(deploy_costs, "of_random_weights", lambda folder, smoke: RANDOM)
    monkeypatch.setattr(deploy_costs, "_forget", lambda cases: None)
    made = {"clean": True, "revision": "a", "date": "2026"}
    monkeypatch.setattr(deploy_costs, "conditions", lambda scale, **others: made | others)
    measured = []

    def table(case, *others):
        measured.append(case)
        if measured == [SHAPES, RANDOM]:
            raise KeyboardInterrupt
        return {"rows": [len(measured)]}

    monkeypatch.setattr(deploy_costs, "_table", table)
    with pytest.raises(KeyboardInterrupt):
        deploy_costs.measure()
    assert deploy_costs.measure()["tables"] == {SHAPES: {"rows": [1]}, RANDOM: {"rows": [3]}}
    assert list(deploy_costs.measure()["tables"]) == [SHAPES, RANDOM]
    assert measured == [SHAPES, RANDOM, RANDOM, SHAPES, RANDOM], "a complete run is followed by a new one"
    made["revision"], measured[:] = "b", []
    with pytest.raises(KeyboardInterrupt):
        deploy_costs.measure()
    made["revision"] = "c"
    assert deploy_costs.measure()["tables"] == {SHAPES: {"rows": [3]}, RANDOM: {"rows": [4]}}, "other code"
