"""InfoNCE by closed forms, brute force, and one process against two."""

import math

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from common.contrastive import clamp_logit_scale, gather_rows, info_nce, info_nce_of_views
from tests.common.ranks import on_two_ranks


def pairs(count=6, dim=5):
    """Random unit embeddings [count,dim] of pictures and texts in float64, and ids with equal captions."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    same = torch.tensor([3, 5, 3, 8, 5, 3])[:count]
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1), same


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ids", [False, True])
def test_one_positive_is_cross_entropy(smoothing, ids):
    image, text, _ = pairs()
    same = torch.tensor([9, -4, 2, 7, 2**62, 0]) if ids else None
    logits, target = 20 * image @ text.T, torch.arange(6)
    expected = sum(F.cross_entropy(side, target, label_smoothing=smoothing) for side in (logits, logits.T)) / 2
    result = info_nce(image, text, torch.tensor(20.0), same=same, label_smoothing=smoothing)
    assert math.isclose(result, expected, rel_tol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_perfect_embeddings(scale):
    eye = torch.eye(4)
    alone = math.log1p(3 * math.exp(-scale))
    assert math.isclose(info_nce(eye, eye, torch.tensor(scale)), alone, abs_tol=1e-6)
    # Two captions, each of two pictures: half the exponentials belong to the anchor's positives.
    twice = eye[:2].repeat_interleave(2, dim=0)
    joint = info_nce(twice, twice, torch.tensor(scale), same=torch.tensor([7, 7, 1, 1]))
    assert math.isclose(joint, math.log1p(math.exp(-scale)), abs_tol=1e-6)
    # As if each pair were its own only positive: the twin can't be told apart, which costs log 2 more.
    apart = info_nce(twice, twice, torch.tensor(scale))
    assert math.isclose(apart, joint + math.log(2), abs_tol=1e-6)


def test_equal_captions_alone_cost_nothing_and_push_nothing():
    image, text, _ = pairs()
    image.requires_grad_()
    loss = info_nce(image, text, torch.tensor(10.0), same=torch.full((6,), 4))
    loss.backward()
    assert abs(loss) < 1e-6 and image.grad.abs().max() < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equal_captions_are_joint_positives(smoothing):
    image, text, same = pairs()
    terms = []
    for anchors, candidates in ((image, text), (text, image)):
        for row, anchor in enumerate(anchors):
            mass = [math.exp(8 * float(anchor @ candidate)) for candidate in candidates]
            positive = sum(m for m, other in zip(mass, same, strict=True) if other == same[row])
            spread = sum(math.log(m / sum(mass)) for m in mass) / len(mass)
            terms.append(-(1 - smoothing) * math.log(positive / sum(mass)) - smoothing * spread)
    result = info_nce(image, text, torch.tensor(8.0), same=same, label_smoothing=smoothing)
    assert math.isclose(result, sum(terms) / len(terms), rel_tol=1e-5)


def test_bf16_embeddings_are_summed_in_fp32():
    image, text, same = (part.to(torch.bfloat16) if part.is_floating_point() else part for part in pairs())
    loss = info_nce(image, text, torch.tensor(100.0), same=same)
    exact = info_nce(image.double(), text.double(), torch.tensor(100.0), same=same)
    assert loss.dtype == torch.float32 and math.isclose(loss, exact, rel_tol=0.05)


def test_views_are_averaged_over_their_pairs():
    (image, text, same), scale = pairs(), torch.tensor(5.0)
    images, texts = [image, image.flip(1), image.roll(1, 1)], [text, text.flip(1)]
    expected = torch.stack([info_nce(a, b, scale, same=same, label_smoothing=0.1) for a in images for b in texts])
    result = info_nce_of_views(images, texts, scale, same=same, label_smoothing=0.1)
    torch.testing.assert_close(result, expected.mean())


def test_the_scale_is_kept_in_bounds_in_place():
    for value, kept in ((-1.0, 0.0), (2.0, 2.0), (5.0, math.log(100))):
        scale = torch.nn.Parameter(torch.tensor(value))
        clamp_logit_scale(scale)
        assert math.isclose(scale.item(), kept, rel_tol=1e-6) and scale.requires_grad


def joined_loss(weight, rows, same):
    """The loss of two views of pairs that one linear layer embeds, and the gradient of the layer."""
    image, text, _ = pairs()
    weight = weight.clone().requires_grad_()
    embedded = [F.normalize(part[rows] @ weight, dim=-1) for part in (image, text)]
    views = [[part, part.roll(1, 1)] for part in embedded]
    loss = info_nce_of_views(*views, torch.tensor(5.0), same=None if same is None else same[rows])
    loss.backward()
    return loss.detach(), weight.grad


WEIGHT = torch.linspace(-1, 1, 20, dtype=torch.float64).sin().reshape(5, 4)


def one_rank(rank, folder):
    """Three of the six pairs; writes loss and gradient, averaged over the ranks as DDP does."""
    rows = slice(3 * rank, 3 * rank + 3)
    result = {"order": gather_rows(torch.tensor([rank, 10 + rank])).tolist()}
    for name, same in (("alone", None), ("joint", pairs()[2])):
        loss, gradient = joined_loss(WEIGHT, rows, same)
        distributed.all_reduce(loss)
        distributed.all_reduce(gradient)
        result[name] = (loss / 2, gradient / 2)
    torch.save(result, f"{folder}/{rank}.pt")


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    on_two_ranks(one_rank, tmp_path)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["order"] == [0, 10, 1, 11]
        for name, same in (("alone", None), ("joint", pairs()[2])):
            loss, gradient = joined_loss(WEIGHT, slice(None), same)
            torch.testing.assert_close(result[name][0], loss, atol=1e-6, rtol=0)
            torch.testing.assert_close(result[name][1], gradient, atol=1e-6, rtol=0)
