"""Exchanging kept patches: never worse than the ranking it starts from, and the best set where there are few."""

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from common.reduction import ReducedTower
from common.tower import ImageTower
from patchrank.golden import golden_ranking
from patchrank.golden_swaps import swapped
from patchrank.reducers import GoldenOracle

KEPT = 3


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(image_size=24, patch_size=8, width=64, layers=3, heads=2, embed_dim=16).eval()


def cosines(tower, images, order):
    with torch.no_grad():
        z = ReducedTower(tower, {1: GoldenOracle(KEPT / 9, order)})(images)
        return F.cosine_similarity(tower(images), z, dim=-1)


def test_exchanges_preserve_no_less_and_stay_an_order(tower):
    images = torch.randn(6, 3, 24, 24)
    order = golden_ranking(tower, images, prune_layer=1).order
    better = swapped(tower, images, order, KEPT, prune_layer=1, steps=5)
    assert torch.equal(better.sort(dim=1).values, torch.arange(9).expand(6, -1))
    before, after = cosines(tower, images, order), cosines(tower, images, better)
    assert (after >= before - 1e-6).all() and (after > before + 1e-4).any()


def test_from_any_start_exchanges_come_near_the_best_of_all_sets(tower):
    """The best of the 84 sets of 3 of 9 patches, by trying each."""
    image = torch.randn(1, 3, 24, 24)
    sets = list(combinations(range(9), KEPT))
    orders = torch.tensor([[*kept, *(place for place in range(9) if place not in kept)] for kept in sets])
    every = cosines(tower, image.expand(len(sets), -1, -1, -1), orders)
    worst = orders[every.argmin()][None]
    found = cosines(tower, image, swapped(tower, image, worst, KEPT, prune_layer=1, steps=9)).item()
    assert (every > found + 1e-6).sum() <= 4


def test_nothing_to_exchange_is_refused(tower):
    with pytest.raises(ValueError, match="kept 9 of 9 patches leaves nothing to exchange; keep 1 to 8"):
        swapped(tower, torch.randn(1, 3, 24, 24), torch.arange(9)[None], 9, prune_layer=1, steps=1)
