"""The embedded benchmark as sources: labels fit the names, captions fit the pictures, in each revision and worker."""

import pytest
import torch

from common.data import catalogue
from common.data.embedded import module as embedded
from common.data.embedded.module import EmbeddedDataModule, indices, prompt, scene, scenes_of
from common.data.lookup import EMBEDDED, REVISIONS, Place, labelled_set, scale_of, source, splits_of, version_within
from common.packaged import default_model
from common.preprocess import Preprocess
from common.zeroshot import fill
from tests.common.data.miniature import paint, write_food101
from tests.common.data.miniature import small as small_entry

ARCHITECTURES = {"embedded": "common/shapes_clip.json", "embedded-1": "common/embedded_clip.json"}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Both revisions with a few pictures a split."""
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    for revision in REVISIONS.values():
        monkeypatch.setitem(embedded.SPLITS, revision, sizes)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))


@pytest.fixture(params=REVISIONS)
def name(request):
    """What the commands call a revision."""
    return request.param


@pytest.mark.parametrize("split", EMBEDDED["zeroshot"])
def test_labels_are_places_in_the_names(name, split):
    found, revision = source(name, "zeroshot", split), REVISIONS[name]
    class_names = scenes_of(revision).class_names
    assert [fill(template, found.class_names[0]) for template in found.templates] == [prompt(found.class_names[0])]
    stored = split.removesuffix("-alone")
    batches = list(found.loader(Preprocess(24), 4, 0))
    assert all(batch["image"].shape[1:] == (3, 24, 24) for batch in batches)
    shown = {key: int(label) for batch in batches for key, label in zip(batch["key"], batch["label"], strict=True)}
    pictures = indices(stored, revision)
    names = {f"{stored}-{i:06d}": scene(stored, i, revision)[0].facts()["name"] for i in pictures}
    assert {key: found.class_names[label] for key, label in shown.items()} == names
    assert len(found.class_names) == len(class_names({"unseen": "all", "unseen-alone": "unseen"}.get(split, "seen")))


@pytest.mark.parametrize(("name", "size"), [("embedded", 96), ("embedded", 24), ("embedded-1", 96)])
def test_a_model_sees_pictures_drawn_at_its_size(name, size):
    given = {"batch_size": 4, "num_workers": 0, "image_size": size, "revision": REVISIONS[name]}
    found = next(iter(source(name, "zeroshot", "val").loader(Preprocess(size), 4, 0)))
    drawn = next(iter(EmbeddedDataModule(ARCHITECTURES[name], **given).dataloader("val")))
    assert found["key"] == drawn["key"] and torch.equal(found["image"], drawn["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_follow_the_pictures(name, workers):
    found, revision = source(name, "retrieval"), REVISIONS[name]
    keys = [key for batch in found.loader(Preprocess(48), 4, workers) for key in batch["key"]]
    assert [[scene("retrieval", int(key.split("-")[1]), revision)[1]] for key in keys] == found.captions
    assert len(found.captions) == 9


def test_each_revision_has_a_version_of_its_own():
    versions = {source(name, task).version for name in REVISIONS for task in ("zeroshot", "retrieval")}
    assert len(versions) == len(REVISIONS)


def test_the_plain_name_is_that_of_the_current_revision():
    """Of which the packaged model is."""
    assert source("embedded", "zeroshot", "val").class_names == default_model().class_names


def test_a_revision_is_trained_on_by_its_data_module(name):
    with pytest.raises(ValueError, match=rf"{name} lies in shards, which EmbeddedDataModule\(revision=.\) reads"):
        labelled_set(name, "train")


def test_what_is_not_there_is_named():
    known = r"no data called 'imagnet', .*; did you mean imagenet\? there are embedded, embedded-1, embedded-sketch, "
    with pytest.raises(ValueError, match=known):
        source("imagnet", "zeroshot")
    with pytest.raises(ValueError, match=r"no split 'tset' for zeroshot; it has \['test', 'val'"):
        source("embedded", "zeroshot", "tset")
    with pytest.raises(ValueError, match="no pictures for 'segmentation'; it has them for"):
        splits_of("embedded", "segmentation")
    with pytest.raises(ValueError, match="the name of the data is empty, as of a variable that is not set"):
        source("", "zeroshot")


def test_sets_of_the_catalogue_are_found_under_a_root(monkeypatch, tmp_path):
    rows = write_food101(tmp_path)
    of = small_entry(catalogue.entry("food101"), rows, 2)
    monkeypatch.setattr(catalogue, "entry", lambda name, protocol="mlip": of)
    assert splits_of("food101", "training") == ("train",)
    found = source("food101", "zeroshot", place=Place(str(tmp_path)))
    batches = list(found.loader(Preprocess(16), 2, 0))
    assert [int(label) for batch in batches for label in batch["label"]] == [label for _, label in rows["test"]]
    assert found.class_names == ["apple pie", "baby back ribs"]
    assert found.version != source("food101", "training", place=Place(str(tmp_path))).version
    with pytest.raises(ValueError, match="Food-101: give --root or set EFFCLIP_DATA"):
        source("food101", "zeroshot")
    with pytest.raises(ValueError, match="food101 has no pictures for 'retrieval'"):
        source("food101", "retrieval", place=Place(str(tmp_path)))


def test_captions_of_the_catalogue_ask_for_their_file(tmp_path):
    assert splits_of("coco", "retrieval") == ("test", "val", "train")
    with pytest.raises(ValueError, match=r"MS-COCO: give --captions.*It needs train2014\.zip"):
        source("coco", "retrieval", place=Place(str(tmp_path)))


def test_the_scale_of_results_is_that_of_the_data_and_the_tower(tmp_path):
    assert scale_of("embedded", 224) == scale_of("embedded-sketch", 224) == "embedded"
    assert scale_of("cifar10", 224) == "paper" and scale_of("cifar10", 32) == "embedded", "a tower for 32 px"
    assert scale_of(str(tmp_path), 224) == scale_of(str(tmp_path), 32) == "own data"


def test_a_folder_called_like_a_set_does_not_hide_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "food101" / "cat" / "1.png", 0)
    assert splits_of("food101", "zeroshot") == ("test", "train")
    assert splits_of("./food101", "zeroshot") == ("all",)


def test_a_folder_of_ones_own_is_a_set(tmp_path):
    for place, name in enumerate(("a_cat", "dog")):
        paint(tmp_path / name / "1.png", place)
    found = source(str(tmp_path), "zeroshot")
    assert found.class_names == ["a cat", "dog"] and found.split == "all"
    names = tmp_path / "names.txt"
    names.write_text("cat\nhound\n")
    assert source(str(tmp_path), "zeroshot", place=Place(class_names=str(names))).class_names == ["cat", "hound"]


def test_a_limit_takes_pictures_of_all_classes_of_a_folder_and_the_same_ones_every_time(tmp_path):
    for place in range(40):
        paint(tmp_path / ("cat" if place < 20 else "dog") / f"{place:02}.png", place)
    found = source(str(tmp_path), "zeroshot")
    places = found.drawn(10)
    assert places == sorted(set(places)) == source(str(tmp_path), "zeroshot").drawn(10) and len(places) == 10
    assert min(sum(place < 20 for place in places), sum(place >= 20 for place in places)) > 2
    assert found.drawn(None) is found.drawn(40) is None
    assert version_within(found, 40) == found.version != version_within(found, 10) != version_within(found, 11)


def test_one_class_alone_is_no_question(tmp_path):
    """An archive may unpack into one folder, which then looks like a class."""
    paint(tmp_path / "cat" / "1.png", 0)
    with pytest.raises(ValueError, match=r"has one class alone, 'cat', .*; give two or more"):
        source(str(tmp_path), "zeroshot")


def test_a_folder_of_splits_is_a_set_to_train_on(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            paint(tmp_path / split / name / "1.png", 0)
    assert splits_of(str(tmp_path), "training") == ("train", "val")
    assert splits_of(str(tmp_path), "zeroshot") == ("test", "val", "train")
    assert source(str(tmp_path), "zeroshot").class_names == ["cat", "dog"]
