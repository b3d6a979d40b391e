"""Flickr30k and MS-COCO from miniature files in Karpathy's format."""

import json

import pytest

from common.data.catalogue import entry
from common.data.pictures import loader
from common.data.retrieval import retrieval_set
from common.preprocess import Preprocess
from tests.common.data.miniature import paint, small

PARTS = {"train": ["train", "restval"], "val": ["val"], "test": ["test", "test"]}
WHERE = {"flickr30k": ["flickr30k-images", "."], "coco": ["coco", "coco/images", "."]}


def write(root, name, place):
    """{split: [(gray value, captions), ...]}, written as files."""
    items, expected = [], {}
    for split, parts in PARTS.items():
        if name == "flickr30k":
            parts = [part for part in parts if part != "restval"]
        expected[split] = []
        for part in parts:
            gray = len(items)
            captions = [f"picture {gray}, caption {number}" for number in range(5 + gray % 2)]
            sentences = [{"raw": f" {caption}\n", "tokens": [], "imgid": gray, "sentid": 0} for caption in captions]
            item = {"filename": f"{gray}.png", "split": part, "sentences": sentences, "imgid": gray}
            if name == "coco":
                item["filepath"] = "train2014" if part == "train" else "val2014"
            paint(root / place / item.get("filepath", "") / item["filename"], gray)
            items.append(item)
            expected[split].append((gray, captions))
    file = root / f"dataset_{name}.json"
    file.write_text(json.dumps({"images": items, "dataset": name}))
    return file, expected


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in WHERE.items() for place in places])
def test_every_picture_once_with_all_its_captions(name, place, tmp_path):
    file, expected = write(tmp_path, name, place)
    of = small(entry(name), expected, 0)
    for split, rows in expected.items():
        found = retrieval_set(of, tmp_path, file, split)
        items = [found[index] for index in range(len(found))]
        assert [(image.getpixel((0, 0))[0], captions) for image, captions in items] == rows
        assert found.captions == [captions for _, captions in rows]
        batches = list(loader(found, Preprocess(4), batch_size=2))
        assert [key for batch in batches for key in batch["key"]] == found.keys
        assert set(batches[0]) == {"image", "key"} and batches[0]["image"].shape[1:] == (3, 4, 4)


def test_mistakes_are_explained(tmp_path):
    file, expected = write(tmp_path, "coco", "coco")
    of = small(entry("coco"), expected, 0)

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            retrieval_set(*arguments)

    refused("2 pictures of 'test' are listed where 5000 belong. It needs train2014.zip", "coco", tmp_path, file)
    refused("these are the captions of 'coco'.*needs the pictures, on request", "flickr30k", tmp_path, file)
    refused("Food-101 has no captions; coco, flickr30k have", "food101", tmp_path, file)
    refused(r"splits \['train', 'val', 'test'\], not 'restval'", of, tmp_path, file, "restval")
    refused("No such file", of, tmp_path, tmp_path / "none.json")
    refused("is in none of the folders coco, coco/images", of, tmp_path / "coco/val2014", file)
    (tmp_path / "coco/val2014/4.png").unlink()
    refused(r"1 of 2 pictures are missing, such as .*val2014/4.png", of, tmp_path, file)
    file.write_text(file.read_text().replace(" picture 3, caption 2", " "))
    refused("val2014/3.png has no caption or an empty one", of, tmp_path, file)
    file.write_text("[")
    refused("Expecting value", of, tmp_path, file)
