"""The counter against closed formulas, as exact integers."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.attention import KVCache
from common.flops import count_macs, expected_macs
from common.tower import Block, ImageTower, TextTower
from tests.common.towers import undrawn


def tower_macs(tokens: int, width: int, layers: int, embed_dim: int, patch_inputs: int = 0) -> tuple[int, int]:
    """(gmacs_paper, gmacs) of a CLIP tower as integers, written out term by term."""
    qkv, out = tokens * width * 3 * width, tokens * width * width
    mlp = 2 * tokens * width * 4 * width
    norms = 2 * 5 * tokens * width
    attention = 2 * tokens * tokens * width
    ends = tokens * 5 * width + width * embed_dim  # the last norm, over every token, and the projection of one
    if patch_inputs:
        ends += (tokens - 1) * patch_inputs * width + 5 * tokens * width  # patches (no class token), ln_pre
    paper = layers * (qkv + out + mlp + norms) + ends
    return paper, paper + layers * attention


def integers(macs) -> tuple[int, int]:
    return round(macs.gmacs_paper * 1e9), round(macs.gmacs * 1e9)


IMAGE_B16 = (16_867_794_432, 17_583_121_920)
TEXT_B16 = (2_911_842_816, 2_984_698_368)


def test_formula_gives_the_published_integers():
    assert tower_macs(197, 768, 12, 512, patch_inputs=3 * 16 * 16) == IMAGE_B16
    assert tower_macs(77, 512, 12, 512) == TEXT_B16


def test_our_vit_b_16_towers():
    macs = count_macs(undrawn(lambda: ImageTower(224, 16, 768, 12, 12, 512)), torch.zeros(1, 3, 224, 224))
    assert integers(macs) == IMAGE_B16
    text = undrawn(lambda: TextTower(77, 49408, 512, 12, 8, 512))
    assert integers(count_macs(text, torch.zeros(1, 77, dtype=torch.long))) == TEXT_B16
    assert (macs.params, macs.gmacs_fft) == (86_192_640, 0)
    assert macs.by_module[""] == macs.gmacs
    assert round(macs.by_module["conv1"] * 1e9) == 196 * 768 * 768
    blocks = sum(macs.by_module[f"transformer.resblocks.{i}"] for i in range(12))
    assert blocks == pytest.approx(macs.by_module["transformer.resblocks"])


def test_precision_does_not_change_the_count():
    tower, images = ImageTower(32, 8, 64, 2, 1, 32), torch.zeros(2, 3, 32, 32)
    assert integers(count_macs(tower.bfloat16(), images.bfloat16())) == integers(count_macs(tower.float(), images))


def test_open_clips_towers_count_the_same():
    class Text(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.clip = clip

        def forward(self, ids):
            return self.clip.encode_text(ids)

    clip = undrawn(lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")))
    assert integers(count_macs(clip.visual, torch.zeros(1, 3, 224, 224))) == IMAGE_B16
    assert integers(count_macs(Text(clip), torch.zeros(1, 77, dtype=torch.long))) == TEXT_B16


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_and_real_tensors(batch):
    tower = ImageTower(32, 8, 64, 2, 2, 32)
    counted = integers(count_macs(tower, torch.zeros(batch, 3, 32, 32)))
    assert counted == tuple(batch * n for n in tower_macs(17, 64, 2, 32, patch_inputs=192))


def test_cached_queries_see_more_keys_than_they_are():
    class Refine(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(64, 2)

        def forward(self, old, new):
            cache = KVCache()
            self.block(old, cache=cache)
            return self.block(new, cache=cache)

    first, second = 5, 12
    paper, full = integers(count_macs(Refine(), torch.zeros(2, first, 64), torch.zeros(2, second, 64)))
    assert paper == 2 * (first + second) * (12 * 64 * 64 + 2 * 5 * 64)
    assert full - paper == 2 * 2 * 64 * (first * first + second * (first + second))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("function", "shapes", "paper", "extra"),
    [
        (torch.matmul, [(3, 4, 5), (5, 6)], 3 * 4 * 5 * 6, 0),
        (torch.matmul, [(4, 5), (3, 5, 6)], 3 * 4 * 5 * 6, 0),
        (torch.matmul, [(3, 4, 5), (5,)], 3 * 4 * 5, 0),
        (torch.matmul, [(5,), (5,)], 5, 0),
        (torch.bmm, [(3, 4, 5), (3, 5, 6)], 3 * 4 * 5 * 6, 0),
        (torch.mv, [(4, 5), (5,)], 20, 0),
        (torch.addmm, [(6,), (4, 5), (5, 6)], 120, 0),
        (torch.baddbmm, [(1, 4, 6), (3, 4, 5), (3, 5, 6)], 0, 360),
        (lambda x, y: torch.einsum("bnd, btd->btn", x, y), [(2, 49, 51), (2, 77, 51)], 2 * 49 * 77 * 51, 0),
        (
            lambda x, w: F.conv2d(x, w, padding=1, groups=4),
            [(2, 8, 9, 9), (12, 2, 3, 3)],
            2 * 81 * 12 * 2 * 9,
            0,
        ),
        (
            lambda x, w: F.conv_transpose2d(x, w, stride=2),
            [(2, 8, 5, 5), (8, 3, 2, 2)],
            2 * 25 * 8 * 3 * 4,
            0,
        ),
        (
            lambda q, k: F.scaled_dot_product_attention(q, k, k),
            [(2, 3, 5, 8), (2, 3, 7, 8)],
            0,
            6 * 5 * 7 * 16,
        ),
        (lambda x: F.gelu(x).mul_(2).add_(1).softmax(-1).topk(2)[0], [(3, 7)], 0, 0),
    ],
)
def test_operations(function, shapes, paper, extra):
    counted = integers(count_macs(Lambda(function), *(torch.zeros(shape) for shape in shapes)))
    assert counted == (paper, paper + extra)


@pytest.mark.parametrize(
    ("function", "shape", "factor", "values", "points"),
    [
        (lambda x: torch.fft.rfft(x), (3, 16), 1.25, 48, 16),
        (lambda x: torch.fft.rfft2(x, norm="ortho"), (2, 3, 14, 14), 1.25, 2 * 3 * 196, 196),
        (lambda x: torch.fft.rfft2(x, dim=(1, 2)), (2, 14, 14, 5), 1.25, 2 * 5 * 196, 196),
        (lambda x: torch.fft.fft2(x), (2, 3, 8, 8), 2.5, 2 * 3 * 64, 64),
        (lambda x: torch.fft.rfft(x, n=32), (3, 16), 1.25, 96, 32),
        (lambda x: torch.fft.fftn(x), (4, 8), 2.5, 32, 32),
        (lambda x: torch.fft.irfft2(x.to(torch.cfloat), s=(14, 14)), (2, 3, 14, 8), 1.25, 2 * 3 * 196, 196),
    ],
)
def test_fourier_transforms(function, shape, factor, values, points):
    macs = count_macs(Lambda(function), torch.zeros(shape))
    assert macs.gmacs_fft * 1e9 == pytest.approx(factor * values * math.log2(points), abs=0.6)
    assert (macs.gmacs, macs.gmacs_paper) == (macs.gmacs_fft, 0)


def test_multi_head_attention_is_seen_in_spite_of_its_fast_path():
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, norm_first=True)
    enabled = torch.backends.mha.get_fastpath_enabled()
    paper, full = integers(count_macs(layer, torch.zeros(2, 5, 64)))
    assert paper == 2 * 5 * (4 * 64 * 64 + 2 * 64 * 128 + 10 * 64)
    assert full - paper == 2 * 2 * 5 * 5 * 64
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match="aten::linalg_inv"):
        count_macs(Lambda(torch.linalg.inv), torch.eye(3))

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

    with pytest.raises(ValueError, match="Own"):
        count_macs(Lambda(Own.apply), torch.eye(3, requires_grad=True))
    with pytest.raises(ValueError, match="two operands"):
        count_macs(Lambda(lambda x: torch.einsum("ab,bc,cd->ad", x, x, x)), torch.eye(3))


def test_mode_is_restored_and_any_result_will_do():
    @dataclass
    class Result:
        z: torch.Tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = nn.Dropout(), nn.Linear(4, 3)

        def forward(self, x):
            assert (self.training, torch.is_grad_enabled()) == (False, False)
            return Result(self.fc(self.drop(x)))

    model = Model().train()
    model.fc.eval()
    assert round(count_macs(model, torch.zeros(2, 4)).by_module["fc"] * 1e9) == 24
    assert (model.training, model.drop.training, model.fc.training) == (True, True, False)


def test_expected_cost_of_an_early_exit():
    short, long = (count_macs(nn.Linear(4, width), torch.zeros(1, 4)) for width in (1, 3))
    macs = expected_macs([short, long], [0.75, 0.25])
    assert macs.gmacs * 1e9 == pytest.approx(0.75 * 4 + 0.25 * 12)
    assert macs.by_module[""] == pytest.approx(macs.gmacs)
    assert macs.params == 15
    for paths, fractions, message in [
        ([short], [0.5, 0.5], "1 paths and 2 fractions"),
        ([short, long], [0.5, 0.6], "sum to 1"),
        ([short, long], [1.5, -0.5], "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            expected_macs(paths, fractions)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_convolution_with_its_padding_in_words_counts_as_one_in_numbers(padding):
    image = torch.zeros(1, 3, 16, 16)
    words = nn.Conv2d(3, 4, 3, padding=padding, groups=1)
    numbers = nn.Conv2d(3, 4, 3, padding=1 if padding == "same" else 0)
    assert count_macs(words, image).gmacs == count_macs(numbers, image).gmacs > 0


def test_a_result_may_name_the_module_that_made_it():
    """As a reducer's context names its block, whose packed weights name it in turn."""

    class Reducer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.linear.packed = SimpleNamespace(module=self.linear)

        def forward(self, x):
            return self.linear(x), SimpleNamespace(block=self.linear)

    assert round(1e9 * count_macs(Reducer(), torch.zeros(2, 4)).gmacs) == 2 * 4 * 4
