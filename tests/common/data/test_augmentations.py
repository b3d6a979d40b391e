"""Named augmentations against torchvision's steps, further views of a batch, and rewritten captions."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional as tv

from common.data.augmentations import (
    AUGMENTATIONS,
    augmentation,
    distorted,
    enhanced,
    jittered,
    sometimes_grey,
    swapped_or_shortened,
    turned_hue,
)
from common.data.smoke import write_shards
from common.data.transforms import train_transform

CAPTION = "a red cat on the green dog"


def picture(size=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(("name", "scale"), [("clip", (0.9, 1)), ("slip", (0.5, 1)), ("mocov2", (0.2, 1))])
def test_names_stand_for_the_papers_crops(name, scale):
    assert AUGMENTATIONS[name].scale == scale
    assert AUGMENTATIONS[name].flip == AUGMENTATIONS[name].distort == (name == "mocov2")


def test_a_plain_augmentation_is_the_random_crop():
    ours = augmentation("slip").transform(16)(picture(), Random(3))
    np.testing.assert_array_equal(ours, train_transform(16, (0.5, 1.0))(picture(), Random(3)))


def test_scale_and_flip_can_be_chosen_apart():
    chosen = augmentation("mocov2", scale=[0.08, 1.0], flip=False)
    assert chosen.scale == (0.08, 1.0) and not chosen.flip and chosen.distort


@pytest.mark.parametrize("turn", [-0.1, -0.02, 0.0, 0.07])
def test_the_hue_is_torchvisions(turn):
    np.testing.assert_array_equal(turned_hue(picture(), turn), tv.adjust_hue(picture(), turn))


@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
def test_the_other_jitters_are_torchvisions(kind):
    theirs = {"Brightness": tv.adjust_brightness, "Contrast": tv.adjust_contrast, "Color": tv.adjust_saturation}[kind]
    ours = enhanced(picture(), getattr(ImageEnhance, kind), 1.3)
    np.testing.assert_array_equal(ours, theirs(picture(), 1.3))


def test_distortions_come_with_moco_v2s_probabilities():
    rng, flat = Random(0), Image.new("RGB", (8, 8), (200, 40, 90))
    results = [np.asarray(distorted(flat, rng)) for _ in range(2000)]
    grey = np.mean([(result[..., 0] == result[..., 2]).all() for result in results])
    same = np.mean([(result == np.asarray(flat)).all() for result in results])  # a blur leaves a flat picture as it is
    assert grey == pytest.approx(0.2, abs=0.03) and same == pytest.approx(0.2 * 0.8, abs=0.03)


def test_a_share_of_the_pictures_is_grey_and_the_others_stay():
    rng, red = Random(0), Image.new("RGB", (2, 2), (200, 40, 90))
    shown = [sometimes_grey(red, rng, share=0.2) for _ in range(2000)]
    grey = [(picture == np.asarray(red.convert("L"))[..., None]).all() for picture in shown]
    assert np.mean(grey) == pytest.approx(0.2, abs=0.03)
    assert sum((picture == np.asarray(red)).all() for picture in shown) == 2000 - sum(grey)


def test_bright_values_are_inverted_with_the_probability_that_is_asked_for():
    """Solarising is torchvision's at a threshold of 128; what is drawn before it stays as it was."""
    changed = 0
    for seed in range(200):
        plain, drawn = (distorted(picture(), Random(seed), blur=0.1, solarise=share) for share in (0.0, 0.2))
        if not np.array_equal(plain, drawn):
            np.testing.assert_array_equal(drawn, tv.solarize(plain, 128))
            changed += 1
    assert 0.1 < changed / 200 < 0.3
    assert (AUGMENTATIONS["aclip"].blur, AUGMENTATIONS["aclip"].solarise) == (0.1, 0.2)


def test_the_generator_is_the_only_randomness():
    transform = augmentation("mocov2").transform(16)
    np.testing.assert_array_equal(transform(picture(), Random(5)), transform(picture(), Random(5)))
    assert (transform(picture(), Random(5)) != transform(picture(), Random(6))).any()
    assert np.asarray(jittered(picture(), Random(0))).shape == (24, 24, 3)


def test_a_caption_is_rewritten_from_its_own_words():
    rng, words = Random(0), CAPTION.split()
    results = [swapped_or_shortened(CAPTION, rng).split() for _ in range(500)]
    assert all(result and set(result) <= set(words) for result in results)
    swapped = [result for result in results if sorted(result) == sorted(words) and result != words]
    assert len(swapped) / len(results) == pytest.approx(0.5, abs=0.06)
    assert all(sum(a != b for a, b in zip(result, words, strict=True)) == 2 for result in swapped)
    assert swapped_or_shortened("cat", rng) == "cat"


def test_a_training_batch_has_the_views_that_are_asked_for(tmp_path, module):
    pattern = write_shards(tmp_path / "s", 2, 4, txt=lambda n: f"picture of a red cat number {n}".encode())
    data = module(pattern, pattern, batch_size=4, image_views=["mocov2", "slip"], text_view="eda")
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch["image_views"]] == [batch["image"].shape] * 2
    assert not torch.equal(*batch["image_views"])
    assert len(batch["text_view"]) == 4 and not torch.equal(batch["text_view"], batch["text"])
    again = next(iter(module(pattern, batch_size=4).train_dataloader()))
    assert torch.equal(again["image"], batch["image"]) and "image_views" not in again  # views draw after the picture
    evaluated = next(iter(data.val_dataloader()))
    assert "image_views" not in evaluated and "text_view" not in evaluated


def test_a_rewritten_caption_without_a_visible_word_stays_as_it_was(tmp_path, module):
    pattern = write_shards(tmp_path / "s", 1, 8, txt=lambda n: "cat \u200b".encode())
    data = module(pattern, batch_size=8, text_view="eda")
    data._text_view = lambda caption, rng: caption.split(" ")[1]
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["text_view"], batch["text"])


def test_a_loaders_scale_and_flip_stand_in_for_the_augmentations(tmp_path, module):
    data = module(write_shards(tmp_path / "s", 1, 4), augmentation="slip", scale=[0.1, 0.2], flip=True)
    expected = train_transform(data.image_size, (0.1, 0.2), flip=True)
    for seed in range(4):  # mirrored and not
        ours = data.picture_transform(train=True)(picture(), Random(seed))
        np.testing.assert_array_equal(ours, expected(picture(), Random(seed)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "simclr"}, "augmentation 'simclr' is none of clip, slip, mocov2"),
        ({"image_views": ["mocov3"]}, "augmentation 'mocov3' is none of"),
        ({"text_view": "synonyms"}, "text_view 'synonyms' is none of eda"),
    ],
)
def test_unknown_names_are_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)
