"""Few shots as Lightning gets them: nested and seeded, one view for rankings and random ones for tuning."""

import numpy as np
import pytest
import torch

from common.data import catalogue, lookup
from common.data.classification_module import ClassificationDataModule
from common.data.embedded import tasks as embedded_tasks
from common.testing import tiny_architecture
from tests.common.data.miniature import small, write_food101, write_split_json


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Makes the module over an embedded task, for the tiny tower's 32 pixels."""
    monkeypatch.delenv("EFFCLIP_DATA", raising=False)
    architecture = tiny_architecture(tmp_path)

    def make(name="embedded-sketch", **options):
        settings = {"batch_size": 10, "num_workers": 0, "captions": False}
        return ClassificationDataModule(name, architecture, **settings | options)

    return make


@pytest.fixture
def blank(monkeypatch):
    """The pictures are not drawn, where only their keys matter."""
    monkeypatch.setattr(embedded_tasks, "draw", lambda *_: np.zeros((48, 48, 3), np.uint8))


def keys(loader):
    return [key for batch in loader for key in batch["key"]]


def views(loader):
    """Every picture's tensor by its key."""
    return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}


def test_shots_are_nested_and_seeded(data, blank):
    drawn = {shots: set(data(shots=shots, seed=1).training.keys) for shots in (1, 2, 4, 8, 16)}
    for shots, found in drawn.items():
        assert len(found) == 100 * shots
        assert found <= drawn[min(2 * shots, 16)]
    assert drawn[4] != set(data(shots=4, seed=2).training.keys)
    assert set(data(shots=None).training.keys) == drawn[16]


def test_training_is_shuffled_in_whole_batches_and_evaluation_is_not(data, blank):
    module = data(shots=1, batch_size=30)
    loader = module.train_dataloader()
    first, second = ([module.training.keys[i] for part in loader.batches(epoch) for _, i in part] for epoch in (0, 1))
    assert len(first) == len(set(first)) == 90 and first != second
    assert keys(loader) == first and keys(module.dataloader("train", train=False)) == module.training.keys
    assert len(keys(module.val_dataloader())) == 400
    assert module.scale == "embedded" and "CC-BY" in module.attribution
    assert len(module.class_prompts) == 100 and module.class_prompts[0].split()[0] in ("a", "an")


def test_one_view_without_augmentation_and_random_ones_with_it(data):
    fixed, changing = data(shots=1, augment=False), data(shots=1)
    stored, shown = (views(loader) for loader in (fixed.dataloader("train", train=False), fixed.train_dataloader()))
    assert stored.keys() == shown.keys()
    assert all(torch.equal(shown[key], image) for key, image in stored.items())
    assert sum((changing.view[0, i]["image"] != changing.view[1, i]["image"]).any() for i in range(100)) > 90
    batch = next(iter(changing.train_dataloader()))
    assert batch["image"].shape == (10, 3, 32, 32) and batch.keys() == {"image", "label", "key"}


def test_a_set_of_the_catalogue_by_coops_split(data, tmp_path, monkeypatch):
    of = catalogue.entry("ucf101", "coop")
    names = ("Archery", "Basketball")
    rows = write_split_json(tmp_path, of.options["file"][0], of.options["pictures"][0], names)
    monkeypatch.setattr(catalogue, "entry", lambda name, protocol="mlip": small(of, rows, 2))
    module = data("ucf101@coop", root=str(tmp_path), shots=1, batch_size=2)
    assert module.class_prompts == [f"a photo of a person during {name}." for name in module.class_names]
    assert len(keys(module.train_dataloader())) == 2
    for split, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        assert [int(label) for batch in loader for label in batch["label"]] == [label for _, label in rows[split]]


def test_a_set_without_val_is_not_validated(data, tmp_path, monkeypatch):
    of = small(catalogue.entry("food101"), write_food101(tmp_path), 2)
    monkeypatch.setattr(catalogue, "entry", lambda name, protocol="mlip": of)
    module = data("food101", root=str(tmp_path), shots=None)
    assert module.splits == ("train", "test") and module.val_dataloader() == []


def test_what_is_not_there_is_said_at_once(data):
    with pytest.raises(ValueError, match="no data called 'pets'"):
        data("pets")
    with pytest.raises(ValueError, match="ImageNet: give --root or set EFFCLIP_DATA"):
        data("imagenet@coop")
    with pytest.raises(ValueError, match=r"embedded-sketch has the splits \['train', 'val', 'test'\], not 'unseen'"):
        data().dataloader("unseen")
    with pytest.raises(ValueError, match="100 training pictures do not fill a batch of 128"):
        data(shots=1, batch_size=128).train_dataloader()
    with pytest.raises(ValueError, match="embedded lies in shards"):
        lookup.labelled_set("embedded", "train")
