"""Merging against a slow reference that goes token by token, and as a reducer in a tower."""

import math
from fractions import Fraction

import pytest
import torch

from common.reduction import ReducedTower
from common.tower import ImageTower
from mlip.merging import Merging, kept_tokens, merge, pair_tokens


@pytest.mark.parametrize(
    ("tokens", "rates", "expected"),
    [
        (196, [0.5, 0.5], [98, 49]),
        (49, [0.7, 0.7], [34, 23]),
        (256, [0.7, 0.7, 0.65, 0.65], [179, 125, 81, 52]),
        (36, [0.5], [18]),
        (10, [0.7], [7]),  # 0.7 * 10 is 7 though the float is less than 7/10
        (3, [2 / 3], [2]),
    ],
)
def test_kept_tokens_of_table_13(tokens, rates, expected):
    result = []
    for rate in rates:
        tokens = kept_tokens(rate, tokens)
        result.append(tokens)
    assert result == expected


def test_kept_tokens_are_those_of_the_fraction_that_a_rate_is_written_as():
    for tokens in (36, 49, 196, 576):
        for share in (Fraction(kept, whole) for whole in range(1, 40) for kept in range((whole + 1) // 2, whole + 1)):
            assert kept_tokens(float(share), tokens) == math.floor(share * tokens)


@pytest.mark.parametrize("rate", [0.49, 1.01, -1.0])
def test_rates_that_pairs_cannot_reach_are_refused(rate):
    with pytest.raises(ValueError, match=r"\[0.5, 1\]"):
        kept_tokens(rate, 10)


def slowly_merged(x, sizes, importance, keep):
    """One image, x [N,D]: sort, split, find, merge, as Figure 4 has it; tokens in order of rank."""
    tokens = len(x)
    ranked = sorted(range(tokens), key=lambda i: (-importance[i].item(), i))
    last = ranked[-min(2 * (tokens - keep), tokens) :]
    a, b = last[0::2], last[1::2]
    groups = {i: [i] for i in ranked if i not in a}
    for i in a:
        likeness = [torch.cosine_similarity(x[i], x[j], dim=0).item() for j in b]
        groups[b[likeness.index(max(likeness))]].append(i)
    merged_sizes = torch.stack([sizes[group].sum() for group in groups.values()])
    merged = torch.stack([(sizes[group, None] * x[group]).sum(0) / sizes[group].sum() for group in groups.values()])
    return merged, merged_sizes


@pytest.mark.parametrize(("tokens", "keep"), [(2, 1), (3, 1), (9, 8), (9, 6), (9, 4), (16, 8), (25, 17)])
def test_merging_equals_the_slow_reference(tokens, keep):
    torch.manual_seed(tokens + keep)
    x = torch.randn(8, tokens, 3, dtype=torch.float64)  # of three dimensions: several often choose one
    sizes = torch.randint(1, 5, (8, tokens)).double()
    importance = torch.randint(0, 4, (8, tokens)).double()  # with ties
    merged, merged_sizes = merge(x, sizes, importance, keep)
    assert merged.shape == (8, keep, 3)
    for image in range(8):
        expected = slowly_merged(x[image], sizes[image], importance[image], keep)
        torch.testing.assert_close((merged[image], merged_sizes[image]), expected)
    torch.testing.assert_close(merged_sizes.sum(1), sizes.sum(1))
    torch.testing.assert_close((merged_sizes[..., None] * merged).sum(1), (sizes[..., None] * x).sum(1))


def test_several_tokens_may_go_into_one():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 0.0]]])
    importance = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    kept, gone, into = pair_tokens(x, importance, 3)
    assert (kept.tolist(), gone.tolist(), into.tolist()) == ([[0, 2, 4]], [[1, 3]], [[1, 1]])
    merged, sizes = merge(x, torch.tensor([[1.0, 1.0, 2.0, 1.0, 1.0]]), importance, 3)
    assert sizes.tolist() == [[1.0, 4.0, 1.0]]
    torch.testing.assert_close(merged[0, 1], (x[0, 1] + 2 * x[0, 2] + x[0, 3]) / 4)


