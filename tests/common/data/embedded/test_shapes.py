"""Scenes of shape, revision 2 of the embedded benchmark: names, captions, and pictures whose colours tell nothing."""

import csv
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.resources import files
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency

from common.clip import load_architecture
from common.data.embedded import module, shapes, splits
from common.data.embedded.module import EmbeddedDataModule
from common.data.embedded.shapes import (
    CANVAS,
    COLOURS,
    VIEW,
    Emoji,
    Look,
    Scene,
    class_names,
    draw_scene,
    name_table,
    vocabulary,
)
from common.data.embedded.twemoji import prompt
from common.tokenizer import Tokenizer, encode

scene, indices, pack, order = (
    partial(f, revision=2) for f in (module.scene, module.indices, module.pack, splits._order)
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Revision 2 with a few dozen pictures a split; gives the folder for its shards."""
    sizes = {"train": (40, 10), "val": (14, 5), "test": (12, 6), "unseen": (6, 3), "retrieval": (9, 3)}
    monkeypatch.setitem(module.SPLITS, 2, sizes)
    return tmp_path


@pytest.fixture
def architecture(tmp_path):
    """A description of a 48 px CLIP over the vocabulary of revision 2, as a file."""
    kept = vocabulary()
    text = {"context_length": 32, "vocab_size": len(kept), "width": 64, "heads": 1, "layers": 1, "vocabulary": kept}
    vision = {"image_size": 48, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64}
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(file)


def test_names():
    seen, unseen, both = (class_names(split) for split in ("seen", "unseen", "all"))
    assert len(seen) == 252 and len(unseen) == 126 and both == seen + unseen
    assert len(set(both)) == len(both)
    assert all(name.isascii() and name == name.lower() and name.replace(" ", "").isalnum() for name in both)
    with pytest.raises(ValueError, match="not 'train'"):
        class_names("train")


def test_the_names_follow_their_rule():
    with (files("common.data.embedded") / "shape_names.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    groups = {"Food & Drink": 95, "Activities": 44, "Objects": 163, "Symbols": 76}
    assert Counter(row["group"] for row in rows) == groups
    assert [row["split"] for row in rows] == ["seen", "seen", "unseen"] * 126
    assert all(len(row["name"]) <= 11 and not set(row["name"].split()) & set(COLOURS) for row in rows)


def test_every_name_has_artwork_of_one_code_point():
    for label, (code, _, _) in enumerate(name_table()):
        assert len(chr(int(code, 16))) == 1 and not 0x1F1E6 <= int(code, 16) <= 0x1F1FF
        assert not 0x1F3FB <= int(code, 16) <= 0x1F3FF
        artwork = shapes._artwork(label)
        assert artwork.size == (72, 72) and artwork.mode == "LA"


def test_the_luminance_of_nearly_every_artwork_has_the_full_range():
    """A few are flat, such as the suits of cards."""
    ranges = [np.ptp(np.asarray(shapes._artwork(label))[..., 0]) for label in range(len(name_table()))]
    assert np.mean(np.array(ranges) >= 254) > 0.9


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


def test_the_architecture_of_its_recipes_keeps_this_vocabulary():
    kept = load_architecture("common/shapes_clip.json")["text_cfg"]["vocabulary"]
    assert kept == vocabulary()


def look(tint: str) -> Look:
    return Look(tint, 1.0, False)


def test_a_full_caption_says_the_facts():
    main = Emoji(class_names("all").index("axe"), 40.0, 10.0, 24.0, 0.0, look("purple"))
    other = Emoji(class_names("all").index("egg"), 12.0, 40.0, 40.0, 0.0, look("orange"))
    drawn = Scene("orange", bytes(48), main, other)
    assert drawn.caption() == "a large purple axe on the left on an orange background with an orange egg"
    assert drawn.caption(False, False, False, False, False) == "an axe"
    assert drawn.caption(size=False, place=False, colour=False, second=False) == "a purple axe"
    assert Scene("blue", bytes(48), main).caption(tint=False, place=False) == "a large axe on a blue background"
    assert drawn.facts() == {
        "label": main.label,
        "name": "axe",
        "tint": "purple",
        "colour": "orange",
        "place": "left",
        "size": "large",
        "second": "egg",
        "second_label": other.label,
        "second_tint": "orange",
    }


@pytest.mark.parametrize(
    ("x", "y", "place"), [(24, 24, "middle"), (19, 24, "left"), (29, 29, "bottom right"), (24, 10, "top")]
)
def test_the_place_is_that_of_the_centre(x, y, place):
    assert Scene("blue", bytes(48), Emoji(0, 24.0, x, y, 0.0, look("red"))).place == place


def test_captions_have_nine_to_twelve_tokens_to_align():
    captions = [scene("train", index)[1] for index in range(1000)]
    lengths = [len(encode(caption)) - 1 for caption in captions]  # start-of-text aligns with nothing
    assert 9 <= np.mean(lengths) <= 12 and np.mean(np.array(lengths) >= 9) > 0.5
    assert max(lengths) < 32


def test_a_look_maps_luminance_to_shades_of_its_tint():
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    shades = np.asarray(Look("red", 1.0, False).paint(ramp.copy()))[0].astype(int)
    assert np.abs(shades[[0, 255]] - [[20, 4, 4], [250, 234, 234]]).max() <= 1  # .1 c, and c + .9 (255 - c)
    assert np.abs(shades[127:129] - COLOURS["red"]).max() <= 2 and (np.diff(shades, axis=0) >= 0).all()
    assert np.array_equal(np.asarray(Look("red", 1.0, True).paint(ramp.copy()))[0], shades[::-1])
    brighter = np.asarray(Look("red", 0.6, False).paint(ramp.copy()))[0]
    assert (brighter >= shades).all() and brighter[64].sum() > shades[64].sum()


def test_tint_background_and_name_are_independent():
    """Chi-squared of 2,000 scenes' tints against backgrounds, and of both against halves of the names."""
    drawn = [scene("train", index)[0] for index in range(2000)]
    tints, backgrounds = [s.main.look.tint for s in drawn], [s.colour for s in drawn]
    halves = [s.main.label % 2 for s in drawn]
    for left, right in ((tints, backgrounds), (tints, halves), (backgrounds, halves)):
        table = np.array(
            [[sum(p == (a, b) for p in zip(left, right, strict=True)) for b in set(right)] for a in set(left)]
        )
        assert chi2_contingency(table).pvalue > 0.001
    assert 0.45 < np.mean([s.main.look.inverted for s in drawn]) < 0.55


def test_the_main_emoji_fills_half_to_nearly_all_of_the_view():
    shares = [scene("train", index)[0].main.size / VIEW for index in range(500)]
    assert min(shares) >= 0.5 and max(shares) <= 0.95 and np.mean(shares) > 0.65


def test_pictures_show_what_the_facts_say():
    for index in range(60):
        drawn, _ = scene("train", index)
        bare = Scene(drawn.colour, drawn.grid, drawn.main)
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


def test_scraps_in_front_hide_at_most_a_fifth_of_the_emoji():
    shares = []
    for index in range(300):
        drawn, _ = scene("train", index)
        assert len(drawn.behind) + len(drawn.front) <= 6
        if drawn.front:
            emoji = _painted(Scene(drawn.colour, drawn.grid, drawn.main))
            scraps = _painted(Scene(drawn.colour, drawn.grid, drawn.front[0], front=drawn.front[1:]))
            shares.append((emoji * scraps).sum() / (shapes._coverage(drawn.main.label) * drawn.main.size**2))
    assert len(shares) > 80 and np.mean(shares) > 0.03
    assert max(shares) < 0.2 * 1.03  # widths are drawn as whole pixels


def _painted(drawn: Scene) -> np.ndarray:
    """The share of each pixel that its emoji cover [CANVAS,CANVAS]: less, the more black and white grounds differ."""
    blacks, whites = (np.asarray(replace(drawn, grid=bytes([value] * 48)).render()).astype(int) for value in (0, 255))
    return 1 - np.abs(whites - blacks).mean(-1) / 255


def test_grey_pictures_keep_the_outline_of_most_emoji():
    """The tints and backgrounds leave a step of luminance between object and ground, so that shape survives in grey."""
    steps = []
    for index in range(200):
        drawn, _ = scene("train", index)
        bare = Scene(drawn.colour, drawn.grid, drawn.main)
        mask = _painted(bare) > 0.5
        grey = np.asarray(bare.render().convert("L")).astype(int)
        empty = Image.frombytes("RGB", (4, 4), drawn.grid).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        steps.append(np.abs(grey - np.asarray(empty.convert("L")))[mask].mean())
    assert np.mean(np.array(steps) > 20) > 0.75


def test_half_the_pixels_are_the_means_of_two_by_two():
    drawn, _ = scene("train", 3)
    small = np.asarray(drawn.render(24)).astype(float)
    assert small.shape == (28, 28, 3)
    assert np.abs(np.asarray(drawn.render()).reshape(28, 2, 28, 2, 3).mean((1, 3)) - small).max() <= 0.5


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


@pytest.mark.parametrize("size", [24, 96])
def test_pictures_of_other_sizes_are_packed_apart(small, architecture, size):
    data = EmbeddedDataModule(architecture, batch_size=4, num_workers=0, root=str(small), image_size=size, revision=2)
    for split in ("train", "val"):
        assert next(iter(data.dataloader(split)))["image"].shape == (4, 3, size, size)
    assert pack("val", small, size) != pack("val", small)


def test_only_revision_2_draws_24_px():
    with pytest.raises(ValueError, match="image_size 24: the embedded pictures are drawn at one of"):
        EmbeddedDataModule(image_size=24, revision=1)
    with pytest.raises(ValueError, match="image_size 64"):
        EmbeddedDataModule("common/shapes_clip.json", image_size=64, revision=2)


def test_each_revision_is_packed_apart():
    assert module.recipe_hash(48, 2) not in (module.recipe_hash(48, 1), module.recipe_hash(96, 2))


def test_a_second_emoji_is_another_one_and_mostly_apart():
    labels = range(len(class_names()))
    scenes = [draw_scene(Random(i), i % 50, labels) for i in range(800)]
    crowded = [drawn for drawn in scenes if drawn.second]
    assert 0.25 < len(crowded) / len(scenes) < 0.35
    gaps = [np.hypot(s.main.x - s.second.x, s.main.y - s.second.y) / (s.main.size + s.second.size) * 2 for s in crowded]
    assert all(s.second.label != s.main.label for s in crowded)
    assert np.mean(gaps) > 0.9


def test_scenes_are_reproducible_and_each_cycle_shows_every_name():
    assert scene("train", 7) == scene("train", 7) != scene("train", 8)
    assert scene("train", 7)[0] != scene("val", 7)[0]
    assert scene("train", 7)[0].grid != module.scene("train", 7, 1)[0].grid, (
        "each revision has random numbers to itself"
    )
    assert splits._seed("test", 2) == "test, revision 2"
    labels = [order("train", cycle) for cycle in (0, 1)]
    assert labels[0] != labels[1] and all(Counter(order) == Counter(range(len(class_names()))) for order in labels)
    held_out = {scene("unseen", index)[0].main.label for index in range(len(class_names("unseen")))}
    assert held_out == set(range(len(class_names()), len(class_names("all"))))


def test_sizes_of_the_splits():
    assert len(indices("train")) == 60_000
    assert len(indices("val")) == len(indices("test")) == 20_000
    with pytest.raises(ValueError, match="not 'dev'"):
        indices("dev")


def test_retrieval_has_one_picture_per_full_caption(monkeypatch):
    monkeypatch.setitem(module.SPLITS, 2, {"retrieval": (40, 10)})
    clash = scene("retrieval", 0)
    monkeypatch.setattr(splits, "scene", lambda split, i, _: clash if i in (3, 5) else scene(split, i))
    chosen = indices("retrieval")
    captions = [scene("retrieval", index)[1] for index in chosen]
    assert len(set(captions)) == 40 and not {3, 5} & set(chosen)
    assert all(" background" in caption for caption in captions)


def test_the_data_module_delivers_every_split(small, architecture):
    data = EmbeddedDataModule(architecture, batch_size=4, num_workers=0, root=str(small), revision=2)
    assert data.class_names == class_names() and "recoloured" in data.attribution
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


def test_only_training_pictures_are_shown_in_grey(small, architecture):
    data = EmbeddedDataModule(architecture, batch_size=8, num_workers=0, root=str(small), revision=2, grey=1.0)
    for split, train in (("train", True), ("val", False)):
        image = next(iter(data.dataloader(split, train=train)))["image"]
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.preprocess.mean, data.preprocess.std))
        shown = image * std + mean
        assert ((shown - shown.mean(1, keepdim=True)).abs().max() < 1e-3) == train
    with pytest.raises(ValueError, match=r"grey 1\.5 is no share of the training pictures"):
        EmbeddedDataModule(architecture, revision=2, grey=1.5)
    with pytest.raises(ValueError, match=r"grey 0\.2 changes training pictures, and augment false shows them"):
        EmbeddedDataModule(architecture, revision=2, grey=0.2, augment=False)
