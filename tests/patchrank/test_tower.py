"""The pruned tower against the dense one on the very tokens that the predictor chooses."""

import pytest
import torch
from torch import nn

from common import attention
from common.clip import CLIP
from common.flops import count_macs
from patchrank.predictor import RankPredictor
from patchrank.prompts import Prompts
from patchrank.tower import PatchRankTower

TOKENS = 16  # patch tokens of CLIP.tiny(): 32 px, patch 8


@pytest.fixture
def parts():
    """A tower of two blocks, a predictor for it, three pictures."""
    torch.manual_seed(0)
    tower = CLIP.tiny().image_tower
    return tower, RankPredictor.for_tower(tower), torch.randn(3, 3, 32, 32)


class Reversed(RankPredictor):
    """The same scores with the opposite sign."""

    def forward(self, x):
        return -super().forward(x)


def chosen(tower, predictor, images, layer, count):
    """Places [B,count], ascending, of the predictor's highest scores."""
    scores = predictor(tower.run_blocks(tower.embed(images), stop=layer))
    return scores.topk(count, dim=-1).indices.sort(-1).values


def on_tokens(tower, images, layer, kept):
    """z of the dense blocks with only the patches ``kept`` [B,R] from block ``layer`` on."""
    x = tower.run_blocks(tower.embed(images), stop=layer)
    patches = torch.stack([row[1 + places] for row, places in zip(x, kept, strict=True)])
    return tower.pool(tower.run_blocks(torch.cat([x[:, :1], patches], dim=1), start=layer))


@torch.no_grad()
def test_keeping_everything_equals_the_dense_tower(parts):
    tower, predictor, images = parts
    for given in (predictor, None):
        torch.testing.assert_close(PatchRankTower(tower, given, 1.0, 1)(images), tower(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_half_the_tokens_are_those_of_the_highest_scores(parts, layer):
    tower, predictor, images = parts
    kept = chosen(tower, predictor, images, layer, TOKENS // 2)
    pruned = PatchRankTower(tower, predictor, 0.5, layer)
    torch.testing.assert_close(pruned(images), on_tokens(tower, images, layer, kept), atol=1e-5, rtol=0)
    x, context = pruned.run(images)
    assert x.shape[1] == 1 + TOKENS // 2 and torch.equal(context.positions, kept)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_reversed_scores_keep_the_complement(parts, layer):
    tower, predictor, images = parts
    opposite = Reversed(64, TOKENS + 1)
    opposite.load_state_dict(predictor.state_dict())
    first, second = (
        PatchRankTower(tower, ranker, 0.5, layer).run(images)[1].positions for ranker in (predictor, opposite)
    )
    for row, other in zip(first.tolist(), second.tolist(), strict=True):
        assert sorted(row + other) == list(range(TOKENS))


@pytest.mark.parametrize(("keep", "count"), [(0.9, 14), (0.6, 10), (0.1, 2)])
def test_the_number_of_tokens_follows_from_the_rate_alone(parts, keep, count):
    tower, predictor, images = parts
    for batch in (images, images[:1]):
        assert PatchRankTower(tower, predictor, keep, 1).run(batch)[0].shape[1] == 1 + count


@torch.no_grad()
def test_equal_scores_keep_the_earlier_tokens(parts):
    tower, predictor, images = parts
    nn.init.zeros_(predictor.head.weight)
    assert PatchRankTower(tower, predictor, 0.25, 1).run(images)[1].positions.tolist() == [[0, 1, 2, 3]] * 3


@torch.no_grad()
def test_a_compiled_tower_with_prompts_is_one_graph_and_equal(parts):
    tower, predictor, images = parts
    pruned = PatchRankTower(tower, predictor, 0.5, 1, Prompts("visual", 2, 2, 64, 64)).eval()
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), pruned(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_block_attends_by_the_fused_kernel_to_the_tokens_that_are_left(parts, monkeypatch):
    tower, predictor, images = parts
    seen = []
    fused = attention.fused_attention

    def spy(query, key, value, mask=None):
        seen.append((query.shape[2], key.shape[2], mask))
        return fused(query, key, value, mask)

    monkeypatch.setattr(attention, "fused_attention", spy)
    PatchRankTower(tower, predictor, 0.5, 1)(images)
    assert seen == [(17, 17, None), (9, 9, None)]


def test_the_count_is_the_dense_blocks_on_fewer_tokens_and_the_predictor(parts):
    tower, predictor, images = parts
    layer, width, tokens = 1, 64, TOKENS + 1
    dense, pruned = (count_macs(model, images[:1]) for model in (tower, PatchRankTower(tower, predictor, 0.5, layer)))
    fewer = tokens - TOKENS // 2

    def block(n):
        return 12 * n * width**2 + 2 * n**2 * width + 2 * 5 * n * width

    ranking = count_macs(predictor, torch.zeros(1, tokens, width)).gmacs
    last_norm = 5 * width * (tokens - fewer)
    saved = (block(tokens) - block(fewer) + last_norm) / 1e9
    assert pruned.gmacs == pytest.approx(dense.gmacs - saved + ranking, abs=1e-12)
    assert pruned.by_module["predictor"] == pytest.approx(ranking)
    assert pruned.params == dense.params + 128 + 2 * 64 * 256 + 256 + 64 + 128 + 65 + 2 * 17 * 32 + 32 + 17


@pytest.mark.parametrize("prune", [True, False])
@torch.no_grad()
def test_a_saved_tower_comes_back(parts, tmp_path, prune):
    tower, predictor, images = parts
    made = PatchRankTower(tower, predictor if prune else None, 0.5 if prune else 1.0, 1)
    made.save(tmp_path / "patchrank.safetensors", CLIP.tiny().architecture)
    again = PatchRankTower.load(tmp_path / "patchrank.safetensors")
    assert torch.equal(again(images), made(images))
    assert (again.keep, again.prune_layer, again.kept) == (made.keep, made.prune_layer, made.kept)


def test_what_does_not_go_together_is_refused(parts, tmp_path):
    tower, predictor, _ = parts
    CLIP.tiny().save(tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"keep 0\.5 prunes, which needs a predictor"):
        PatchRankTower(tower, None, 0.5, 1)
    with pytest.raises(ValueError, match="a predictor for 197 tokens of width 768 does not fit a tower with 17"):
        PatchRankTower(tower, RankPredictor(), 0.5, 1)
    for keep in (0.5, 1.0):
        with pytest.raises(ValueError, match="from 0 to 1"):
            PatchRankTower(tower, predictor, keep, 2)
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in"):
        PatchRankTower(tower, predictor, 1.5, 1)
    with pytest.raises(ValueError, match="does not describe a PatchRankTower"):
        PatchRankTower.load(tmp_path / "clip.safetensors")
