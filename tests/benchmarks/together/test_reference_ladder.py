"""The rungs of the reference ladder: histograms without places, their MLP, and a CLIP's own answers."""

import numpy as np
import pytest
import torch

from benchmarks.together.reference_ladder import (
    CHANCE,
    GREY,
    RGB,
    colour_histogram,
    grey,
    grey_histogram,
    measured,
    named_right,
    train_mlp,
    without_training,
)
from common.clip import CLIP
from common.data.transforms import to_batch


def flat(red, green, blue, side=8):
    """A picture of one colour."""
    return np.full((side, side, 3), (red, green, blue), np.uint8)


@pytest.mark.parametrize("features", [colour_histogram, grey_histogram])
def test_a_histogram_knows_nothing_about_places(features):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    moved = picture.reshape(64, 3)[np.random.default_rng(1).permutation(64)].reshape(8, 8, 3)
    assert np.array_equal(features(picture), features(moved))
    assert np.square(features(picture)).sum() == pytest.approx(1)


def test_a_histogram_counts_six_levels_of_each_channel():
    shares = [colour_histogram(flat(*colour)) for colour in ((0, 0, 0), (255, 130, 0))]
    assert [len(values) for values in shares] == [216, 216]
    assert [values.argmax() for values in shares] == [0, (5 * 6 + 3) * 6]


def test_grey_pictures_keep_luminance_alone():
    picture = flat(200, 100, 50)
    assert np.array_equal(grey(picture), flat(124, 124, 124)), "0.299 R + 0.587 G + 0.114 B"
    assert np.array_equal(grey_histogram(picture), grey_histogram(grey(picture)))


def test_an_mlp_learns_what_its_features_tell():
    labels = torch.arange(400) % 4
    features = torch.nn.functional.one_hot(labels, 16) + 0.1 * torch.randn(400, 16, generator=torch.manual_seed(0))
    assert (train_mlp(features, labels, epochs=10)(features).argmax(-1) == labels).float().mean() > 0.95


def test_a_clip_is_right_where_its_own_answer_is_the_label():
    torch.manual_seed(0)
    clip, prompts = CLIP.tiny().eval(), ["a red cat", "a green dog", "a blue bird"]
    size = clip.image_tower.image_size
    shown = list(np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8))
    texts = clip.encode_text(clip.tokenizer(prompts))
    answers = (clip.encode_image(to_batch(shown, clip.preprocess)) @ texts.T).argmax(-1)
    assert named_right(clip, shown, answers, prompts).all()
    assert not named_right(clip, shown, (answers + 1) % 3, prompts).any()


def test_what_needs_no_tower_stands_below_it():
    labels = torch.arange(60) % 2
    shown = [flat(255 * int(label), 0, 0) for label in labels]
    rows = {row["row"]: row["accuracy"] for row in without_training(2, (shown, labels), (shown, labels))}
    assert rows == {CHANCE: 0.5, RGB: 1.0, GREY: 1.0}


def test_a_row_is_the_mean_of_its_training_seeds():
    row = measured("teacher", [torch.tensor([True, False]), torch.tensor([True, True])])
    assert row["accuracy"] == 0.75 and row["interval"][0] <= 0.75 <= row["interval"][1]
