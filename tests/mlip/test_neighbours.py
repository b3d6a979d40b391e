"""The queue of captions and the loss on nearest neighbours."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.contrastive import info_nce
from mlip.neighbours import NearestCaptions

SCALE = torch.tensor(7.0)


def unit(count, dim=5, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("form", ["declip", "symmetric"])
def test_the_queue_keeps_the_newest(form):
    nearest = NearestCaptions(4, 5, form)
    texts = unit(9)
    for start in (0, 3, 6):
        nearest.push(texts[start : start + 3])
    assert nearest.seen == 9
    kept = {tuple(row.tolist()) for row in nearest.queue}
    assert kept == {tuple(row.tolist()) for row in texts[5:]}
    nearest.push(unit(6, seed=1))
    assert {tuple(row.tolist()) for row in nearest.queue} == {tuple(row.tolist()) for row in unit(6, seed=1)[2:]}


def test_in_declips_form_images_choose_among_neighbours_and_not_the_other_way_round():
    torch.manual_seed(0)
    image, text = unit(3, seed=1).requires_grad_(), unit(3, seed=2)
    nearest = NearestCaptions(8, 5)
    start = nearest.queue.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(8))  # random directions, not an empty queue
    chosen = [max(start, key=lambda row, z=z: float(z @ row)) for z in text]
    terms = []
    for anchor, z in enumerate(image):
        mass = [math.exp(float(SCALE * (z @ neighbour).detach())) for neighbour in chosen]
        terms.append(-math.log(mass[anchor] / sum(mass)))
    loss = nearest(image, text, SCALE)
    assert float(loss.detach()) == pytest.approx(sum(terms) / 3, rel=1e-5)
    assert torch.equal(nearest.queue[:3], text) and torch.equal(nearest.queue[3:], start[3:])  # searched first
    loss.backward()
    assert image.grad.abs().sum() > 0 and nearest.queue.grad is None


def test_the_loss_reads_the_neighbours_and_only_training_adds_to_the_queue():
    image, text, earlier = unit(3, seed=1).requires_grad_(), unit(3, seed=2), unit(6, seed=3)
    nearest = NearestCaptions(8, 5, "symmetric")
    assert nearest(image, text, SCALE).abs() < 1e-6  # nothing to learn from an empty queue
    assert torch.equal(nearest.queue[:3], text)
    nearest = NearestCaptions(8, 5, "symmetric").eval()
    nearest.push(earlier)
    place = torch.tensor([max(range(6), key=lambda q: float(z @ earlier[q])) for z in text])
    expected = info_nce(image, earlier[place], SCALE, same=place, label_smoothing=0.1)
    torch.testing.assert_close(nearest(image, text, SCALE, 0.1), expected)
    assert nearest.seen == 6
    expected.backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["declip", "symmetric"])
def test_a_caption_that_is_not_finite_does_not_stay_in_the_queue(form):
    nearest, text = NearestCaptions(4, 5, form), unit(2)
    text[0] = torch.nan
    nearest.push(text)
    assert nearest.queue.isfinite().all()


def test_an_unfilled_place_is_no_neighbour():
    nearest = NearestCaptions(8, 5, "symmetric")
    nearest.push(-torch.eye(5)[:1])
    assert nearest.nearest(torch.eye(5)[:1]).tolist() == [0]  # its cosine is -1, an empty place's would be 0


def test_an_empty_queue_is_refused():
    with pytest.raises(ValueError, match="a queue of 0 captions"):
        NearestCaptions(0, 5)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="neighbour_form 'both' is none of declip, symmetric"):
        NearestCaptions(4, 5, "both")
