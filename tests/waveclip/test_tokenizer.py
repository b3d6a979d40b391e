"""From a picture to tokens: how many, in which colours, and what they are before any training."""

import json

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from torch.nn import functional as F

from common.clip import CLIP
from common.flops import count_macs
from common.tower import ImageTower
from waveclip import WaveTower
from waveclip.tokenizer import WaveletTokenizer


def tower(image_size=32, patch_size=8):
    """A random image tower of one block."""
    torch.manual_seed(0)
    return ImageTower(image_size, patch_size, width=64, layers=1, heads=2, embed_dim=16)


@pytest.mark.parametrize(
    ("image_size", "levels", "tokens"),
    [(224, 1, [50, 148]), (448, 2, [50, 148, 589]), (448, 1, [197, 589])],
)
def test_tokens_of_each_step(image_size, levels, tokens):
    tokenizer = WaveletTokenizer(tower(image_size, 16), levels)
    assert [tokenizer.tokens_in(step) for step in range(tokenizer.steps)] == tokens
    bands = tokenizer.decompose(torch.zeros(1, 3, image_size, image_size))
    assert [tokenizer.embed(band, step).shape[1] for step, band in enumerate(bands)] == tokens


@pytest.mark.parametrize(
    ("image_size", "patch_size", "levels", "valid"),
    [(240, 16, 1, "224 or 256"), (224, 16, 2, "192 or 256"), (32, 8, 3, "64")],
)
def test_a_size_that_does_not_divide_is_refused_with_valid_ones(image_size, patch_size, levels, valid):
    with pytest.raises(ValueError, match=f"needs a multiple of .*; use {valid} pixels, or fewer levels") as error:
        WaveletTokenizer(tower(image_size, patch_size), levels)
    for size in valid.split(" or "):
        assert WaveletTokenizer(tower(int(size), patch_size), levels).image_size == int(size)
    assert f"image_size {image_size} with patch_size {patch_size} and levels {levels}" in str(error.value)


