"""The older reducers against their papers and released code, written as loops over one picture's tokens."""

import pytest
import torch
from torch.nn import functional as F

from common.reducer_registry import Setting, named, setting_for
from common.reduction import ReducedTower, ReductionContext
from patchrank.golden import golden_ranking
from patchrank.reducers import (
    ClassAttention,
    DivPrune,
    EViT,
    GlobalCom2,
    GoldenOracle,
    HiRED,
    RandomKeep,
    RandomPerBatch,
    RandomPerPicture,
    ToMe,
    VisionZip,
)
from patchrank.reducers.diffrate import schedule
from patchrank.reducers.tome import bipartite_soft_matching
from tests.patchrank.reducers.slow import PATCHES, class_row, images, rest, slow_attention, small_tower


@pytest.fixture
def tower():
    return small_tower()


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


@pytest.mark.parametrize(("reducer", "count"), [(ClassAttention(0.6), 10), (HiRED(0.6), 9)])
@torch.no_grad()
def test_after_a_block_its_own_attention_chooses_what_leaves_it(tower, reducer, count):
    picture = images(1)
    x = tower.run_blocks(tower.embed(picture), stop=1)[0]
    block = tower.transformer.resblocks[1]
    kept = class_row(block, x).topk(count).indices
    x = block(x[None])[0][torch.cat([torch.tensor([0]), 1 + kept])]
    z = ReducedTower(tower, {(1, "after"): reducer})(picture)[0]
    torch.testing.assert_close(z, rest(tower, x, 2))


def test_the_middle_of_a_block_and_after_it_exclude_each_other(tower):
    with pytest.raises(ValueError, match="reducers in the middle of block 1 and after it"):
        ReducedTower(tower, {(1, "middle"): EViT(0.5), (1, "after"): ClassAttention(0.5)})
    with pytest.raises(ValueError, match=r"a reducer at \(1, 'behind'\)"):
        ReducedTower(tower, {(1, "behind"): ClassAttention(0.5)})


def random_places(seed, positions):
    """What RandomKeep keeps of a picture's tokens at ``positions``: places among them."""
    tokens = torch.arange(1 + len(positions), dtype=torch.float64)[None, :, None]
    x, _ = RandomKeep(0.5, seed)(tokens, ReductionContext(torch.tensor([positions])))
    return (x[0, 1:, 0].long() - 1).tolist()


@torch.no_grad()
def test_random_keeps_the_same_places_whatever_the_batch(tower):
    reduced = ReducedTower(tower, {1: RandomKeep(0.5)})
    first = reduced.run(images(3))[1].positions
    assert first.shape == (3, 8) and len(first[0].unique()) == 8
    assert torch.equal(first, reduced.run(images(1))[1].positions.expand(3, -1))
    kept = torch.zeros(PATCHES)
    for seed in range(200):
        kept[random_places(seed, list(range(PATCHES)))] += 1
    assert (kept - 100).abs().max() < 5 * 50**0.5  # each place binomial: 200 draws at one half


def test_random_tells_merged_tokens_apart():
    """All of them have position -1, and each is kept or dropped by a draw of its own."""
    kept = torch.zeros(8)
    for seed in range(200):
        chosen = random_places(seed, [3, -1, -1, 5, -1, -1, 9, -1])
        assert len(set(chosen)) == 4
        kept[chosen] += 1
    assert (kept - 100).abs().max() < 5 * 50**0.5


@torch.no_grad()
def test_random_per_batch_draws_once_a_call_and_a_seed_gives_its_draws_again(tower):
    reduced = ReducedTower(tower, {1: RandomPerBatch(0.5)})

    def places(seed):
        torch.manual_seed(seed)
        return reduced.run(images(3))[1].positions

    kept = torch.zeros(PATCHES)
    for seed in range(200):
        first, *others = places(seed)
        assert len(set(first.tolist())) == 8 and all(torch.equal(first, other) for other in others)
        kept[first] += 1
    assert (kept - 100).abs().max() < 5 * 50**0.5  # each place binomial: 200 draws at one half
    assert torch.equal(places(3), places(3)) and not torch.equal(places(3), places(4))


@pytest.mark.parametrize(("cls", "fixed"), [(RandomKeep, True), (RandomPerBatch, False), (RandomPerPicture, False)])
@torch.no_grad()
def test_an_exported_graph_holds_the_one_draw_or_draws_in_each_call(tower, cls, fixed):
    exported = torch.export.export(ReducedTower(tower, {1: cls(0.5)}), (images(2),)).module()
    assert torch.equal(exported(images(2)), exported(images(2))) == fixed


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


