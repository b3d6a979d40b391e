"""VFlowOpt's importance and token-correlation selection against their formulas, in loops over one picture's tokens."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from common.reducer_registry import named, schedule
from common.reduction import ReducedTower, ReductionContext
from patchrank.reducers import ClassAttention, TokenCorrelation, VFlowOpt
from patchrank.reducers.token_correlation import contrast, repeated
from patchrank.reducers.vflowopt import context_relevance, patch_entropy
from tests.patchrank.reducers.slow import (
    PATCHES,
    at_middle,
    class_row,
    cosine,
    images,
    plain,
    projections,
    slow_attention,
    small_tower,
    tokens,
)


@pytest.fixture(scope="module")
def tower():
    return small_tower()


def slow_entropy(picture, place):
    """Bits of the grey levels in one patch of 8 pixels a side of a picture [3,32,32]."""
    grey = picture.mean(0)
    low, high = float(grey.min()), float(grey.max())
    top, left = 8 * (place // 4), 8 * (place % 4)
    pixels = [float(grey[top + i, left + j]) for i in range(8) for j in range(8)]
    levels = Counter(round((pixel - low) / (high - low) * 255) for pixel in pixels)
    return -sum(count / 64 * math.log2(count / 64) for count in levels.values())


def flat(pictures):
    """Pictures whose patches differ in how many grey levels they have."""
    coarse = pictures.clone()
    for place in range(PATCHES):
        rows = slice(8 * (place // 4), 8 * (place // 4) + 8)
        columns = slice(8 * (place % 4), 8 * (place % 4) + 8)
        coarse[:, :, rows, columns] = (pictures[:, :, rows, columns] * place).round() / max(place, 1)
    return coarse


def test_entropy_counts_the_grey_levels_of_each_patch():
    pictures = flat(images())
    expected = [[slow_entropy(picture, place) for place in range(PATCHES)] for picture in pictures]
    assert max(expected[0]) > 1 + min(expected[0])
    torch.testing.assert_close(patch_entropy(pictures, 4), torch.tensor(expected, dtype=torch.float64))


def test_a_picture_of_one_colour_has_no_entropy():
    assert patch_entropy(torch.ones(1, 3, 32, 32), 4).eq(0).all()


@pytest.mark.parametrize("threshold", [1.05, 100.0])
@torch.no_grad()
def test_vflowopt_recycles_what_global_tokens_and_entropy_leave(tower, threshold):
    """At 100 times the mean no token is global, so the most attended one is taken."""
    pictures, reducer = flat(images()), VFlowOpt(0.5, 4, threshold, entropy=0.7)
    x, y, _, outcome = at_middle(tower, lambda y, context: reducer(y, replace(context, images=pictures)))
    block = tower.transformer.resblocks[1]
    for row in range(2):
        attention = slow_attention(block, x[row])[1].mean(0).tolist()
        received = [sum(line[j] for line in attention) / 17 for j in range(17)]
        chosen = [j for j in range(17) if received[j] > threshold * sum(received) / 17]
        chosen = chosen or [received.index(max(received))]
        assert (len(chosen) > 1) == (threshold < 2)
        bits = [slow_entropy(pictures[row], place) for place in range(PATCHES)]
        total = sum(map(math.exp, bits))
        importance = [
            sum(attention[i][1 + j] for i in chosen) / len(chosen) + 0.7 * math.exp(bits[j]) / total
            for j in range(PATCHES)
        ]
        order = sorted(range(PATCHES), key=lambda j: -importance[j])
        kept, gone = sorted(order[:7]), order[7:]
        assert outcome.positions[row].tolist() == [*kept, -1] and outcome.sizes[row].tolist() == [1.0] * 7 + [9.0]
        mean = sum(importance[j] * y[row, 1 + j] for j in gone) / sum(importance[j] for j in gone)
        torch.testing.assert_close(outcome.result[row, -1], mean)
        torch.testing.assert_close(outcome.result[row, 1:-1], y[row, 1:][kept])


def test_the_global_tokens_speak_for_all():
    """Token 2 receives half of all attention; what it pays to others is the relevance."""
    attention = torch.tensor([[[0.2, 0.3, 0.5], [0.3, 0.2, 0.5], [0.1, 0.4, 0.5]]])
    torch.testing.assert_close(context_relevance(attention, 1.4), attention[:, 2])
    torch.testing.assert_close(context_relevance(attention, 0.8), attention[:, 1:].mean(1))


@torch.no_grad()
def test_a_recycled_token_has_no_pixels(tower):
    """Twice in a row: the second recycling counts all patches."""
    reduced = ReducedTower(tower, {(i, "middle"): VFlowOpt(0.5, 4) for i in (0, 1)})
    context = reduced.run(images())[1]
    assert context.sizes.shape == (2, 4) and context.sizes.sum(1).tolist() == [PATCHES] * 2
    with pytest.raises(ValueError, match="vflowopt reads the pixels of each patch, which this tower has none of"):
        at_middle(tower, VFlowOpt(0.5, 4))
    at_middle(tower, VFlowOpt(0.5, 4, entropy=0))


@torch.no_grad()
def test_a_recycled_token_alone_is_a_token_without_a_place(tower):
    """Nothing else stays; a reducer behind it reads its position."""
    context = ReducedTower(tower, {(0, "middle"): VFlowOpt(0.05, 4), 1: ClassAttention(1.0)}).run(images())[1]
    assert context.positions.tolist() == [[-1]] * len(images())


def test_attention_to_kept_tokens_alone_recycles_to_zero(monkeypatch):
    """All attend to one patch, so the others have no importance by which to be averaged."""
    attention = torch.zeros(2, 1, 1 + PATCHES, 1 + PATCHES, dtype=torch.float64)
    attention[..., 3] = 1
    monkeypatch.setattr(ReductionContext, "attention", lambda context: attention)
    x = tokens()
    result, context = VFlowOpt(0.5, 4, entropy=0)(x, plain(x))
    assert (context.positions == 2).any(1).all() and result[:, -1].eq(0).all()


@torch.no_grad()
def test_token_correlation_takes_what_stands_out_then_what_is_attended(tower):
    threshold = 0.2  # of keys of a random tower: some repeat others
    x, y, _, outcome = at_middle(tower, TokenCorrelation(0.6, 4, threshold, local=0.4))
    block, demoted = tower.transformer.resblocks[1], 0
    for row in range(2):
        attention = class_row(block, x[row]).tolist()
        keys = projections(block, x[row])[1].mean(0)[1:]
        behind = [
            any(cosine(keys[i], keys[j]) > threshold and attention[j] > attention[i] for j in range(PATCHES))
            for i in range(PATCHES)
        ]
        apart = []
        for i in range(PATCHES):
            around = [
                j for j in range(PATCHES)
                if j != i and abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1
            ]  # fmt: skip
            apart.append(attention[i] / (sum(attention[j] for j in around) / len(around)))
        chosen = sorted(range(PATCHES), key=lambda i: (behind[i], -apart[i]))[:4]
        left = [i for i in range(PATCHES) if i not in chosen]
        chosen += sorted(left, key=lambda i: (behind[i], -attention[i]))[:6]
        assert outcome.positions[row].tolist() == sorted(chosen)
        torch.testing.assert_close(outcome.result[row, 1:], y[row, 1:][sorted(chosen)])
        plainly = sorted(range(PATCHES), key=lambda i: -attention[i])[:10]
        demoted += sum(behind[i] for i in plainly if i not in chosen)
    assert demoted, "or repetition decides nothing here"


def test_a_token_without_a_place_is_compared_with_all():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    result = contrast(attention, torch.tensor([[0, 1, -1, 15]]), grid=4, window=3)
    torch.testing.assert_close(result, torch.tensor([[0.1 / 0.2, 0.2 / 0.1, 0.3 / 0.25, 0.4 / 0.25]]))


@torch.no_grad()
def test_token_correlation_works_where_patches_are_gone(tower):
    """Two blocks, one after another: the second compares with those neighbours that are left."""
    places = schedule(named("token-correlation"), tower, 0.5, [0, 2])
    context = ReducedTower(tower, places).run(images())[1]
    first = ReducedTower(tower, {(0, "middle"): places[0, "middle"]}).run(images())[1].positions
    assert context.positions.shape == (2, PATCHES // 4)
    for before, later in zip(first.tolist(), context.positions.tolist(), strict=True):
        assert set(later) < set(before)


def test_equal_keys_leave_one_patch_in_front():
    """All keys equal: only the most attended is no repetition, and the others follow by attention."""
    flags = repeated(torch.ones(1, 4, 3), torch.tensor([[0.1, 0.4, 0.4, 0.1]]), 0.99)
    assert flags.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VFlowOpt(0.5, 4, threshold=-1), "threshold -1 is negative; give 0 or more"),
        (lambda: VFlowOpt(0.5, 4, entropy=float("nan")), "entropy nan is negative"),
        (lambda: TokenCorrelation(0.5, 4, local=1.5), r"local 1\.5 is not in \[0, 1\]"),
        (lambda: TokenCorrelation(0.5, 4, threshold=2), r"threshold 2 is no cosine; give one in \[-1, 1\]"),
        (lambda: TokenCorrelation(0.5, 4, window=4), "window 4 has no patch in its middle"),
    ],
)
def test_constants_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_keeping_all_reads_nothing():
    x = tokens()
    for reducer in (VFlowOpt(1.0, 4), TokenCorrelation(1.0, 4)):
        assert reducer(x, plain(x))[0] is x
