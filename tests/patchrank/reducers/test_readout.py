"""What reducers read of single tokens in towers of other libraries, each token by itself."""

import pytest
import torch

from common.adapters import adapt
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from patchrank.reducers.base import Readout
from tests.common.foreign import FAMILIES, foreign
from tests.common.test_adapters import WITHOUT_CLASS_TOKEN

TEXTS = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def tokens(tower):
    return torch.randn(2, 4, tower.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pictures(tower, count=2):
    size = tower.image_size
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_behind_a_class_token_it_is_the_norm_and_projection_of_each_token():
    original = foreign("CLIP")
    tower = adapt(original)
    expected = original.ln_post(tokens(tower)) @ original.proj
    torch.testing.assert_close(Readout(tower)(tokens(tower)), expected)


@torch.no_grad()
def test_where_patches_are_averaged_it_is_the_projection_of_each_normed_token():
    original = foreign("CLIP, mean of normed tokens")
    tower = adapt(original)
    expected = original.ln_post(tokens(tower)) @ original.proj
    torch.testing.assert_close(Readout(tower)(tokens(tower)), expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_what_the_tower_pools_where_all_tokens_are_equal(name):
    tower = adapt(foreign(name))
    read = Readout(tower)(tokens(tower))
    for row, column in ((0, 0), (1, 3)):
        equal = tokens(tower)[row, column].expand(1, tower.leading + 5, -1)
        torch.testing.assert_close(read[row, column], tower.pool(equal)[0])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_zoo_prune_runs_on_every_family_and_recoverable_compression_where_there_is_a_class_token(name):
    tower = adapt(foreign(name))
    setting = setting_for(tower, 0.5, 1, texts=TEXTS)
    x, _ = ReducedTower(tower, named("zoo-prune").reducers(setting)).run(pictures(tower))
    assert x.shape[1] == tower.leading + 8
    entry = named("recoverable-compression")
    if name in WITHOUT_CLASS_TOKEN:
        with pytest.raises(ValueError, match="this tower has no class token; take zoo-prune, or divprune"):
            entry.reducers(setting)
    else:
        assert ReducedTower(tower, entry.reducers(setting))(pictures(tower)).isfinite().all()