@pytest.mark.parametrize(("form", "count"), [("released", 12), ("averaged", 11), (None, 12)])
@torch.no_grad()
def test_evit_fuses_what_it_drops(tower, form, count):
    """11.2 of 16 patches: released, rounded up and summed by attention; ours is rounded and averaged. None: dropped."""
    pictures = images()
    evit = EViT(0.7, fuse=False) if form is None else EViT(0.7, form)
    reduced = ReducedTower(tower, {(1, "middle"): evit})
    z, context = reduced(pictures), reduced.run(pictures)[1]
    block = tower.transformer.resblocks[1]
    for row, picture in enumerate(pictures):
        entered = tower.run_blocks(tower.embed(picture[None]), stop=1)[0]
        seen = class_row(block, entered).tolist()
        order = sorted(range(PATCHES), key=lambda place: -seen[place])
        kept, dropped = order[:count], order[count:]
        x = entered + slow_attention(block, entered)[0]
        tokens = [x[0]] + [x[1 + place] for place in kept]
        if form is not None:
            scale = 1.0 if form == "released" else sum(seen[place] for place in dropped)
            tokens.append(sum(seen[place] / scale * x[1 + place] for place in dropped))
        torch.testing.assert_close(z[row], rest(tower, block.feed_forward(torch.stack(tokens)), 2))
        assert context.positions[row].tolist() == kept + [-1] * (form is not None)
    if form is not None:
        assert context.sizes.tolist() == [[1.0] * count + [16.0 - count]] * 2


@torch.no_grad()
def test_the_other_form_and_the_other_place_have_names_of_their_own(tower):
    """So that a command reaches them: `--reducer evit-averaged`, `--reducer class-attention-after`."""
    for name, places in {
        "evit": {(1, "middle"): EViT(0.7, "released")},
        "evit-averaged": {(1, "middle"): EViT(0.7, "averaged")},
        "class-attention": {1: ClassAttention(0.7)},
        "class-attention-after": {(1, "after"): ClassAttention(0.7)},
    }.items():
        listed = ReducedTower(tower, named(name).reducers(setting_for(tower, 0.7, 1)))
        torch.testing.assert_close(listed(images()), ReducedTower(tower, places)(images()))


@torch.no_grad()
def test_after_proportional_attention_the_fused_token_counts_as_its_patches(tower):
    context = ReducedTower(tower, {(0, "middle"): ToMe(2), (1, "middle"): EViT(0.5)}).run(images())[1]
    assert context.sizes.sum(1).tolist() == [PATCHES] * 2
    torch.testing.assert_close(context.bias[:, 0, 0, 1:], context.sizes.double().log())


def diffrate_schedule(patches):
    """Tokens after pruning and merging, class token included, in each block of DiffRate's smallest schedule."""
    places = schedule(Setting(0.3, 3, patches, 12))
    return [places[block, "middle"].pruned + 1 for block in range(1, 12)], [
        places[block, "middle"].merged + 1 for block in range(1, 12)
    ]


RELEASED = {
    "DivPrune's default rate for LLaVA": (DivPrune(0.098).left, 576, 56),
    "VisionZip's 64, dominant and contextual": (VisionZip(64 / 576).split, 576, (54, 10)),
    "VisionZip's 128": (VisionZip(128 / 576).split, 576, (108, 20)),
    "VisionZip's 192": (VisionZip(192 / 576).split, 576, (162, 30)),
    "EViT's 137.2 rounded up, and the fused token": (EViT(0.7).left, 196, 138 + 1),
    "GlobalCom2's default rate for LLaVA": (GlobalCom2(0.25).left, 576, 144),
    "DiffRate's schedule of 8.7 G behind the first block, which loses none": (
        diffrate_schedule,
        196,
        ([192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3], [178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3]),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings_leave_the_released_numbers_of_tokens(name):
    count, patches, expected = RELEASED[name]
    assert count(patches) == expected


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
        a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))  # the class token is the first of A
        edges = [(max((float(keys[i] @ keys[j]), j) for j in b), i) for i in a if i != 0]
        edges = sorted(edges, reverse=True)[: min(removed, (len(x) - 1) // 2)]
        target = {i: j for (_, j), i in edges}
        staying = [i for i in a if i not in target] + b
        groups = [[j] + [i for i in target if target[i] == j] for j in staying]
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
    a, b = torch.tensor([[[1.0, 0.0], [0.1, 1.0], [0.0, -1.0]]]), torch.tensor([[[0.0, 2.0], [3.0, 0.3]]])
    staying, going, partner = bipartite_soft_matching(a, b, 2)
    # The second token of A is closest to the first of B, the first to the second, and the third to none.
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


@torch.no_grad()
def test_an_oracle_that_keeps_everything_equals_the_tower(tower):
    order = torch.arange(PATCHES).flip(0).expand(2, -1)
    torch.testing.assert_close(ReducedTower(tower, {1: GoldenOracle(1.0, order)})(images()), tower(images()))


def test_settings_that_make_no_sense_are_refused(tower):
    with pytest.raises(ValueError, match=r"keep 1\.5 is not in"):
        ClassAttention(1.5)
    with pytest.raises(ValueError, match="removed -1 is negative"):
        ToMe(-1)
    with pytest.raises(ValueError, match="form 'mean' is none of released, averaged"):
        EViT(0.5, "mean")
