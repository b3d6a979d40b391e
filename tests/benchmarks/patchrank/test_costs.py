"""Costs of Patch Ranking: single passes give the same scores, and the rendered text says what was run."""

import pytest
import torch

from benchmarks.patchrank import costs as patchrank_costs
from benchmarks.patchrank.costs import golden_cost, golden_time, one_by_one, pruning, verdicts
from benchmarks.patchrank.methods import DENSE, OURS, methods
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
    rows = pruning(tower, (0.5,), 2, 3)
    assert len(rows) == 2 * 7 and all(len(row["faster"]) == 3 for row in rows)
    by = {(row["layer"], row["keep"], row["method"]): row for row in rows}
    assert by[3, 0.5, OURS]["fewer_gmacs"] < by[0, 0.5, OURS]["fewer_gmacs"]
    for layer in (0, 3):
        assert by[layer, 0.5, "given scores"]["gmacs"] < by[layer, 0.5, "class attention"]["gmacs"]
    counted = [{"model": "a tower", **golden_cost(tower, layer)} for layer in (0, 1)]
    assert all(row["gmacs_paper"] < row["gmacs"] < row["gmacs_alone"] for row in counted)
    assert counted[1]["gmacs_alone"] > 1.5 * counted[1]["gmacs"]
    result = {
        "model": "a tower",
        "rounds": 3,
        "batch": 2,
        "dense": {"gmacs": 1.0, "gmacs_paper": 0.9},
        "rows": rows,
        "golden": [counted[0], counted[1] | golden_time(tower, 1, 2, 3, 1, 1.6)],
        "conditions": {"dtype": "float32", "device": "CPU", "threads": 2},
    }
    rendered = patchrank_costs.render(result)
    assert f"| {DENSE} | 1 | 0.9 |" in rendered["md"] and "3 of 9 variants (a tower)" in rendered["md"]
    assert rendered["md"].count(f"| {OURS} |") == 2 and rendered["md"].count("| counted alone |") == 1


def test_each_demand_on_time_has_its_verdict():
    def row(keep, faster, method=OURS):
        return {"layer": 3, "keep": keep, "method": method, "fewer_gmacs": 2.0, "faster": [faster, faster + 0.1]}

    golden = [{"model": "small", "layer": 1, "seconds": 1, "faster": 7.9, "least": 8.0}, {"model": "large", "layer": 0}]
    followed = [row(0.6, 1.9), row(0.5, 1.8), row(0.5, 0.5, "EViT")]
    pruned, ranked = verdicts({"rows": followed, "golden": golden})
    assert "**met**, by 2 of 2 rows, the least lower end 0.90 x." in pruned and "**not met**, 7.90 x" in ranked
    pruned, _ = verdicts({"rows": [row(0.6, 1.9), row(0.5, 1.7)], "golden": golden})
    assert "**not met**, by 1 of 2 rows, the least lower end 0.85 x; missed at block 3, keep 0.5." in pruned
    pruned, _ = verdicts({"rows": [row(0.6, 1.9), row(0.5, 1.79)], "golden": golden})
    assert "**not shown** (all medians reach it), by 1 of 2 rows, the least lower end 0.90 x;" in pruned
