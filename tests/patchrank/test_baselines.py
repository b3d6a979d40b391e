"""The training-free baselines against their papers' formulas, written as loops over one picture's tokens."""

import pytest
import torch
from torch.nn import functional as F

from common.flops import count_macs
from common.reduction import ReducedTower
from common.tower import ImageTower
from patchrank.baselines import ClassAttention, EViT, GoldenOracle, RandomKeep, ToMe, bipartite_soft_matching
from patchrank.golden import golden_ranking

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 16}
PATCHES = 16


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slow_attention(block, x, sizes=None):
    """What attention adds to one picture's tokens x [N,D], its weights [H,N,N] and keys [H,N,D/H]; no fused kernel."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (part.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + torch.tensor(sizes).double().log()
    weights = logits.softmax(-1)
    return attention.out_proj((weights @ value).transpose(0, 1).flatten(1)), weights, key


def class_row(block, x):
    """Attention [K] of the class token to the patches, mean over heads."""
    return slow_attention(block, x)[1][:, 0, 1:].mean(0)


def rest(tower, x, start):
    """One picture's tokens x [N,D] through the blocks from ``start`` on -> z [E]."""
    return tower.pool(tower.run_blocks(x[None], start=start))[0]


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.05])
@torch.no_grad()
def test_class_attention_keeps_what_the_class_token_looks_at(tower, keep):
    pictures, count = images(), {0.5: 8, 0.9: 14, 0.05: 1}[keep]
    reduced = ReducedTower(tower, {1: ClassAttention(keep)})
    z, context = reduced(pictures), reduced.run(pictures)[1]
    for row, picture in enumerate(pictures):
        x = tower.run_blocks(tower.embed(picture[None]), stop=1)[0]
        seen = class_row(tower.transformer.resblocks[1], x).tolist()
        kept = sorted(range(PATCHES), key=lambda place: -seen[place])[:count]
        assert context.positions[row].tolist() == kept
        torch.testing.assert_close(z[row], rest(tower, x[[0] + [1 + place for place in kept]], 1))


@torch.no_grad()
def test_class_attention_between_the_half_steps_prunes_what_the_block_has_attended(tower):
    picture = images(1)
    x = tower.run_blocks(tower.embed(picture), stop=1)[0]
    block = tower.transformer.resblocks[1]
    kept = class_row(block, x).topk(8).indices
    x = x + slow_attention(block, x)[0]
    x = block.feed_forward(x[torch.cat([torch.tensor([0]), 1 + kept])])
    z = ReducedTower(tower, {(1, "middle"): ClassAttention(0.5)})(picture)[0]
    torch.testing.assert_close(z, rest(tower, x, 2))


@torch.no_grad()
def test_random_keeps_the_same_places_whatever_the_batch(tower):
    def places(seed, pictures):
        return ReducedTower(tower, {1: RandomKeep(0.5, seed)}).run(pictures)[1].positions

    first = places(0, images(3))
    assert first.shape == (3, 8) and len(first[0].unique()) == 8
    assert torch.equal(first, places(0, images(1)).expand(3, -1))
    kept = torch.zeros(PATCHES)
    for seed in range(200):
        kept[places(seed, images(1))[0]] += 1
    assert (kept - 100).abs().max() < 5 * 50**0.5  # each place binomial: 200 draws at one half


@torch.no_grad()
def test_the_oracle_keeps_the_head_of_the_golden_order(tower):
    pictures = images(3)
    order = golden_ranking(tower, pictures, prune_layer=1).order
    z = ReducedTower(tower, {1: GoldenOracle(0.6, order)})(pictures)
    x = tower.run_blocks(tower.embed(pictures), stop=1)
    for row in range(3):
        kept = [0] + [1 + place for place in order[row, :10].tolist()]
        torch.testing.assert_close(z[row], rest(tower, x[row, kept], 1))
    with pytest.raises(ValueError, match=r"orders \(3, 16\) do not fit \(2, 16\)"):
        ReducedTower(tower, {1: GoldenOracle(0.6, order)})(pictures[:2])


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_evit_fuses_what_it_drops(tower, fuse):
    pictures = images()
    reduced = ReducedTower(tower, {(1, "middle"): EViT(0.75, fuse)})
    z, context = reduced(pictures), reduced.run(pictures)[1]
    block = tower.transformer.resblocks[1]
    for row, picture in enumerate(pictures):
        entered = tower.run_blocks(tower.embed(picture[None]), stop=1)[0]
        seen = class_row(block, entered).tolist()
        order = sorted(range(PATCHES), key=lambda place: -seen[place])
        kept, dropped = order[:12], order[12:]
        x = entered + slow_attention(block, entered)[0]
        tokens = [x[0]] + [x[1 + place] for place in kept]
        if fuse:
            total = sum(seen[place] for place in dropped)
            tokens.append(sum(seen[place] / total * x[1 + place] for place in dropped))
        torch.testing.assert_close(z[row], rest(tower, block.feed_forward(torch.stack(tokens)), 2))
        assert context.positions[row].tolist() == kept + [-1] * fuse
    if fuse:
        assert context.sizes.tolist() == [[1.0] * 12 + [4.0]] * 2


@torch.no_grad()
def test_two_evits_count_every_patch_once(tower):
    context = ReducedTower(tower, {(i, "middle"): EViT(0.5) for i in range(3)}).run(images())[1]
    assert context.sizes.sum(1).tolist() == [PATCHES, PATCHES] and context.sizes.shape == (2, 4)


