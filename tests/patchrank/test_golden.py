"""Golden rankings against a reference that removes one block of one picture at a time, in plain loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.flops import count_macs
from common.tower import ImageTower
from patchrank import golden
from patchrank.golden import Variants, class_step, golden_macs, golden_ranking

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 16}
GRID, TOKENS = 4, 16
SCALE = 10.0


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def classes():
    return F.normalize(torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1)


def slow_embedding(tower, image, layer, kept):
    """The whole tower on one picture [1,3,S,S] that goes on with only the patches ``kept`` at a layer."""
    x = tower.run_blocks(tower.embed(image), stop=layer)
    return tower.pool(tower.run_blocks(x[:, [0] + [1 + place for place in kept]], start=layer))[0]


def slow_cost(score, full, pruned, label):
    if score == "feature":
        return 1 - F.cosine_similarity(full, pruned, dim=0).item()
    posterior = (SCALE * F.cosine_similarity(pruned[None], classes())).softmax(0)
    return 1 - (posterior[label] if score == "label" else posterior.max()).item()


def slow_ranking(tower, image, label, score, layer, block, stride, rounds, removed):
    full = slow_embedding(tower, image, layer, range(TOKENS))
    corners = range(0, GRID - block + 1, stride)
    remaining, tail, scores = list(range(TOKENS)), [], [0.0] * TOKENS
    for number in range(rounds):
        window_costs = {token: [] for token in remaining}
        for row, column in ((r, c) for r in corners for c in corners):
            window = {GRID * r + c for r in range(row, row + block) for c in range(column, column + block)}
            gone = [token for token in remaining if token in window]
            if gone:
                pruned = slow_embedding(tower, image, layer, [token for token in remaining if token not in gone])
                for token in gone:
                    window_costs[token].append(slow_cost(score, full, pruned, label))
        for token, costs in window_costs.items():
            scores[token] = sum(costs) / len(costs)
        order = sorted(remaining, key=lambda token: -scores[token])  # stable: of equal ones the first in the grid
        if number < rounds - 1:
            order, tail = order[:-removed], order[-removed:] + tail
            remaining = sorted(order)
    return order + tail, scores


@pytest.mark.parametrize(
    ("score", "layer", "block", "stride", "rounds", "removed"),
    [
        ("feature", 1, 2, 1, 1, None),  # the default: one shot, sliding
        ("feature", 1, 1, 1, 1, None),  # every single token
        ("feature", 0, 1, 1, 3, 2),
        ("feature", 2, 2, 2, 1, None),  # the last block; tiles, whose tokens tie
        ("feature", 2, 2, 1, 4, 3),
        ("feature", 1, 4, 1, 1, None),  # one window of all tokens: the class token alone
        ("feature", 1, 2, 1, 15, 1),  # down to two tokens
        ("label", 1, 2, 1, 1, None),
        ("label", 1, 2, 2, 3, 3),  # what is left of a tile
        ("confidence", 1, 3, 1, 2, 7),
        ("confidence", 0, 2, 1, 1, None),
    ],
)
@torch.no_grad()
def test_equals_one_block_of_one_picture_at_a_time(tower, score, layer, block, stride, rounds, removed):
    pictures, labels = images(), torch.tensor([3, 1])
    ranking = golden_ranking(
        tower,
        pictures,
        score,
        prune_layer=layer,
        block=block,
        stride=stride,
        rounds=rounds,
        removed_per_round=removed,
        class_embeddings=classes(),
        logit_scale=SCALE,
        labels=labels,
    )
    for row, label in enumerate(labels):
        order, scores = slow_ranking(
            tower, pictures[row : row + 1], label, score, layer, block, stride, rounds, removed
        )
        assert ranking.order[row].tolist() == order
        torch.testing.assert_close(ranking.scores[row], torch.tensor(scores, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("memory", [1, 2**20, None])
@torch.no_grad()
def test_neither_batch_nor_memory_changes_a_ranking(tower, memory):
    pictures, options = images(5), {"prune_layer": 1, "rounds": 2, "removed_per_round": 4}
    alone = [golden_ranking(tower, picture[None], **options) for picture in pictures]
    together = golden_ranking(tower, pictures, **options, memory=memory)
    assert torch.equal(together.order, torch.cat([one.order for one in alone]))
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), atol=1e-12, rtol=0)


def test_no_picture_gives_no_ranking(tower):
    assert golden_ranking(tower, images(0), prune_layer=1).order.shape == (0, TOKENS)


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_the_class_step_is_the_class_row_of_the_block(quick_gelu):
    torch.manual_seed(0)
    block = ImageTower(**TOWER, quick_gelu=quick_gelu).double().transformer.resblocks[0]
    nn.init.normal_(block.attn.in_proj_bias)
    x = torch.randn(3, 7, 64, dtype=torch.float64)
    torch.testing.assert_close(class_step(block, x), block(x)[:, :1], atol=1e-10, rtol=0)


@torch.no_grad()
def test_no_two_variants_of_a_round_are_the_same(tower, monkeypatch):
    seen, embed = [], Variants.embed

    def record(variants, image, tokens):
        seen.extend((len(row), *row) for row in tokens.tolist())
        return embed(variants, image, tokens)

    monkeypatch.setattr(golden.Variants, "embed", record)
    golden_ranking(tower, images(1), prune_layer=1, rounds=4, removed_per_round=4)
    # The whole picture, 9 sliding windows, and in later rounds at most as many; what remains differs by round.
    assert len(set(seen)) == len(seen) < 1 + 4 * 9


class Ranker(nn.Module):
    """What the counter counts."""

    def __init__(self, tower, **options):
        super().__init__()
        self.tower, self.options = tower, options

    def forward(self, pictures):
        return golden_ranking(self.tower, pictures, **self.options).scores


@pytest.mark.parametrize(("layer", "block", "stride"), [(0, 1, 1), (1, 2, 1), (1, 2, 2), (2, 3, 1)])
def test_the_stated_cost_is_what_is_counted(layer, block, stride):
    torch.manual_seed(0)
    tower, settings = ImageTower(**TOWER), {"prune_layer": layer, "block": block, "stride": stride}
    macs = count_macs(Ranker(tower, **settings), torch.randn(1, 3, 32, 32))
    assert round(1e9 * macs.gmacs) == golden_macs(tower, layer, block, stride)
    assert round(1e9 * macs.gmacs_paper) == golden_macs(tower, layer, block, stride, attention=False)


def test_the_stated_cost_of_greedy_rounds_is_a_close_bound():
    torch.manual_seed(0)
    tower, settings = ImageTower(**TOWER), {"prune_layer": 1, "rounds": 2, "removed_per_round": 3}
    macs = 1e9 * count_macs(Ranker(tower, **settings), torch.randn(1, 3, 32, 32)).gmacs
    assert 0.8 * golden_macs(tower, **settings) < macs <= golden_macs(tower, **settings)


def test_the_cost_beside_that_of_a_pass_for_every_variant():
    """One picture of ViT-B/16, 169 windows before block 3 of 12."""
    with torch.device("meta"):
        tower = ImageTower(image_size=224, patch_size=16, width=768, layers=12, heads=12, embed_dim=512)
    whole = 17_583_121_920

    def block(tokens):
        return 12 * 768**2 * tokens + 2 * 768 * tokens**2 + 2 * 5 * 768 * tokens

    each = whole - 9 * (block(197) - block(193))
    assert 1.55 < 169 * each / golden_macs(tower) < 1.56


def test_settings_that_cannot_be_are_refused(tower):
    with pytest.raises(ValueError, match="prune_layer 3 is not one of this tower's blocks, 0 to 2"):
        golden_ranking(tower, images())
    with pytest.raises(ValueError, match="2 rounds need removed_per_round, not None"):
        golden_ranking(tower, images(), prune_layer=1, rounds=2)
    with pytest.raises(ValueError, match="3 rounds of 8 tokens leave nothing of 16 to rank; use at most 2 rounds"):
        golden_ranking(tower, images(), prune_layer=1, rounds=3, removed_per_round=8)
    with pytest.raises(ValueError, match="rounds 0"):
        golden_ranking(tower, images(), prune_layer=1, rounds=0)
    with pytest.raises(ValueError, match="'label' needs labels"):
        golden_ranking(tower, images(), "label", prune_layer=1, class_embeddings=classes(), logit_scale=SCALE)
    with pytest.warns(UserWarning, match="removed_per_round 5 changes nothing in one round"):
        golden_ranking(tower, images(), prune_layer=1, removed_per_round=5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_labels_are_one_a_picture(tower, count):
    texts = {"class_embeddings": classes(), "logit_scale": torch.tensor(SCALE)}
    labels = torch.zeros(count, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"labels of shape \({count},\) for 6 pictures; give one a picture"):
        golden_ranking(tower, images(6), score="label", prune_layer=1, labels=labels, memory=1, **texts)
