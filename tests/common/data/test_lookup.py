"""The embedded benchmark as sources: labels fit the names, captions fit the pictures, whatever the workers."""

import pytest

from common.data import embedded
from common.data.embedded import class_names, indices, prompt, scene
from common.data.lookup import SPLITS, source, splits_of


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The benchmark with a few pictures a split."""
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    monkeypatch.setattr(embedded, "SPLITS", sizes)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))


@pytest.mark.parametrize("split", SPLITS["embedded"]["zeroshot"])
def test_labels_are_places_in_the_names(split):
    found = source("embedded", "zeroshot", split)
    assert [template(found.class_names[0]) for template in found.templates] == [prompt(found.class_names[0])]
    stored = split.removesuffix("-alone")
    batches = list(found.loader(24, 4, 0))
    assert all(batch["image"].shape[1:] == (3, 24, 24) for batch in batches)
    shown = {key: int(label) for batch in batches for key, label in zip(batch["key"], batch["label"], strict=True)}
    names = {f"{stored}-{i:06d}": scene(stored, i)[0].facts()["name"] for i in indices(stored)}
    assert {key: found.class_names[label] for key, label in shown.items()} == names
    assert len(found.class_names) == len(class_names({"unseen": "all", "unseen-alone": "unseen"}.get(split, "seen")))


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_follow_the_pictures(workers):
    found = source("embedded", "retrieval")
    keys = [key for batch in found.loader(48, 4, workers) for key in batch["key"]]
    assert [[scene("retrieval", int(key.split("-")[1]))[1]] for key in keys] == found.captions
    assert len(found.captions) == 9


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no data called 'imagnet'; there are \['embedded'"):
        source("imagnet", "zeroshot")
    with pytest.raises(ValueError, match=r"no split 'tset' for zeroshot; it has \['test', 'val'"):
        source("embedded", "zeroshot", "tset")
    with pytest.raises(ValueError, match="no pictures for 'segmentation'; it has them for"):
        splits_of("embedded", "segmentation")
