"""Image-text retrieval: the rank of the right answer among all candidates, computed in blocks of the score matrix.

Shapes: M images, T texts, E joint dim, b images or texts in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-6
"""Cosines that differ by less count as equal; fp32 rounding of one pair differs by as much between block sizes."""


@torch.no_grad()
def ranks(images: Tensor, texts: Tensor, owner: Tensor, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Ranks (1 is best) of the right answers: each image's best text [M], and each text's image [T].

    images [M,E] and texts [T,E] are normalised here, in fp32; ``owner`` long [T] is the image that a text describes.
    The rank is 1 + the number of wrong candidates that score at least as high as the right answer. So ties (equal
    captions of different images, collapsed embeddings) count against the model, and the several texts of an image do
    not compete. Only b x b scores (b = ``block``) are in memory at a time.
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
    # Scores of the right pairs: each text with its image, and the best text of each image.
    right = torch.cat([(images[o] * t).sum(-1) for o, t in zip(owner.split(block), texts.split(block), strict=True)])
    best = right.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, right, "amax")
    # Block by block, count the wrong candidates that score as high.
    image_ranks, text_ranks = (torch.ones(len(z), dtype=torch.long, device=z.device) for z in (images, texts))
    for rows in torch.arange(len(images), device=images.device).split(block):
        for columns in torch.arange(len(texts), device=texts.device).split(block):
            scores = images[rows] @ texts[columns].T + TIE
            wrong = owner[columns] != rows[:, None]
            image_ranks[rows] += ((scores >= best[rows, None]) & wrong).sum(1)
            text_ranks[columns] += ((scores >= right[columns]) & wrong).sum(0)
    return image_ranks, text_ranks


def recall(rank: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k, the share of ranks ``rank`` [M] up to k, for each k, as {"R@1": ...}."""
    return {f"R@{k}": (rank <= k).double().mean().item() for k in ks}
