"""The losses against their formulas written out for one picture at a time; the measures against scipy and sets."""

import math
from itertools import combinations

import pytest
import torch
from scipy.stats import kendalltau
from torch.nn import functional as F

from patchrank.losses import kendall_tau, pruned_overlap, ranking_loss

TOKENS, PRUNED = 9, 4


@pytest.fixture
def ranked():
    """Scores [5,9] and a golden order of each row."""
    torch.manual_seed(0)
    return torch.randn(5, TOKENS, dtype=torch.float64), torch.rand(5, TOKENS).argsort(-1)


def test_keep_set_is_the_released_divergence(ranked):
    scores, order = ranked
    total = 0.0
    for row, golden in zip(scores, order.tolist(), strict=True):
        wanted = torch.zeros(TOKENS, dtype=torch.float64)
        for rank, token in enumerate(golden):
            wanted[token] = 0 if rank < TOKENS - PRUNED else -5 - 0.1 * rank
        p, q = wanted.softmax(0), row.softmax(0)
        total += (p * (p / q).log()).sum()
    torch.testing.assert_close(ranking_loss("keep_set", scores, order, PRUNED), total / len(scores))


def test_keep_set_knows_no_order_among_the_kept(ranked):
    scores, order = ranked
    shuffled = order.clone()
    shuffled[:, : TOKENS - PRUNED] = order[:, : TOKENS - PRUNED].flip(-1)
    losses = [ranking_loss("keep_set", scores, golden, PRUNED) for golden in (order, shuffled)]
    torch.testing.assert_close(*losses)


def test_margin_is_the_hinge_over_all_ordered_pairs(ranked):
    scores, order = ranked
    pairs = [
        F.margin_ranking_loss(row[upper], row[lower], torch.ones((), dtype=row.dtype), margin=1.0)
        for row, golden in zip(scores, order.tolist(), strict=True)
        for upper, lower in combinations(golden, 2)
    ]
    torch.testing.assert_close(ranking_loss("margin", scores, order, PRUNED), torch.stack(pairs).mean())


def test_listwise_is_the_chance_of_drawing_the_golden_order(ranked):
    scores, order = ranked
    total = 0.0
    for row, golden in zip(scores.exp().tolist(), order.tolist(), strict=True):
        total -= sum(math.log(row[token] / sum(row[left] for left in golden[i:])) for i, token in enumerate(golden))
    torch.testing.assert_close(ranking_loss("listwise", scores, order, PRUNED).item(), total / len(scores))


@pytest.mark.parametrize("kind", ["keep_set", "margin", "listwise"])
def test_descending_a_loss_finds_the_set_or_the_order(kind, ranked):
    _, order = ranked
    scores = torch.zeros(5, TOKENS, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        ranking_loss(kind, scores, order, PRUNED).backward()
        optimizer.step()
    assert pruned_overlap(scores, order, PRUNED).tolist() == [1] * 5
    if kind != "keep_set":
        assert kendall_tau(scores, order).tolist() == [1] * 5


def test_overlap_is_the_share_of_common_tokens(ranked):
    scores, order = ranked
    expected = []
    for row, golden in zip(scores.tolist(), order.tolist(), strict=True):
        lowest = sorted(range(TOKENS), key=row.__getitem__)[:PRUNED]
        expected.append(len(set(lowest) & set(golden[-PRUNED:])) / PRUNED)
    assert pruned_overlap(scores, order, PRUNED).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="pruned 0: the overlap of empty sets"):
        pruned_overlap(scores, order, 0)


@pytest.mark.parametrize("digits", [None, 0])
def test_tau_is_scipys_with_and_without_ties(digits, ranked):
    scores, order = ranked
    scores = scores if digits is None else scores.round()
    importance = -order.argsort(-1)
    expected = [kendalltau(row, golden).statistic for row, golden in zip(scores, importance, strict=True)]
    assert kendall_tau(scores, order).tolist() == pytest.approx(expected)


def test_tau_of_equal_scores_is_nothing():
    assert kendall_tau(torch.ones(1, 4), torch.arange(4)[None]).tolist() == [0]
