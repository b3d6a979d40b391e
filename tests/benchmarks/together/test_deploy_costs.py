"""What deployed models cost: the same early exit on every engine, thresholds of val, which models are measured."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.together import deploy_costs, deploy_tables
from benchmarks.together.deploy_costs import DENSE, POINTS, RANDOM, SHAPES, WAVE, named
from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, Prepared, engines, first_answers
from benchmarks.together.deploy_workers import Levels
from benchmarks.together.photo_models import spelling
from benchmarks.together.photos import stand_in
from benchmarks.training.shapes import TEACHER
from common.clip import CLIP
from common.data.classification import own_split
from common.data.embedded.module import EmbeddedDataModule, sample
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


@pytest.mark.parametrize("variable", ["DENSE", "WAVECLIP"])
def test_half_of_the_variables_is_a_mistake(monkeypatch, variable):
    for name in ("DENSE", "WAVECLIP", "DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "my-clip")
    with pytest.raises(ValueError, match="set DENSE and WAVECLIP to models and DATA to their pictures"):
        deploy_costs.measure(smoke=True)


@pytest.fixture(params=["cifar10"])
def photographs(request, monkeypatch, tmp_path):
    """A folder of three classes, and a pair of random weights for it in the place of committed ones."""
    for split in ("train", "test"):
        stand_in(tmp_path / request.param / split)
    texts = [f"a photo of a {name}." for name in ("circle", "square", "triangle")]
    architecture = spelling(texts, "common/photos_clip.json")
    architecture["vision_cfg"] |= {"layers": 1}
    torch.manual_seed(0)
    clip = CLIP(architecture).eval()
    weights = tmp_path / "weights"
    written = f"photos_{request.param.lower().replace(' ', '_')}"
    clip.save(weights / f"{written}_clip.safetensors")
    wave = WaveTower.from_image_tower(clip.image_tower)
    wave.save(weights / f"{written}_waveclip.safetensors", architecture, torch.float32)
    monkeypatch.setattr(deploy_costs, "WEIGHTS", weights)
    for name in ("DENSE", "WAVECLIP", "EVERY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / request.param


@pytest.mark.parametrize(
    ("photographs", "stem"),
    [("cifar10", "photos_cifar10"), ("My Flowers", "photos_my_flowers")],
    indirect=["photographs"],
)
def test_a_folder_stands_for_the_pair_that_photos_left_for_it(photographs, stem, monkeypatch):
    monkeypatch.setenv("DATA", str(photographs))
    given = named()
    assert [given[name].rpartition("/")[2] for name in ("DENSE", "WAVECLIP")] == [
        f"{stem}_clip.safetensors",
        f"{stem}_waveclip.safetensors",
    ]
    monkeypatch.setenv("DATA", str(photographs / "train"))
    assert named() is None, "DATA of other tables, for which there is no pair"
    monkeypatch.delenv("DATA")
    assert named() is None
    monkeypatch.setenv("DENSE", "mine")
    monkeypatch.setenv("WAVECLIP", "mine-too")
    monkeypatch.setenv("DATA", str(photographs))
    assert named() == {"DENSE": "mine", "WAVECLIP": "mine-too", "DATA": str(photographs)}


@pytest.mark.parametrize("photographs", ["My Flowers"], indirect=True)
def test_pictures_without_splits_are_parted_as_their_training_parted_them(photographs, monkeypatch, tmp_path):
    undivided = stand_in(tmp_path / "elsewhere" / "My Flowers")
    monkeypatch.setenv("DATA", str(undivided))
    monkeypatch.setattr(deploy_costs, "prepare", lambda deployed, options, *_: Prepared(deployed, options, [], None))
    case = deploy_costs._own(named(), tmp_path, smoke=False)
    assert case.logged == "photos-my-flowers", "as photos logs its reads"
    how = case.models[DENSE].deployed.model.preprocess
    for split, data in (("val", case.val), ("test", case.test)):
        labels = torch.cat([batch["label"] for batch in data.loader(how, 9, 0)])
        assert labels.tolist() == own_split(undivided, split).labels


def test_the_users_models_may_stand_in_their_home(photographs, monkeypatch):
    for name, value in (("HOME", photographs.parent), ("DENSE", "~/a"), ("WAVECLIP", "~/b"), ("DATA", "dtd")):
        monkeypatch.setenv(name, str(value))
    home = photographs.parent
    assert named() == {"DENSE": f"{home}/a", "WAVECLIP": f"{home}/b", "DATA": "dtd"}


def test_scenes_of_shape_are_drawn_as_they_are_packed():
    scenes = deploy_costs._scenes("val", 3)
    (batch,) = scenes.loader(CLIP.load(TEACHER).preprocess, 3, 0)
    data = EmbeddedDataModule("common/shapes_clip.json", revision=2)
    assert scenes.class_names == data.class_names and batch["image"].shape == (3, 3, 48, 48)
    expected = [json.loads(sample("val", index, revision=2)["json"])["label"] for index in range(3)]
    assert batch["label"].tolist() == expected


def test_a_smoke_run_measures_every_pair(photographs, monkeypatch, tmp_path):
    """PyTorch stands for both engines, so that nothing is exported."""

    def prepare(deployed, options, labels, folder, images):
        folder.mkdir(parents=True)
        assert images, "the ranges of int8-static have pictures"
        return Prepared(deployed, options, labels, folder)

    monkeypatch.setenv("DATA", str(photographs))
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(deploy_costs, "prepare", prepare)
    for module in (deploy_costs, deploy_tables):
        monkeypatch.setattr(module, "BATCHES", (1, 8))
    both = dict.fromkeys((REFERENCE, REFERENCE_INT8), replace(engines()[0][REFERENCE], program=None))
    monkeypatch.setattr(deploy_costs, "engines", lambda: (both, {}))
    monkeypatch.setattr(deploy_costs.read_log, "record", lambda *given: pytest.fail("a smoke run is no read"))
    result = json.loads(json.dumps(deploy_costs.measure(smoke=True)))
    assert list(result["tables"]) == [SHAPES, "cifar10", RANDOM] and result["missing"] == {}
    for name, file, count in ((SHAPES, "shapes_waveclip", 16), ("cifar10", "photos_cifar10_waveclip", 16)):
        table = result["tables"][name]
        assert f"{file}.safetensors" in table["weights"][WAVE] and table["pictures"]["test"] == count
        assert {row["engine"] for row in table["rows"]} == set(both) and len(table["rows"]) == 2 * (1 + len(POINTS))
    text = "\n".join(deploy_tables.parts(result))
    assert text.count("- batch") == 8, "two goals, two batches, two data sets"
    assert not (tmp_path / "runs/data").exists(), "nothing is packed"


def test_a_run_that_was_interrupted_goes_on_behind_its_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    for name in ("DENSE", "WAVECLIP", "DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(deploy_costs, "engines", lambda: ({}, {}))
    monkeypatch.setattr(deploy_costs, "_shapes", lambda folder, smoke: SHAPES)
    monkeypatch.setattr(deploy_costs, "_random", lambda folder, smoke: RANDOM)
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