def test_an_odd_grid_names_the_option_that_makes_it_even(tmp_path):
    """As ViT-B/32's 7x7 patches at 224 pixels."""
    vision = {"image_size": 56, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    (tmp_path / "odd.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    odd = CLIP.from_open_clip(str(tmp_path / "odd.json"))
    odd.save(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"use 48 or 64 pixels.*image_size= builds a CLIP for other pixels"):
        WaveletTokenizer(odd.image_tower)
    for size in (48, 64):
        weights = str(tmp_path / "odd.safetensors")
        even = CLIP.from_open_clip(str(tmp_path / "odd.json"), weights, image_size=size)
        assert WaveletTokenizer(even.image_tower).tokens_in(0) == 1 + (size // 16) ** 2


def test_no_levels_and_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="levels 0: a wavelet tokenizer decomposes at least once"):
        WaveletTokenizer(tower(), levels=0)
    with pytest.raises(ValueError, match=r"pictures of \(32, 40\) pixels given to a tokenizer for 32"):
        WaveletTokenizer(tower()).decompose(torch.zeros(1, 3, 32, 40))


def test_colours_are_pillow_s_ycbcr_without_offsets():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = np.array(Image.fromarray(pixels).convert("YCbCr")).astype(float) - [0, 128, 128]
    images = torch.from_numpy(pixels).permute(2, 0, 1).double()[None]
    # Bands of haar are means of 2 x 2 pixels in the units of the picture; Pillow cuts each value to an integer.
    coarse = WaveletTokenizer(tower()).decompose(images)[0][0, 0]
    expected = F.avg_pool2d(torch.from_numpy(theirs).permute(2, 0, 1), 2)
    torch.testing.assert_close(coarse, expected, atol=1.0, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_the_coarse_pass_starts_as_the_teacher_at_low_resolution(levels):
    torch.manual_seed(0)
    teacher, factor = CLIP.tiny().image_tower, 2**levels
    low = ImageTower(32 // factor, 8, width=64, layers=2, heads=2, embed_dim=32)
    state = teacher.state_dict()
    first, grid = state["positional_embedding"].split([1, 16])
    pooled = F.avg_pool2d(grid.T.reshape(1, 64, 4, 4), factor).flatten(2)[0].T
    low.load_state_dict({**state, "positional_embedding": torch.cat([first, pooled])})
    images = torch.randn(3, 3, 32, 32)
    z, _ = WaveTower.from_image_tower(teacher, levels).begin(images)
    torch.testing.assert_close(z, low(F.avg_pool2d(images, factor)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"start": "teachr"}, "start 'teachr' is neither teacher nor random"),
        ({"transform": "fft"}, "transform 'fft' is neither conv nor ptwt"),
        ({"transform": "ptwt", "wavelet": "db2"}, "ptwt's 'db2' transform does not halve sizes exactly"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_at_once(option, message):
    with pytest.raises(ValueError, match=message):
        WaveletTokenizer(tower(), **option)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_bands_are_pywavelets_of_each_colour(wavelet):
    """Colours and the first level are one convolution; here they are made one after the other."""
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    picture = np.random.default_rng(0).standard_normal((3, 32, 32))
    colours = np.tensordot(matrix, picture, 1)
    low, middle, fine = pywt.wavedec2(colours, wavelet, mode="periodization", level=2, axes=(1, 2))
    images = torch.from_numpy(picture)[None]
    coarse, *details = WaveletTokenizer(tower(), levels=2, wavelet=wavelet).decompose(images)
    expected = [low[None] / 4, np.stack(middle) / 4, np.stack(fine) / 2]
    for actual, numbers in zip([coarse, *details], expected, strict=True):
        torch.testing.assert_close(actual[0], torch.from_numpy(numbers), atol=1e-5, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_transform_costs_twelve_by_twelve_products_a_block_of_pixels(levels):
    """Three colours in four bands, from 2 x 2 pixels of three colours; a second level sees a quarter as many."""

    class Decompose(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokenizer = WaveletTokenizer(tower(), levels)

        def forward(self, images):
            return self.tokenizer.decompose(images)

    blocks = sum((32 // 2**level) ** 2 for level in range(1, levels + 1))
    assert round(1e9 * count_macs(Decompose(), torch.zeros(1, 3, 32, 32)).gmacs) == 144 * blocks


@torch.no_grad()
def test_detail_filters_start_as_the_coarse_one_scaled():
    tokenizer = WaveletTokenizer(tower(), levels=1, detail_scale=3.0)
    torch.testing.assert_close(tokenizer.details[0], 3 * tokenizer.coarse.expand(3, -1, -1, -1, -1))


@torch.no_grad()
def test_each_token_sees_its_own_place_and_band_alone():
    tokenizer = WaveletTokenizer(tower(), levels=1)
    bands = torch.zeros(1, 3, 3, 16, 16)
    empty = tokenizer.embed(bands, 1)
    bands[0, 1, :, 8:, :8] = 1  # vertical detail, lower left: after the class token and four of horizontal detail
    changed = (tokenizer.embed(bands, 1) != empty).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 4 + 2]


@torch.no_grad()
def test_transforms_give_the_same_embeddings():
    torch.manual_seed(0)
    wave, images = WaveTower.from_image_tower(tower(), levels=2).double(), torch.randn(2, 3, 32, 32).double()
    conv = wave(images)
    wave.tokenizer.transform = "ptwt"
    for actual, expected in zip(wave(images), conv, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_a_random_start_shares_shapes_but_no_values():
    teacher, random = WaveletTokenizer(tower()), WaveletTokenizer(tower(), start="random")
    state = random.state_dict()
    assert {key: value.shape for key, value in teacher.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }
    for key in ("coarse", "details.0", "positions", "class_tokens"):
        assert not torch.isclose(teacher.state_dict()[key], state[key]).all(), key


def test_a_random_start_spreads_filters_by_their_fan_in():
    """Tokens of pictures of spread 1 have spread 1 then, whatever the patch size."""
    tokenizer = WaveletTokenizer(tower(), start="random")
    for filters in (tokenizer.coarse, tokenizer.details[0]):
        assert filters.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.05)
    for vectors in (tokenizer.positions, tokenizer.class_tokens):
        assert vectors.std().item() == pytest.approx(64**-0.5, rel=0.2)


def test_integer_images_are_refused():
    tokenizer = WaveletTokenizer(tower())
    with pytest.raises(ValueError, match=r"images of torch\.uint8: give normalised ones"):
        tokenizer.decompose(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
