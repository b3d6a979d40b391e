"""Transforms against open_clip's own, closed cases, and the given generator as the only randomness."""

from dataclasses import asdict
from functools import partial
from random import Random

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from common.data.transforms import (
    center_view,
    eval_transform,
    random_box,
    random_view,
    to_batch,
    train_transform,
)
from common.preprocess import MEAN, STD, Preprocess


def noise(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


TAGS = {Preprocess.read(open_clip.get_pretrained_cfg(*tag), 32) for tag in open_clip.list_pretrained()}
"""The ways in which open_clip's weights want their pictures; besides, models of the hub may pad."""


@pytest.mark.parametrize("size", [(40, 40), (61, 37), (30, 91), (16, 17)], ids=str)
@pytest.mark.parametrize("preprocess", [*sorted(TAGS, key=repr), Preprocess(32, resize_mode="longest", fill_color=7)])
def test_evaluation_picture_is_open_clips_to_the_bit(size, preprocess):
    image = noise(*size)
    ours = to_batch([eval_transform(preprocess)(image, Random(0))], preprocess)[0]
    theirs = image_transform_v2(PreprocessCfg(**asdict(preprocess)), is_train=False)(image)
    assert torch.equal(ours, theirs)


def test_a_grey_picture_is_prepared_as_open_clip_does():
    ours = to_batch([eval_transform(Preprocess(32))(noise(61, 37, "L"), Random(0))], Preprocess(32))[0]
    theirs = image_transform_v2(PreprocessCfg(32), is_train=False)(noise(61, 37, "L"))
    assert torch.equal(ours, theirs)


def test_all_ways_of_open_clips_tags_are_tested():
    assert len(TAGS) == 8
    assert {way.resize_mode for way in TAGS} == {"shortest", "squash"}
    assert {way.interpolation for way in TAGS} == {"bicubic", "bilinear"}


def test_normalisation_in_closed_form():
    pictures = [np.full((4, 5, 3), value, np.uint8) for value in (0, 51, 255)]
    batch = to_batch(pictures, Preprocess(4))
    assert batch.shape == (3, 3, 4, 5) and batch.dtype == torch.float32 and batch.is_contiguous()
    for image, value in zip(batch, (0.0, 0.2, 1.0), strict=True):
        expected = (value - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 4, 5))


@pytest.mark.parametrize(("width", "height"), [(100, 100), (160, 120), (120, 160)])
def test_random_box_keeps_its_area_and_ratio(width, height):
    rng = Random(0)
    boxes = [random_box(width, height, (0.5, 0.7), rng) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        w, h = right - left, bottom - top
        assert 0.48 < w * h / (width * height) < 0.72
        assert 0.72 < w / h < 1.39
    assert len(set(boxes)) > 250


def test_random_box_of_a_long_picture_is_its_centre():
    assert random_box(400, 30, (0.9, 1.0), Random(0)) == (180, 0, 220, 30)
    assert random_box(30, 400, (0.9, 1.0), Random(0)) == (0, 180, 30, 220)


def test_train_scale_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="increasing pair"):
        train_transform(32, scale=(0.9, 1.2))


def test_random_view_without_jitter_is_the_centre():
    image = noise(56, 56)
    still = random_view(image, Random(0), image_size=48, view=48, degrees=0, scale=(1, 1), shift=0)
    np.testing.assert_array_equal(still, np.asarray(image)[4:52, 4:52])
    np.testing.assert_array_equal(center_view(image, Random(0), image_size=48, view=48), still)


def test_random_view_turns_about_the_centre_and_fills_with_the_corner():
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:], pixels[24:32, 24:32] = (10, 20, 30), 255
    view = partial(random_view, image_size=48, view=56, scale=(0.8, 0.8))
    turned = view(Image.fromarray(pixels), Random(1), degrees=40, shift=0)
    assert (turned[0, 0] == (10, 20, 30)).all() and (turned[24, 24] == 255).all()
    y, x = np.nonzero(turned[..., 0] > 128)
    assert abs(y.mean() - 23.5) < 0.3 and abs(x.mean() - 23.5) < 0.3


@pytest.mark.parametrize(
    "transform",
    [train_transform(32, (0.3, 0.9)), partial(random_view, image_size=32, view=48)],
    ids=["crop", "view"],
)
def test_the_generator_is_the_only_randomness(transform):
    image = noise(56, 56)
    first, again, other = (transform(image, Random(seed)) for seed in (5, 5, 6))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()


def test_flipped_pictures_are_mirrored_about_every_second_time():
    image = noise(32, 32)
    flip = train_transform(32, (1.0, 1.0), flip=True)
    plain = train_transform(32, (1.0, 1.0))
    mirrored = 0
    for seed in range(100):
        drawn, kept = flip(image, Random(seed)), plain(image, Random(seed))
        mirrored += not np.array_equal(drawn, kept)
        assert np.array_equal(drawn, kept) or np.array_equal(drawn, kept[:, ::-1])
    assert 30 < mirrored < 70
