"""Which models and pictures are measured on every engine: committed ones, the user's, and random weights."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.together import deploy_cases
from benchmarks.together.deploy_cases import CASCADE, DENSE, FIRST, WAVE, named
from benchmarks.together.deploy_engines import Prepared
from benchmarks.together.photos import stand_in
from benchmarks.training.shapes import HALF, STUDENT, TEACHER
from common import directory
from common.clip import CLIP
from common.data.classification import own_split
from common.data.embedded.module import EmbeddedDataModule, sample
from common.deploy.model import load
from tests.common.towers import NAMES, tiny_directory


def nothing_exported(deployed, options, labels, folder, images):
    """``prepare`` without its folders; there are images for each of the models."""
    assert len(images) == len(deployed.members)
    return Prepared.of(deployed, options, labels, folder)


@pytest.mark.parametrize("variable", ["DENSE", "WAVECLIP", "FIRST"])
def test_half_of_the_variables_is_a_mistake(monkeypatch, variable):
    for name in ("DENSE", "WAVECLIP", "FIRST", "DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "my-clip")
    with pytest.raises(ValueError, match="set DENSE and WAVECLIP to models and DATA to their pictures"):
        named()


@pytest.mark.parametrize(
    ("photographs", "stem"),
    [("cifar10", "photos_cifar10"), ("My Flowers", "photos_my_flowers")],
    indirect=["photographs"],
)
def test_a_folder_stands_for_the_pair_that_photos_left_for_it(photographs, stem, monkeypatch):
    monkeypatch.setenv("DATA", str(photographs))
    given = named()
    files = [given[name].rpartition("/")[2] for name in ("DENSE", "WAVECLIP", "FIRST")]
    assert files == [f"{stem}_{model}.safetensors" for model in ("clip", "waveclip", "clip_half")]
    Path(given["FIRST"]).unlink()
    assert named().keys() == {"DENSE", "WAVECLIP", "DATA"}, "without a smaller CLIP there is no cascade"
    monkeypatch.setenv("DATA", str(photographs / "train"))
    assert named() is None, "DATA of other tables, for which there is no pair"
    monkeypatch.delenv("DATA")
    assert named() is None
    monkeypatch.setenv("DENSE", "mine")
    monkeypatch.setenv("WAVECLIP", "mine-too")
    monkeypatch.setenv("DATA", str(photographs))
    assert named() == {"DENSE": "mine", "WAVECLIP": "mine-too", "DATA": str(photographs)}
    monkeypatch.setenv("FIRST", "small")
    assert named()["FIRST"] == "small"


@pytest.mark.parametrize("photographs", ["My Flowers"], indirect=True)
def test_pictures_without_splits_are_parted_as_their_training_parted_them(photographs, monkeypatch, tmp_path):
    undivided = stand_in(tmp_path / "elsewhere" / "My Flowers")
    monkeypatch.setenv("DATA", str(undivided))
    monkeypatch.setattr(deploy_cases, "prepare", nothing_exported)
    case = deploy_cases.of_user(named(), tmp_path, smoke=False)
    assert case.logged == "photos-my-flowers", "as photos logs its reads"
    how = case.models[DENSE].deployed.model.preprocess
    for split, data in (("val", case.val), ("test", case.test)):
        labels = torch.cat([batch["label"] for batch in data.loader(how, 9, 0)])
        assert labels.tolist() == own_split(undivided, split).labels


def test_a_cascade_sees_the_same_pictures_at_both_sizes_and_ends_in_the_dense_model(photographs, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", str(photographs))
    monkeypatch.setattr(deploy_cases, "prepare", nothing_exported)
    case = deploy_cases.of_user(named(), tmp_path, smoke=True)
    assert list(case.models) == [DENSE, WAVE, CASCADE] and [how.size for how in case.views] == [16, 32]
    first, second = case.work[CASCADE]
    assert second is case.work[DENSE][0], "so it is loaded once"
    assert first.prepared.deployed.model.image_size == 16 and first.classes.shape == second.classes.shape
    small = load(named()["FIRST"], device="cpu")
    torch.testing.assert_close(first.classes, small.classes(case.val.class_names, small.templates))
    halves = [F.avg_pool2d(part.images, part.images.shape[-1] // 8) for part in (first, second)]
    assert (halves[0] - halves[1]).abs().mean() < 0.1 * halves[1].std(), "one picture in both places"
    seen = case.seen(["small", "large"])
    assert seen == {DENSE: ["large"], WAVE: ["large"], CASCADE: ["small", "large"]}


def test_a_first_model_with_levels_of_its_own_is_refused(tmp_path):
    tiny = CLIP.tiny().architecture
    large = CLIP({**tiny, "vision_cfg": {**tiny["vision_cfg"], "layers": 8}}).eval()
    directory.write(tmp_path / "large", large, None, NAMES, ["{a} {}"])
    dense, wave = str(tmp_path / "large"), str(tiny_directory(tmp_path / "wave"))
    options = {DENSE: {"model": dense}, WAVE: {"model": wave}, CASCADE: {"model": dense, "first": wave}}
    with pytest.raises(ValueError, match="FIRST: wave has a threshold of its own; name a model without one"):
        deploy_cases._of_data(options, None, None, tmp_path, None)


def test_the_training_of_committed_weights_is_that_of_their_records(tmp_path):
    assert deploy_cases._steps({DENSE: str(TEACHER), WAVE: str(STUDENT), FIRST: str(HALF)}) == {
        DENSE: 5000,
        WAVE: 5000,
        FIRST: 10000,
    }
    photos = str(TEACHER.with_name("photos_cifar10_clip_half.safetensors"))
    mine = str(tmp_path / TEACHER.name)
    assert deploy_cases._steps({DENSE: mine, FIRST: photos}) == {FIRST: 5000}, "of others nothing is known"


def test_the_users_models_may_stand_in_their_home(photographs, monkeypatch):
    for name, value in (("HOME", photographs.parent), ("DENSE", "~/a"), ("WAVECLIP", "~/b"), ("DATA", "dtd")):
        monkeypatch.setenv(name, str(value))
    home = photographs.parent
    assert named() == {"DENSE": f"{home}/a", "WAVECLIP": f"{home}/b", "DATA": "dtd"}


def test_scenes_of_shape_are_drawn_as_they_are_packed():
    scenes = deploy_cases._scenes("val", 3)
    (batch,) = scenes.loader(CLIP.load(TEACHER).preprocess, 3, 0)
    data = EmbeddedDataModule("common/shapes_clip.json", revision=2)
    assert scenes.class_names == data.class_names and batch["image"].shape == (3, 3, 48, 48)
    expected = [json.loads(sample("val", index, revision=2)["json"])["label"] for index in range(3)]
    assert batch["label"].tolist() == expected
