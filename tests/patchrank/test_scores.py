"""Keep counts, blocks and scores against what the paper's sentences say, spelt out in loops."""

import pytest
import torch
from torch.nn import functional as F

from patchrank.scores import (
    check_score,
    feature_cost,
    grid_blocks,
    keep_count,
    removal_costs,
    token_scores,
)


def test_keep_counts_of_196_tokens():
    assert [keep_count(rate / 10, 196) for rate in (10, 9, 8, 7, 6, 5)] == [196, 176, 157, 137, 118, 98]


def test_a_keep_rate_rounds_to_the_nearest_and_never_to_nothing():
    assert [keep_count(0.5, tokens) for tokens in (0, 1, 3, 5)] == [0, 1, 2, 3]
    assert keep_count(0.001, 36) == 1 and keep_count(1, 36) == 36


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, 60])
def test_a_keep_rate_is_a_share(keep):
    with pytest.raises(ValueError, match=f"keep {keep} is not in"):
        keep_count(keep, 196)


@pytest.mark.parametrize(
    ("grid", "block", "stride", "windows"),
    [(14, 1, 1, 196), (14, 2, 1, 169), (14, 3, 1, 144), (14, 2, 2, 49), (14, 4, 2, 36), (6, 2, 1, 25), (4, 4, 1, 1)],
)
def test_blocks_are_the_windows_of_the_grid(grid, block, stride, windows):
    corners = range(0, grid - block + 1, stride)
    slow = torch.zeros(windows, grid, grid, dtype=torch.bool)
    for window, (row, column) in zip(slow, ((r, c) for r in corners for c in corners), strict=True):
        window[row : row + block, column : column + block] = True
    blocks = grid_blocks(grid, block, stride)
    assert torch.equal(blocks, slow.flatten(1)) and blocks.any(0).all()


def test_blocks_that_do_not_cover_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"stride 3 do not cover a 14x14 grid evenly; use a stride of \[1\]"):
        grid_blocks(14, 3, 3)
    with pytest.raises(ValueError, match=r"stride 3 .* use a stride of \[1, 2\]"):
        grid_blocks(14, 2, 3)
    with pytest.raises(ValueError, match="block 5 is not between 1 and the grid's side 4"):
        grid_blocks(4, 5)


def test_a_token_takes_the_mean_of_its_blocks():
    costs = torch.tensor([[1.0, 2.0, 6.0]])
    removed = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]]], dtype=torch.bool)
    assert token_scores(costs, removed).tolist() == [[1.0, 3.0, 2.0, 0.0]]


def test_each_score_is_one_minus_the_papers():
    torch.manual_seed(0)
    full, pruned = torch.randn(2, 8).double(), torch.randn(2, 3, 8).double()
    classes, labels = F.normalize(torch.randn(5, 8).double(), dim=-1), torch.tensor([4, 0])
    given = {"class_embeddings": classes, "logit_scale": 7.0, "labels": labels}
    for image in range(2):
        for block in range(3):
            z = pruned[image, block]
            posterior = (7.0 * F.cosine_similarity(z[None], classes)).softmax(-1)
            paper = {
                "feature": F.cosine_similarity(full[image], z, dim=0),
                "label": posterior[labels[image]],
                "confidence": posterior.max(),
            }
            for score, value in paper.items():
                result = removal_costs(score, full, pruned, **given)[image, block]
                torch.testing.assert_close(result, 1 - value, atol=1e-12, rtol=0)


def test_a_cosine_near_one_keeps_its_digits_in_single_precision():
    full = torch.randn(1, 1, 512, dtype=torch.float64)
    pruned = full + 1e-5 * torch.randn(1, 4, 512, dtype=torch.float64)
    exact = 1 - F.cosine_similarity(full, pruned, dim=-1)
    assert exact.max() < 2e-10  # far below the spacing of single-precision numbers near one
    torch.testing.assert_close(feature_cost(full.float(), pruned.float()).double(), exact, atol=0, rtol=2e-2)


def test_what_a_score_needs_is_asked_for():
    classes = {"class_embeddings": torch.eye(2), "logit_scale": 1.0}
    check_score("feature", {})
    check_score("confidence", classes)
    check_score("label", {**classes, "labels": torch.zeros(1, dtype=torch.long)})
    with pytest.raises(ValueError, match="'label' needs logit_scale and labels"):
        check_score("label", {"class_embeddings": torch.eye(2), "labels": None})
    with pytest.raises(ValueError, match="'attention' is none of feature, label, confidence"):
        check_score("attention", classes)
