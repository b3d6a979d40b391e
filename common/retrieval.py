"""Image-text retrieval: the place of the right answer among all candidates, without the matrix of all scores.

Shapes: M images, T texts, E joint dim, b images or texts of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

TIE = 1e-6
"""Cosines that differ by less count as equal: fp32 products of one pair differ by so much between block sizes."""


@torch.no_grad()
def ranks(images: Tensor, texts: Tensor, owner: Tensor, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Places (1 is best) of the right answers: of each image's best text [M], of each text's image [T].

    images [M,E] and texts [T,E] are normalised here, to fp32 cosines; ``owner`` long [T] is the image that a
    text describes. A place is one more than the number of wrong candidates that score as high as the right
    answer or higher, so ties (equal captions of different pictures, collapsed embeddings) count against the
    model, and an image's other texts are not in each other's way. Scores exist for b x b pairs at a time.
    ValueError: an image without a text, an owner that is no image, or embeddings that are not finite.
    """
    if len(owner) != len(texts) or not len(images):
        raise ValueError(f"{len(owner)} owners of {len(texts)} texts for {len(images)} images; give one for each text")
    if owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"owners from {owner.min()} to {owner.max()} do not fit {len(images)} images")
    bare = torch.bincount(owner, minlength=len(images)).eq(0).nonzero().flatten().tolist()
    if bare:
        raise ValueError(f"{len(bare)} images have no text, first {bare[:3]}; leave them out")
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ValueError("some embeddings are not finite; evaluate in float32, or look for overflow in the weights")
    images, texts = (F.normalize(z.float(), dim=-1) for z in (images, texts))
    own = torch.cat([(images[o] * t).sum(-1) for o, t in zip(owner.split(block), texts.split(block), strict=True)])
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    of_image, of_text = (torch.ones(len(z), dtype=torch.long, device=z.device) for z in (images, texts))
    for rows in torch.arange(len(images), device=images.device).split(block):
        for columns in torch.arange(len(texts), device=texts.device).split(block):
            scores = images[rows] @ texts[columns].T + TIE
            wrong = owner[columns] != rows[:, None]
            of_image[rows] += ((scores >= best[rows, None]) & wrong).sum(1)
            of_text[columns] += ((scores >= own[columns]) & wrong).sum(0)
    return of_image, of_text


def recall(places: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k: the share of places [M] up to k, for each k, as {"R@1": ...}."""
    return {f"R@{k}": (places <= k).double().mean().item() for k in ks}


class PairRecall(Metric):
    """R@k over the pairs of an epoch and of all processes, for the validation of a training.

    Of pairs with equal captions the first alone counts, since their pictures cannot be told apart by the caption.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for state in ("images", "texts", "captions"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, caption_id: Tensor) -> None:
        """Add pairs: images [B,E], texts [B,E], and ids long [B] that are equal where the captions are."""
        self.images.append(images)
        self.texts.append(texts)
        self.captions.append(caption_id)

    def compute(self) -> dict[str, dict[str, float]]:
        """{"image_to_text": {"R@1": ...}, "text_to_image": ...}."""
        images, texts, captions = (dim_zero_cat(state) for state in (self.images, self.texts, self.captions))
        distinct, number = captions.unique(return_inverse=True)
        order = torch.arange(len(captions), device=captions.device)
        first = torch.full_like(distinct, len(captions)).scatter_reduce(0, number, order, "amin")
        of_image, of_text = ranks(images[first], texts[first], torch.arange(len(first), device=first.device))
        return {"image_to_text": recall(of_image), "text_to_image": recall(of_text)}
