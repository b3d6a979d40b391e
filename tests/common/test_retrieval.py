"""Retrieval places against a brute-force sort, with several captions a picture and with ties."""

import pytest
import torch
from torch.nn import functional as F

from common.pair_recall import PairRecall
from common.retrieval import ranks, recall


def brute_force(images, texts, owner):
    """Sort all candidates of each query by score, wrong ones first among (nearly) equal ones."""
    images, texts = F.normalize(images, dim=-1).double(), F.normalize(texts, dim=-1).double()
    scores = (images @ texts.T).mul(1e5).round().tolist()
    owner = owner.tolist()
    of_image, of_text = [], []
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda t: (-scores[i][t], owner[t] == i))
        wrong_before = 0
        for t in order:
            if owner[t] == i:
                break
            wrong_before += 1
        of_image.append(1 + wrong_before)
    for t in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i: (-scores[i][t], owner[t] == i))
        of_text.append(1 + order.index(owner[t]))
    return torch.tensor(of_image), torch.tensor(of_text)


def embedded(ties, seed=0):
    """37 pictures with 1 to 5 captions each, in mixed order; with ties, few distinct embeddings."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(37), torch.randint(0, 37, (60,), generator=generator)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    images, texts = (torch.randn(n, 6, generator=generator) for n in (37, len(owner)))
    if ties:
        corners = torch.eye(6)[:4]
        images, texts = (corners[torch.randint(0, 4, (len(z),), generator=generator)] for z in (images, texts))
    else:
        texts = texts + images[owner]
    return images, texts, owner


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [1, 7, 2048])
def test_equals_brute_force(ties, block):
    images, texts, owner = embedded(ties)
    result, expected = ranks(images, texts, owner, block), brute_force(images, texts, owner)
    assert all(map(torch.equal, result, expected))
    for places in result:
        assert recall(places) == {f"R@{k}": pytest.approx((places <= k).float().mean().item()) for k in (1, 5, 10)}


def test_perfect_and_collapsed_embeddings():
    eye, owner = torch.eye(8), torch.arange(8).repeat_interleave(3)
    for places in ranks(eye, eye[owner], owner):
        assert (places == 1).all()
    same = torch.ones(8, 4)
    of_image, of_text = ranks(same, same[owner], owner, block=5)
    assert (of_image == 22).all() and (of_text == 8).all(), "a tie must count against the model"


def test_length_of_the_embeddings_does_not_matter():
    images, texts, owner = embedded(ties=False)
    scaled = ranks(3 * images, texts * torch.rand(len(texts), 1).add(0.1), owner)
    assert all(map(torch.equal, ranks(images, texts, owner), scaled))


@pytest.mark.parametrize(
    ("owner", "message"),
    [([0, 0], r"1 images have no text, first \[1\]"), ([0, 2], "do not fit 2 images"), ([0], "1 owners of 2 texts")],
)
def test_bad_owners_are_refused(owner, message):
    with pytest.raises(ValueError, match=message):
        ranks(torch.eye(2), torch.eye(2), torch.tensor(owner))


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.eye(2), torch.full((2, 2), torch.nan), torch.arange(2))


def test_recall_of_an_epochs_pairs_counts_each_caption_once():
    images, texts = (torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    captions = torch.tensor([9, 2, 9, -4, 2, 9, 0])  # distinct at 0, 1, 3 and 6
    metric = PairRecall()
    for rows in (slice(0, 4), slice(4, 7)):
        metric.update(images[rows], texts[rows], captions[rows])
    first = torch.tensor([0, 1, 3, 6])[captions[[0, 1, 3, 6]].argsort()]
    of_image, of_text = ranks(images[first], texts[first], torch.arange(4))
    assert metric.compute() == {"image_to_text": recall(of_image), "text_to_image": recall(of_text)}
