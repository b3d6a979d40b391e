"""Scenes of texture, revision 3 of the embedded benchmark: nothing but the texture tells the class."""

import io
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, f_oneway

from benchmarks.together.reference_ladder import colour_histogram, grey_histogram, train_mlp
from common.clip import load_architecture
from common.data.embedded import module, textures
from common.data.embedded.module import EmbeddedDataModule, sample, scene
from common.data.embedded.textures import TEXTURES, VIEW, class_names, draw_scene, name_table, silhouettes, vocabulary
from common.data.embedded.twemoji import prompt
from common.data.transforms import center_view
from common.tokenizer import Tokenizer

LABELS = range(len(name_table()))


@cache
def drawn(split, count):
    """Scenes whose textures come in turn."""
    return [draw_scene(Random(f"{split}/{index}"), index % len(LABELS)) for index in range(count)]


def test_every_texture_has_a_name_and_all_are_seen():
    assert [code for code, _, _ in name_table()] == list(TEXTURES)
    assert class_names("seen") == class_names("all") and class_names("unseen") == [] and len(LABELS) == 20


def test_the_architecture_of_its_recipe_keeps_its_vocabulary_and_covers_every_caption():
    architecture = load_architecture("mlip/textures.json")
    assert architecture["text_cfg"]["vocabulary"] == vocabulary() and architecture["vision_cfg"]["layers"] == 6
    tokenizer = Tokenizer(architecture["text_cfg"]["context_length"], vocabulary())
    for text in [*map(prompt, class_names()), *(one.caption() for one in drawn("facts", 2000))]:
        tokenizer.ids(text)


def test_a_caption_says_the_facts_but_never_the_silhouette():
    one = draw_scene(Random(5), list(TEXTURES).index("checks"))
    facts = one.facts()
    assert one.caption(False, False, False, False) == "a checked shape"
    assert one.caption(place=False).endswith(f"{facts['size']} {facts['tint']} checked shape on {_a(facts['colour'])}")
    assert facts["silhouette"] not in one.caption()


def _a(colour):
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


@pytest.mark.parametrize("fact", ["silhouette", "tint", "colour", "place", "size"])
def test_no_fact_tells_the_texture(fact):
    """Chi-squared on 2,000 scenes; rare silhouettes are counted by thirteens."""
    pairs = Counter()
    for one in drawn("facts", 2000):
        value = one.facts()[fact] if fact != "silhouette" else silhouettes().index(one.shape.label) % 13
        pairs[one.label, value] += 1
    values = sorted({value for _, value in pairs}, key=str)
    counts = np.array([[pairs[label, value] for value in values] for label in LABELS])
    assert chi2_contingency(counts).pvalue > 0.001


@pytest.mark.parametrize("number", ["size", "x", "y", "angle", "period", "inverted", "gamma"])
def test_no_measure_tells_the_texture(number):
    of = {label: [] for label in LABELS}
    for one in drawn("facts", 2000):
        parts = (one.shape, one.fill, one.look)
        of[one.label].append(float(next(getattr(part, number) for part in parts if hasattr(part, number))))
    assert f_oneway(*of.values()).pvalue > 0.001


def test_the_fill_has_the_same_histogram_for_every_texture():
    one = draw_scene(Random(3), 0)
    mask = np.asarray(Image.new("L", (40, 30), 255)) > 0
    histograms = [
        np.bincount(replace(one.fill, texture=code).levels(mask, 4.0, 4.0, 1).ravel(), minlength=256)
        for code in TEXTURES
    ]
    assert all(np.array_equal(histogram, histograms[0]) for histogram in histograms)
    assert histograms[0][0] == pytest.approx(histograms[0][255], abs=1) and histograms[0][0] > 0.3 * mask.size


def test_only_the_fill_differs_between_two_textures_of_one_scene():
    one = draw_scene(Random(8), 0)
    other = replace(one, label=1, fill=replace(one.fill, texture="upright"))
    first, second = (np.asarray(each.render()).astype(int) for each in (one, other))
    mask, corner = one.shape.transformed(textures._silhouette(one.shape.label), 1)
    painted = Image.new("L", (textures.CANVAS, textures.CANVAS))
    painted.paste(mask, corner)
    differs = (first != second).any(-1)
    assert differs.any() and not differs[np.asarray(painted) == 0].any()


@cache
def stored(split, count):
    """The first pictures of a split as a model is shown them, and their labels."""
    found = [sample(split, index, revision=3) for index in range(count)]
    shown = [center_view(decoded(one), Random(0), image_size=VIEW, view=VIEW) for one in found]
    return shown, torch.tensor([json.loads(one["json"])["label"] for one in found])


def decoded(one):
    return Image.open(io.BytesIO(one["jpg"]))


@pytest.mark.parametrize("features", [colour_histogram, grey_histogram])
def test_a_histogram_of_stored_pictures_tells_no_texture(features):
    """800 pictures to learn from, 800 to name: chance is 5 %, and two and a half deviations above it 6.9 %."""
    (known, labels), (asked, answers) = (
        (torch.from_numpy(np.stack([features(picture) for picture in shown])).float(), truth)
        for shown, truth in (stored("train", 800), stored("val", 800))
    )
    right = (train_mlp(known, labels)(asked).argmax(-1) == answers).float().mean()
    assert right < 0.069


def test_jpeg_changes_no_value_by_more_than_rounding():
    """What it rounds away depends on the texture: a histogram of luminance would tell it."""
    for index in range(20):
        drawn_picture = np.asarray(scene("val", index, 3)[0].render()).astype(int)
        assert np.abs(np.asarray(decoded(sample("val", index, revision=3))) - drawn_picture).max() <= 5


def test_a_view_of_96_pixels_shows_the_same_scene():
    one = draw_scene(Random(2), 4)
    small, large = np.asarray(one.render()), np.asarray(one.render(96).reduce(2))
    assert np.abs(small.astype(int) - large).mean() < 16


def test_the_data_module_delivers_every_split(monkeypatch, tmp_path):
    monkeypatch.setitem(module.SPLITS, 3, {"train": (40, 10), "val": (14, 5), "test": (12, 6)})
    settings = {"root": str(tmp_path), "batch_size": 4, "num_workers": 0, "revision": 3}
    data = EmbeddedDataModule("mlip/textures.json", **settings)
    assert data.splits == ["train", "val", "test"] and data.class_prompts[0] == "a level striped shape"
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (4, 3, VIEW, VIEW)
    assert batch["label"].tolist() == [scene("test", index, 3)[0].label for index in range(4)]
