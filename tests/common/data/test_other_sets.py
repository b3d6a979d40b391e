"""ImageNet's variants, ObjectNet, STL-10 and CUB-200, each against a miniature in its published format."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import STL10

from common.data.catalogue import Split, entry
from common.data.classification import classification_set
from common.zeroshot import imagenet_names
from tests.common.data.miniature import paint, write_text

WNIDS = list(ImageNetInfo("imagenet-1k").label_names())


def miniature(name, count, num_classes):
    """The entry with the counts of a miniature."""
    whole = entry(name)
    return replace(whole, num_classes=num_classes, splits={s: Split(count, o.options) for s, o in whole.splits.items()})


def contents(pictures):
    return [(image.getpixel((0, 0))[0], label) for image, label in (pictures[n] for n in range(len(pictures)))]


@pytest.mark.parametrize(("name", "folder"), [("imagenet_r", "imagenet-r"), ("imagenet_a", "imagenet-a")])
def test_variants_of_some_of_imagenets_classes_have_their_names(name, folder, tmp_path):
    for gray, label in ((5, 1), (6, 999)):
        paint(tmp_path / folder / WNIDS[label] / "a.png", gray)
    result = classification_set(miniature(name, 2, 2), tmp_path)
    assert contents(result) == [(5, 0), (6, 1)]
    assert result.class_names == [imagenet_names()[1], imagenet_names()[999]] == ["goldfish", "toilet paper"]
    paint(tmp_path / folder / "README" / "a.png", 7)
    with pytest.raises(ValueError, match="are not the classes of imagenet-1k"):
        classification_set(miniature(name, 3, 3), tmp_path)


def test_sketches_of_all_of_imagenets_classes(tmp_path):
    for wnid in WNIDS:
        paint(tmp_path / "sketch" / wnid / "sketch_0.JPEG", 9)
    result = classification_set(miniature("imagenet_sketch", 1000, 1000), tmp_path)
    assert result.labels == list(range(1000)) and result.class_names == list(imagenet_names())


def test_the_numbers_of_imagenet_v2s_folders_are_labels(tmp_path):
    for label in range(1000):
        paint(tmp_path / "imagenetv2-matched-frequency-format-val" / str(label) / "a.jpeg", 9)
    result = classification_set(miniature("imagenet_v2", 1000, 1000), tmp_path)
    label_of = {key.split("/")[1]: label for key, label in zip(result.keys, result.labels, strict=True)}
    assert label_of == {str(label): label for label in range(1000)}


def test_objectnet_without_its_border_and_the_classes_that_imagenet_lacks(tmp_path):
    base = tmp_path / "objectnet-1.0"
    for folder, gray in (("alarm_clock", 50), ("air_freshener", 60), ("banana", 70)):
        framed = np.full((14, 14, 3), (255, 0, 0), np.uint8)
        framed[2:-2, 2:-2] = gray
        (base / "images" / folder).mkdir(parents=True)
        Image.fromarray(framed).save(base / "images" / folder / "a.png")
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "banana": "Banana"}
    write_text(base / "mappings/folder_to_objectnet_label.json", json.dumps(labels))
    shared = {"Alarm clock": "analog clock; digital clock", "Banana": "banana"}
    write_text(base / "mappings/objectnet_to_imagenet_1k.json", json.dumps(shared))
    result = classification_set(miniature("objectnet", 2, 2), tmp_path)
    assert result.class_names == ["alarm clock", "banana"] and contents(result) == [(50, 0), (70, 1)]
    assert result.picture(0).size == (10, 10) and np.asarray(result.picture(0)).max() == 50


def test_stl10(tmp_path, monkeypatch):
    base = tmp_path / "stl10_binary"
    base.mkdir()
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    (base / "class_names.txt").write_text("airplane\nbird\n")
    pictures = np.zeros((2, 3, 96, 96), np.uint8)
    pictures[0, 0], pictures[1, 2] = 200, 100  # red, blue
    pictures.tofile(base / "test_X.bin")
    np.array([2, 1], np.uint8).tofile(base / "test_y.bin")
    result = classification_set(replace(miniature("stl10", 2, 2)), tmp_path)
    assert result.class_names == ["airplane", "bird"] and result.labels == [1, 0]
    assert result.picture(0).getpixel((5, 5)) == (200, 0, 0) and result.picture(1).getpixel((5, 5)) == (0, 0, 100)


def test_cub200_by_its_own_split(tmp_path):
    base = tmp_path / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    rows = [(1, 0, "1", 3), (2, 0, "0", 4), (3, 1, "0", 5)]  # number, class, training, gray
    for number, label, _, gray in rows:
        paint(base / "images" / names[label] / f"{number}.png", gray)
    write_text(base / "images.txt", *(f"{number} {names[label]}/{number}.png" for number, label, _, _ in rows))
    write_text(base / "classes.txt", *(f"{n} {name}" for n, name in enumerate(names, 1)))
    write_text(base / "image_class_labels.txt", *(f"{number} {label + 1}" for number, label, _, _ in rows))
    write_text(base / "train_test_split.txt", *(f"{number} {training}" for number, _, training, _ in rows))
    result = classification_set(miniature("cub200", 2, 2), tmp_path)
    assert contents(result) == [(4, 0), (5, 1)]
    assert result.class_names == ["Black footed Albatross", "Laysan Albatross"]
    assert contents(classification_set(miniature("cub200", 1, 2), tmp_path, "train")) == [(3, 0)]
