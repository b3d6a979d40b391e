"""The embedded benchmark: names, captions that say what the picture shows, splits, and packing."""

import hashlib
import json
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pytest
from PIL import Image

from common.clip import load_architecture
from common.data.embedded import module as embedded
from common.data.embedded import scenes as embedded_scenes
from common.data.embedded import splits
from common.data.embedded.module import EmbeddedDataModule
from common.data.embedded.scenes import (
    CANVAS,
    COLOURS,
    RECIPE,
    VIEW,
    Emoji,
    Scene,
    class_names,
    draw_scene,
    name_table,
    vocabulary,
)
from common.data.embedded.twemoji import prompt
from common.tokenizer import Tokenizer

scene, indices, pack, recipe_hash, order = (
    partial(f, revision=1) for f in (splits.scene, splits.indices, splits.pack, splits.recipe_hash, splits._order)
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The benchmark with a few dozen pictures a split; gives the folder for its shards."""
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    monkeypatch.setitem(embedded.SPLITS, 1, sizes)
    return tmp_path


@pytest.fixture
def architecture(tmp_path):
    """A description of a 48 px CLIP over the embedded vocabulary, as a file."""
    kept = vocabulary()
    text = {"context_length": 32, "vocab_size": len(kept), "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 48, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64}
    file = tmp_path / "tiny.json"
    text["vocabulary"] = kept
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(file)


def test_names():
    seen, unseen, both = (class_names(split) for split in ("seen", "unseen", "all"))
    assert len(seen) >= 600 and len(unseen) == 100 and both == seen + unseen
    assert len(set(both)) == len(both)
    assert all(name.isascii() and name == name.lower() and name.replace(" ", "").isalnum() for name in both)
    with pytest.raises(ValueError, match="not 'train'"):
        class_names("train")


def test_every_name_has_artwork_of_one_code_point():
    for label, (code, _, _) in enumerate(name_table()):
        assert len(chr(int(code, 16))) == 1 and not 0x1F1E6 <= int(code, 16) <= 0x1F1FF
        assert not 0x1F3FB <= int(code, 16) <= 0x1F3FF
        assert embedded_scenes._artwork(label).size == (72, 72)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("euro banknote", "a euro banknote"),
        ("one oclock", "a one oclock"),
        ("hourglass done", "an hourglass done"),
        ("x ray", "an x ray"),
        ("eight thirty", "an eight thirty"),
        ("umbrella", "an umbrella"),
    ],
)
def test_articles(name, expected):
    assert prompt(name) == expected


def test_vocabulary_is_ascending_and_covers_every_caption():
    kept = vocabulary()
    assert kept == sorted(set(kept)) and kept[-2:] == [49406, 49407]
    tokenizer = Tokenizer(64, kept)
    for name in class_names("all"):
        tokenizer.ids(prompt(name))
    for split in ("train", "unseen", "retrieval"):
        for index in range(100):
            tokenizer.ids(scene(split, index)[1])
    used = {token for name in class_names("all") for token in tokenizer.ids(prompt(name))}
    assert len(kept) - len(used) < 40  # the rest is the grammar's


def test_the_embedded_architecture_keeps_this_vocabulary():
    kept = load_architecture("common/embedded_clip.json")["text_cfg"]["vocabulary"]
    assert kept == vocabulary()


def test_a_full_caption_says_the_facts():
    main = Emoji(class_names("all").index("owl"), 40.0, 10.0, 24.0, 0.0)
    other = Emoji(class_names("all").index("ant"), 12.0, 40.0, 40.0, 0.0)
    drawn = Scene("orange", bytes(48), main, other)
    assert drawn.caption() == "a large owl on the left on an orange background with an ant"
    assert drawn.caption(False, False, False, False) == "an owl"
    assert Scene("blue", bytes(48), main, None).caption(place=False) == "a large owl on a blue background"
    assert drawn.facts() == {
        "label": main.label,
        "name": "owl",
        "colour": "orange",
        "place": "left",
        "size": "large",
        "second": "ant",
        "second_label": other.label,
    }


def test_pictures_show_what_the_facts_say():
    for index in range(60):
        drawn, _ = scene("train", index)
        bare = Scene(drawn.colour, drawn.grid, drawn.main, None)
        background = Image.frombytes("RGB", (4, 4), drawn.grid)
        mean = np.asarray(background).mean((0, 1))
        nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
        assert nearest == drawn.colour
        empty = background.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        changed = np.asarray(bare.render()).astype(int) - np.asarray(empty)
        y, x = np.nonzero(np.abs(changed).sum(-1) > 60)
        if len(y):  # the emoji's own pixels lie around its stated centre
            margin = (CANVAS - VIEW) / 2
            assert np.abs(y - drawn.main.y - margin).max() < 0.75 * drawn.main.size + 2
            assert np.abs(x - drawn.main.x - margin).max() < 0.75 * drawn.main.size + 2


def test_twice_the_pixels_show_the_same_scene_in_more_detail():
    """Shrunk by the filter that drew them, they are those of 48 px; what these lack is the artwork's edges."""
    left, lacking = 0.0, 0.0
    for index in range(30):
        drawn, _ = scene("train", index)
        small, large = drawn.render(), drawn.render(96)
        assert large.size == (112, 112) == (2 * small.width, 2 * small.height)
        shrunk = np.asarray(large.resize(small.size, Image.Resampling.LANCZOS)).astype(int)
        enlarged = np.asarray(small.resize(large.size, Image.Resampling.BICUBIC)).astype(int)
        left, lacking = left + np.abs(shrunk - small).mean(), lacking + np.abs(enlarged - large).mean()
    assert left < 0.5 * lacking


def test_pictures_of_96_px_are_packed_apart(small, architecture):
    data = EmbeddedDataModule(architecture, batch_size=4, num_workers=0, root=str(small), image_size=96, revision=1)
    for split in ("train", "val"):
        assert next(iter(data.dataloader(split)))["image"].shape == (4, 3, 96, 96)
    assert pack("val", small, 96) != pack("val", small) and recipe_hash(48) == recipe_hash()
    with pytest.raises(ValueError, match="image_size 64: the embedded pictures are drawn at one of"):
        EmbeddedDataModule(architecture, image_size=64, revision=1)


def test_a_second_emoji_is_another_one_and_mostly_apart():
    labels = range(len(class_names()))
    scenes = [draw_scene(Random(i), i % 50, labels) for i in range(800)]
    crowded = [drawn for drawn in scenes if drawn.second]
    assert 0.07 < len(crowded) / len(scenes) < 0.13
    gaps = [np.hypot(s.main.x - s.second.x, s.main.y - s.second.y) / (s.main.size + s.second.size) * 2 for s in crowded]
    assert all(s.second.label != s.main.label for s in crowded)
    assert np.mean(np.array(gaps) >= 0.99) > 0.9


def test_scenes_are_reproducible_and_each_cycle_shows_every_name():
    assert scene("train", 7) == scene("train", 7) != scene("train", 8)
    assert scene("train", 7)[0] != scene("val", 7)[0]
    labels = [order("train", cycle) for cycle in (0, 1)]
    assert labels[0] != labels[1] and all(Counter(order) == Counter(range(len(class_names()))) for order in labels)
    held_out = {scene("unseen", index)[0].main.label for index in range(len(class_names("unseen")))}
    assert held_out == set(range(len(class_names()), len(class_names("all"))))


def test_sizes_of_the_splits():
    assert len(indices("train")) == 60_000
    assert len(indices("test")) == 20_608 == 32 * len(class_names())
    with pytest.raises(ValueError, match="not 'dev'"):
        indices("dev")


def test_retrieval_has_one_picture_per_full_caption(monkeypatch):
    monkeypatch.setitem(embedded.SPLITS, 1, {"retrieval": (40, 10)})
    clash = scene("retrieval", 0)
    monkeypatch.setattr(splits, "scene", lambda split, i, _: clash if i in (3, 5) else scene(split, i))
    chosen = indices("retrieval")
    captions = [scene("retrieval", index)[1] for index in chosen]
    assert len(set(captions)) == 40 and not {3, 5} & set(chosen)
    assert all(" background" in caption for caption in captions)


def test_packing_is_reproducible_and_happens_once(small):
    folder = pack("val", small / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["samples"] == 14
    assert [entry["samples"] for entry in manifest["shards"].values()] == [5, 5, 4]
    for name, entry in manifest["shards"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert pack("val", small / "a") == folder and (folder / "manifest.json").stat().st_mtime_ns == before
    again = json.loads((pack("val", small / "b") / "manifest.json").read_text())
    assert again["shards"] == manifest["shards"]


def test_an_interrupted_packing_leaves_nothing(small, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(splits, "track", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack("val", small / "c")
    assert [path for path in (small / "c").rglob("*") if path.is_file() or path.name.startswith(".val")] == []


def test_the_recipe_of_committed_weights_is_packed_where_it_was():
    """Weights and results rest on exactly these pictures; the current revision is the second."""
    assert recipe_hash() == "b826e6208df7" and recipe_hash(96) == "8284890503b5"
    assert splits.recipe_hash() == splits.recipe_hash(revision=2) == "54f1f85ce4ae"
    assert splits.recipe_hash(revision=3) == "46e02749af0c"


def test_another_revision_has_a_mend():
    for call in (
        lambda: splits.scene("val", 0, 4),
        lambda: indices("val", revision=4),
        lambda: pack("val", revision=4),
    ):
        with pytest.raises(ValueError, match="revision 4: the embedded benchmark has the revisions 1, 2, 3"):
            call()
    with pytest.raises(ValueError, match="revision 0"):
        EmbeddedDataModule(revision=0)


def test_another_recipe_is_packed_elsewhere(monkeypatch):
    before = recipe_hash()
    monkeypatch.setitem(RECIPE, "degrees", 30)
    assert recipe_hash() != before


def test_the_data_module_delivers_every_split(small, architecture):
    data = EmbeddedDataModule(architecture, batch_size=4, num_workers=0, root=str(small), revision=1)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 10
    assert batches[0]["image"].shape == (4, 3, 48, 48) and batches[0]["text"].shape[1] <= 32
    for split, pictures in (("val", 14), ("test", 12), ("unseen", 6), ("retrieval", 9)):
        loader = data.dataloader(split)
        found = list(loader)
        assert len(found) == len(loader)
        keys = [key for batch in found for key in batch["key"]]
        assert len(set(keys)) == len(keys) == pictures
        first = int(keys[0].split("-")[1])
        drawn, caption = scene(split, first)
        assert int(found[0]["label"][0]) == drawn.main.label
        ids = data.tokenizer.ids(caption)
        assert found[0]["text"][0, : len(ids)].tolist() == ids
    with pytest.raises(ValueError, match="not 'dev'"):
        data.dataloader("dev")