def test_equal_and_missing_numbers_are_settled_by_place():
    x = torch.ones(1, 6, 2)
    kept, gone, into = pair_tokens(x, torch.zeros(1, 6), 4)
    assert (kept.tolist(), gone.tolist(), into.tolist()) == ([[0, 1, 3, 5]], [[2, 4]], [[2, 2]])
    kept, gone, _ = pair_tokens(x, torch.tensor([[math.nan, 2.0, 1.0, 3.0, math.nan, 0.0]]), 5)
    assert (kept.tolist(), gone.tolist()) == ([[3, 1, 2, 5, 4]], [[0]])
    merged, sizes = merge(torch.zeros(1, 6, 2), torch.ones(1, 6), torch.zeros(1, 6), 3)  # no direction at all
    assert merged.isfinite().all() and sizes.sum() == 6


def test_keeping_all_changes_nothing_and_impossible_numbers_are_named():
    x, sizes, importance = torch.randn(2, 7, 3), torch.ones(2, 7), torch.randn(2, 7)
    same = merge(x, sizes, importance, 7)
    assert same[0] is x and same[1] is sizes
    for keep in (8, 2, 0):
        with pytest.raises(ValueError, match=f"{keep} of 7 tokens to keep: merging in pairs leaves 3 to 6"):
            merge(x, sizes, importance, keep)


def test_gradients_go_through_the_tokens_alone():
    x = torch.randn(2, 9, 4, requires_grad=True)
    importance = torch.randn(2, 9, requires_grad=True)
    merged, sizes = merge(x, torch.ones(2, 9), importance, 6)
    (merged * sizes[..., None]).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert importance.grad is None


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(image_size=32, patch_size=8, width=64, layers=3, heads=2, embed_dim=16).double().eval()


@torch.no_grad()
def test_the_reducer_ranks_by_the_class_tokens_attention_and_says_what_stands_where(tower):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen = {}

    def look(x, context):
        seen["before"], seen["attention"] = context.patches(x), context.class_attention()
        x, context = Merging(0.7)(x, context)
        seen["after"], seen["class"] = context.patches(x), x[:, 0]
        return x, context

    x, context = ReducedTower(tower, {(1, "middle"): look}).run(images)
    expected, sizes = merge(seen["before"], torch.ones(2, 16), seen["attention"], 11)
    torch.testing.assert_close(seen["after"], expected)
    torch.testing.assert_close(context.sizes, sizes)
    block = tower.transformer.resblocks[1]
    torch.testing.assert_close(seen["class"], block.attend(tower.run_blocks(tower.embed(images), stop=1))[:, 0])
    assert x.shape == (2, 12, 64) and context.bias is None
    assert ((context.positions == -1) == (sizes > 1)).all()
    alone = context.positions[0][sizes[0] == 1]
    torch.testing.assert_close(seen["after"][0][sizes[0] == 1], seen["before"][0, alone])


@torch.no_grad()
def test_sizes_add_up_over_two_mergings(tower):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x, context = ReducedTower(tower, {(0, "middle"): Merging(0.5), (2, "middle"): Merging(0.7)}).run(images)
    assert x.shape == (2, 1 + 5, 64)
    assert context.sizes.sum(1).tolist() == [16, 16]


@torch.no_grad()
def test_a_rate_of_one_is_the_tower_itself(tower):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ReducedTower(tower, {(1, "middle"): Merging(1.0)})(images), tower(images))


@torch.no_grad()
def test_with_proportional_attention_merging_twins_changes_nothing(tower):
    """Without positions, patches that come in equal pairs are equal tokens: one that counts double is as good."""
    tower.positional_embedding.zero_()
    halves = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    images, place = torch.cat([halves, halves], dim=3), (0, "middle")
    torch.testing.assert_close(ReducedTower(tower, {place: Merging(0.5, proportional=True)})(images), tower(images))
    plain = ReducedTower(tower, {place: Merging(0.5)})(images)
    assert (plain - tower(images)).abs().max() > 1e-3
