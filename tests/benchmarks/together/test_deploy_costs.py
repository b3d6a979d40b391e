"""What deployed models cost: the same early exit on every engine, thresholds of val, and how the tables read."""

import pytest
import torch

from benchmarks.together import deploy_costs
from benchmarks.together.deploy_costs import DENSE, POINTS, WAVE, Levels, parts
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, Prepared, engines, first_answers
from common.clip import CLIP
from common.deploy.model import load
from common.stages import stages_of
from tests.common.towers import NAMES, pictures, tiny_directory
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
    gate = MarginGate(MarginGate(0.0).confidence(first).median().item())
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


def row(engine, side, point, against, ratio):
    """A row of a table, with the same speed at every batch size."""
    speed = {"images_per_second": 10 * ratio, "ratios": [ratio] * 3, "ratios_int8": [ratio / 4] * 3}
    found = {"engine": engine, "side": side, "point": point, "accuracy": 0.6, "interval": (0.5, 0.7), "refined": 0.15}
    difference = (against, against - 0.01, against + 0.01)
    return found | {"against": difference, "against_int8": difference, "speed": dict.fromkeys(("1", "8", "32"), speed)}


def test_the_tables_name_the_fastest_that_is_near_enough():
    rows = [row(REFERENCE, DENSE, "", 0.0, 1.0), row("fast", WAVE, "low", -0.02, 9.0)]
    rows += [row("near", WAVE, "mid", -0.008, 6.0), row("slow", WAVE, "high", 0.0, 4.0)]
    needs = [
        {"engine": REFERENCE, "model": side, "bytes": 2_500_000, "first": {"seconds": 1.5, "peak_bytes": 3e8}}
        for side in (DENSE, WAVE)
    ]
    needs += [{"engine": "near", "model": side, "bytes": 600_000, "first": None} for side in (DENSE, WAVE)]
    table = {"rows": rows, "needs": needs, "pictures": {"test": 2000}, "rounds": 3, "timed": 128}
    text = "\n".join(parts({"missing": {"OpenVINO": "pip install openvino"}, "tables": {"embedded": table}}))
    assert "Data: embedded, 2,000 pictures of test." in text and "medians of 3 rounds" in text
    assert "| fast | WaveCLIP low | 60.0 [50.0, 70.0] | -2.0 [-3.0, -1.0] | 15.0 % | 90.0 (×9.00, ×2.25) |" in text
    assert "- batch 1, within 1 points of dense PyTorch fp32: ×6.00 [6.00, 6.00] by WaveCLIP mid, near" in text
    assert "- batch 8, within 0.5 points of dense ONNX Runtime int8: ×1.00 [1.00, 1.00] by WaveCLIP high, slow" in text
    assert "| PyTorch fp32 | 2.5 | 1.50 | 300 | 2.5 | 1.50 | 300 |" in text and "| near | 0.6 | – | – |" in text
    assert "Not measured: OpenVINO (pip install openvino)." in text
    costs = {**table, "pictures": {}, "rows": [{**row(REFERENCE, DENSE, "", 0.0, 1.0)}]}
    text = "\n".join(parts({"missing": {}, "tables": {"random": costs}}))
    assert "Random weights of ViT-B/16's size: costs alone." in text and "accuracy" not in text


def test_every_engine_is_there_or_named_as_missing(monkeypatch):
    monkeypatch.setattr("benchmarks.together.deploy_engines.installed", lambda name: False)
    monkeypatch.delenv("COMPILE", raising=False)
    found, missing = engines()
    assert next(iter(found)) == REFERENCE and REFERENCE_INT8 in found and "ONNX Runtime int8-static" in found
    assert {"torch.compile", "torchao", "OpenVINO"} <= set(missing)


def test_a_models_size_on_pytorch_is_that_of_its_image_tower(tmp_path):
    deployed = load(tiny_directory(tmp_path / "model", 0), device="cpu")
    prepared = Prepared(deployed, {}, NAMES[:2], tmp_path)
    values = sum(parameter.numel() for parameter in deployed.model.images.image_tower.parameters())
    assert engines()[0][REFERENCE].size(prepared) == 4 * values


def test_first_answers_are_measured_in_a_process_of_their_own(tmp_path):
    def engine(program):
        return Engine(lambda prepared: [], lambda prepared: 0, program)

    found = first_answers(engine(lambda prepared, picture: f"print({picture!r})\n"), None, tmp_path / "a.png")
    assert found["seconds"] > 0 and 2**20 < found["peak_bytes"] < 2**26, "not that of this process, which has torch"
    assert first_answers(engine(None), None, tmp_path) is None
    with pytest.raises(ValueError, match="NameError: name 'gone' is not defined"):
        first_answers(engine(lambda *_: "gone\n"), None, tmp_path)


def test_half_of_the_variables_is_a_mistake(monkeypatch):
    monkeypatch.delenv("WAVECLIP", raising=False)
    monkeypatch.setenv("DENSE", "my-clip")
    with pytest.raises(ValueError, match="set DENSE and WAVECLIP to model directories and DATA to their pictures"):
        deploy_costs.measure(smoke=True)
