"""Costs of Patch Ranking: what is timed alone gives the same scores, and what is rendered says what was run."""

import pytest
import torch

from benchmarks import patchrank_costs
from benchmarks.patchrank_costs import DENSE, PREDICTOR, golden, methods, one_by_one, pruning
from common.tower import ImageTower
from patchrank.golden import golden_ranking
from patchrank.scores import grid_blocks, token_scores

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "embed_dim": 16}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).eval()


def test_a_pass_for_every_variant_gives_the_same_scores(tower):
    picture, windows = torch.randn(1, 3, 32, 32), grid_blocks(4, 2)
    costs = one_by_one(tower, picture, 1, windows)
    expected = golden_ranking(tower, picture, prune_layer=1).scores
    torch.testing.assert_close(token_scores(costs, windows[None]), expected, atol=1e-5, rtol=1e-3)


def test_all_methods_lose_about_as_many_tokens(tower):
    """12 of 16 patches from block 1 of 4: 12 token-blocks less, and ToMe 2 + 4 + 6."""
    counts = {}
    for name, model in methods(tower, 0.75, 1).items():
        seen = counts.setdefault(name, [])
        hooks = [
            block.mlp.register_forward_pre_hook(lambda part, given, seen=seen: seen.append(given[0].shape[1]))
            for block in tower.transformer.resblocks
        ]
        with torch.no_grad():
            model(torch.randn(1, 3, 32, 32))
        for hook in hooks:
            hook.remove()
    assert counts.pop("ToMe") == [17, 15, 13, 11]
    assert counts.pop("EViT") == [17, 14, 14, 14]  # the fused token comes on top
    assert set(map(tuple, counts.values())) == {(17, 13, 13, 13)}


def test_rows_hold_every_method_layer_and_rate_and_render(tower):
    rows = pruning(tower, (0.75, 0.5), {True: 1, False: 2}, 1)
    assert len(rows) == 2 * 2 * 5 and {row["batch"] for row in rows if row["method"] == PREDICTOR} == {1}
    by = {(row["layer"], row["keep"], row["method"]): row for row in rows}
    for layer in (0, 3):
        assert by[layer, 0.5, PREDICTOR]["gmacs"] < by[layer, 0.75, PREDICTOR]["gmacs"]
        assert by[layer, 0.5, "given scores"]["gmacs"] < by[layer, 0.5, "class attention"]["gmacs"]
    result = {
        "model": "a tower",
        "dense": {"gmacs": 1.0, "gmacs_paper": 0.9},
        "rows": rows,
        "golden": {"a tower": golden(tower, 1, 2, 3, 1)},
        "conditions": {"dtype": "float32", "device": "CPU", "threads": 2},
    }
    rendered = patchrank_costs.render(result)
    assert f"| {DENSE} | 1 | 0.9 |" in rendered["md"] and "3 of 9 variants (a tower)" in rendered["md"]
    assert rendered["md"].count(f"| {PREDICTOR} |") == 4
    assert result["golden"]["a tower"]["gmacs_alone"] > 1.5 * result["golden"]["a tower"]["gmacs"]