def slow_tome(tower, picture, removed, proportional):
    """One picture through ToMe in every block, token by token -> z [E], sizes."""
    x, sizes = tower.embed(picture[None])[0], [1.0] * (1 + PATCHES)
    for block in tower.transformer.resblocks:
        added, _, keys = slow_attention(block, x, sizes if proportional else None)
        x, keys = x + added, F.normalize(keys.mean(0), dim=-1)
        patches = list(range(1, len(x)))
        a, b = patches[::2], patches[1::2]
        edges = [(max((float(keys[i] @ keys[j]), j) for j in b), i) for i in a]
        edges = sorted(edges, reverse=True)[: min(removed, len(patches) // 2)]
        target = {i: j for (_, j), i in edges}
        staying = [i for i in a if i not in target] + b
        groups = [[0]] + [[j] + [i for i in target if target[i] == j] for j in staying]
        x = torch.stack([sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group) for group in groups])
        sizes = [sum(sizes[i] for i in group) for group in groups]
        x = block.feed_forward(x)
    return tower.pool(x[None])[0], sizes[1:]


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("removed", [1, 3, 8])
@torch.no_grad()
def test_tome_merges_the_most_similar_pairs(tower, removed, proportional):
    pictures = images()
    reduced = ReducedTower(tower, {(i, "middle"): ToMe(removed, proportional) for i in range(3)})
    x, context = reduced.run(pictures)
    assert x.shape[1] == {1: 14, 3: 8, 8: 3}[removed]
    for row, picture in enumerate(pictures):
        z, sizes = slow_tome(tower, picture, removed, proportional)
        torch.testing.assert_close(reduced(pictures)[row], z)
        assert context.sizes[row].tolist() == sizes


@torch.no_grad()
def test_tome_says_which_tokens_are_still_single_patches(tower):
    context = ReducedTower(tower, {(0, "middle"): ToMe(5)}).run(images())[1]
    for positions, sizes in zip(context.positions, context.sizes, strict=True):
        assert ((positions == -1) == (sizes > 1)).all()
        single = positions[positions >= 0]
        assert len(single.unique()) == len(single) and sizes.sum() == PATCHES


def test_matching_five_tokens_by_hand():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.1, 1.0], [3.0, 0.3], [0.0, -1.0]]])
    staying, going, partner = bipartite_soft_matching(keys, 2)
    # A holds tokens 0, 2, 4; B holds 1 and 3. Token 2 is closest to 1, token 0 to 3, and 4 to none.
    assert sorted(zip(going[0].tolist(), partner[0].tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert staying.tolist() == [[2]]


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing_under_proportional_attention(tower):
    """A picture of one colour without positions: all patches are equal, so a merged one may stand for them."""
    tower.positional_embedding.zero_()
    plain = torch.ones(1, 3, 32, 32, dtype=torch.float64)

    def merged(proportional):
        return ReducedTower(tower, {(i, "middle"): ToMe(4, proportional) for i in range(3)})(plain)

    torch.testing.assert_close(merged(True), tower(plain))
    assert (merged(False) - tower(plain)).abs().max() > 1e-3


NOTHING = [
    {1: ClassAttention(1.0)},
    {0: RandomKeep(1.0)},
    {(1, "middle"): EViT(1.0)},
    {(i, "middle"): ToMe(0) for i in range(3)},
    {1: GoldenOracle(1.0, torch.arange(PATCHES).flip(0).expand(2, -1))},
]
HALF = [
    {1: ClassAttention(0.5)},
    {0: RandomKeep(0.5)},
    {0: ClassAttention(0.9), (1, "middle"): EViT(0.5)},
    {(i, "middle"): ToMe(4) for i in range(3)},
    {1: GoldenOracle(0.5, torch.arange(PATCHES).expand(2, -1))},
]


def names(reducers):
    return type(list(reducers.values())[-1]).__name__


@pytest.mark.parametrize("reducers", NOTHING, ids=names)
@torch.no_grad()
def test_keeping_everything_equals_the_tower(tower, reducers):
    torch.testing.assert_close(ReducedTower(tower, reducers)(images()), tower(images()))


@pytest.mark.parametrize("reducers", HALF, ids=names)
@torch.no_grad()
def test_each_compiles_into_one_graph_of_fixed_shapes(tower, reducers):
    reduced = ReducedTower(tower, reducers)
    compiled = torch.compile(reduced, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images()), reduced(images()))


@pytest.mark.parametrize("reducers", HALF, ids=names)
def test_each_is_counted_and_costs_less_than_the_tower(reducers):
    torch.manual_seed(0)
    tower, pictures = ImageTower(**TOWER), images().float()
    assert count_macs(ReducedTower(tower, reducers), pictures).gmacs < 0.9 * count_macs(tower, pictures).gmacs


def test_settings_that_make_no_sense_are_refused(tower):
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in"):
        ReducedTower(tower, {1: ClassAttention(1.5)})(images())
    with pytest.raises(ValueError, match="removed -1 is negative"):
        ToMe(-1)
    with pytest.raises(ValueError, match="EViT does not follow a reducer with proportional attention"):
        ReducedTower(tower, {(0, "middle"): ToMe(2), (1, "middle"): EViT(0.5)})(images())
