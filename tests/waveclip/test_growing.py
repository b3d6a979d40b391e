"""A tower for larger pictures that starts from one for smaller ones: equal on the halved picture, level for level."""

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from common.testing import tiny_architecture
from common.tower import ImageTower
from waveclip import WaveCLIPDistillation, WaveTower
from waveclip.growing import adopt_levels

SHAPE = {"patch_size": 8, "width": 32, "layers": 2, "heads": 2, "embed_dim": 16}


def tower(image_size, levels, seed, shape=SHAPE, **options):
    """A random WaveTower in which no parameter equals another's."""
    torch.manual_seed(seed)
    wave = WaveTower.from_image_tower(ImageTower(image_size, **shape), levels, **options)
    with torch.no_grad():
        for parameter in wave.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return wave


@pytest.mark.parametrize(("known", "new"), [(1, 1), (1, 2), (2, 1)])
@torch.no_grad()
def test_it_begins_with_what_the_smaller_tower_says_of_the_halved_picture(known, new):
    small, large = tower(32, known, 0).double(), tower(32 * 2**new, known + new, 1).double()
    adopt_levels(large, small)
    images = torch.randn(2, 3, 32 * 2**new, 32 * 2**new, dtype=torch.float64)
    levels, expected = large(images), small(F.avg_pool2d(images, 2**new))
    assert len(levels) == len(expected) + new
    torch.testing.assert_close(levels[: known + 1], expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_finer_levels_start_as_the_last_known_one():
    small, large = tower(32, 1, 0), tower(64, 2, 1)
    told_apart = large.tokenizer.band_embedding[4:].clone()
    adopt_levels(large, small)
    torch.testing.assert_close(large.tokenizer.details[1], small.tokenizer.details[0], atol=0, rtol=0)
    torch.testing.assert_close(large.tokenizer.class_tokens[2], small.tokenizer.class_tokens[1], atol=0, rtol=0)
    torch.testing.assert_close(large.tokenizer.band_embedding[4:], told_apart, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("size", "levels", "options", "message"),
    [
        (64, 1, {}, "1 levels at 64 px cannot begin one of 2 at 64 px"),
        (32, 2, {}, "2 levels at 32 px cannot begin"),
        (32, 1, {"wavelet": "db2"}, "wavelet: haar here, db2 in the tower of fewer levels"),
        (32, 1, {"shared_class_token": True}, "one class token for all levels: False here, True"),
    ],
)
def test_towers_that_do_not_fit(size, levels, options, message):
    with pytest.raises(ValueError, match=message):
        adopt_levels(tower(64, 2, 0), tower(size, levels, 1, **options))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"patch_size": 16}, "patch size: 8 here, 16 in the tower of fewer levels"),
        ({"layers": 3}, "depth: 2 here, 3 in"),
        ({"width": 64}, "width: 32 here, 64 in"),
        ({"embed_dim": 8}, "embedding dim: 16 here, 8 in"),
        ({"heads": 4}, "heads: 2 here, 4 in"),
        ({"mlp_ratio": 2.0}, "hidden width: 128 here, 64 in"),
        ({"quick_gelu": True}, "activation: GELU here, QuickGELU in"),
    ],
)
def test_towers_of_another_shape_do_not_fit(other, message):
    with pytest.raises(ValueError, match=message):
        adopt_levels(tower(64, 2, 0), tower(32, 1, 1, SHAPE | other))


@torch.no_grad()
def test_distillation_starts_from_a_file(tmp_path):
    small = WaveTower.from_image_tower(CLIP.tiny().image_tower)
    small.save(tmp_path / "small.safetensors", CLIP.tiny().architecture)
    options = {"image_size": 64, "levels": 2, "first_levels": str(tmp_path / "small.safetensors")}
    module = WaveCLIPDistillation(tiny_architecture(tmp_path), **options)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(module(images)[:2], small(F.avg_pool2d(images, 2)), atol=1e-5, rtol=0)
