"""The masked autoencoder: what it sees, what it is asked for, and that it learns."""

from types import SimpleNamespace

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from common.preprocess import Preprocess
from mlip.guide import Guide
from mlip.guide_mae import GuideMAE


@pytest.fixture
def module():
    torch.manual_seed(0)
    return GuideMAE()


def places(*rows):
    return torch.tensor(rows)


@torch.no_grad()
def test_all_patches_in_order_give_the_guides_own_tokens(module):
    images = torch.randn(2, 3, 48, 48)
    tokens = module.encode(module.guide.shrink(images), torch.arange(16).expand(2, -1))
    torch.testing.assert_close(tokens, module.guide(images))
    assert tokens.shape == (2, 17, 64)


@torch.no_grad()
def test_masked_patches_do_not_reach_the_prediction(module):
    small, visible = torch.randn(1, 3, 32, 32), places([5, 0, 15, 10])
    other = torch.randn(1, 3, 32, 32)
    for patch in visible[0].tolist():
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        other[..., row : row + 8, column : column + 8] = small[..., row : row + 8, column : column + 8]
    predictions = [module.decode(module.encode(x, visible), visible) for x in (small, other)]
    assert predictions[0].shape == (1, 16, 3 * 8 * 8)
    torch.testing.assert_close(*predictions)


@torch.no_grad()
def test_visible_tokens_return_to_their_places(module):
    x, visible = torch.randn(1, 5, 64), places([5, 0, 15, 10])
    order = [2, 0, 3, 1]
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(module.decode(shuffled, visible[:, order]), module.decode(x, visible))


def test_targets_are_each_patchs_normalised_pixels(module):
    small = torch.randn(2, 3, 32, 32)
    patch = small[1, :, 8:16, 24:32]  # row 1, column 3
    expected = (patch - patch.mean()) / patch.std()
    torch.testing.assert_close(module.targets(small)[1, 7], expected.flatten(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_predicting_the_mean_costs_one_and_the_masks_can_be_fixed(module):
    images = torch.randn(4, 3, 48, 48)
    fixed = [module.loss(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert fixed[0] == fixed[1] != fixed[2]
    module.to_pixels.weight.zero_(), module.to_pixels.bias.zero_()
    assert module.loss(images).item() == pytest.approx(1, abs=0.01)


def test_it_learns_one_batch(module):
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), size=(48, 48), mode="bicubic")
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=3e-3), []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(module.loss(images))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_it_takes_pictures_as_the_data_shows_them(module):
    halves = Preprocess(48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(preprocess=halves))
    module.setup("fit")
    grey = torch.zeros(1, 3, 48, 48)  # of value 0.5 in the data's terms
    expected = (torch.tensor([0.5] * 3) - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(module.guide.shrink(grey)[0, :, 0, 0], expected)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_masks_that_hide_nothing_or_all_are_refused(ratio):
    with pytest.raises(ValueError, match="of 16 patches"):
        GuideMAE(mask_ratio=ratio)


def test_the_trained_guide_is_saved_alone(module, tmp_path):
    module.guide.save(tmp_path / "guide.safetensors", torch.float16)
    guide = Guide.from_weights(str(tmp_path / "guide.safetensors"))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(guide(images), module.guide(images), atol=2e-2, rtol=0)
