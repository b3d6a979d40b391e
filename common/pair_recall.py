"""Retrieval among validation pairs during training, as a metric of torchmetrics.

Shapes: B pairs of a batch, E joint dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from common.retrieval import ranks, recall


class PairRecall(Metric):
    """R@k over the pairs of an epoch and of all processes, for validation during training.

    Only the first of the pairs with equal captions counts, since the caption cannot distinguish their images.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for state in ("images", "texts", "captions"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, texts: Tensor, caption_id: Tensor) -> None:
        """Add pairs: images [B,E], texts [B,E], and ids long [B], equal for equal captions."""
        self.images.append(images)
        self.texts.append(texts)
        self.captions.append(caption_id)

    def compute(self) -> dict[str, dict[str, float]]:
        """{"image_to_text": {"R@1": ...}, "text_to_image": ...}."""
        images, texts, captions = (dim_zero_cat(state) for state in (self.images, self.texts, self.captions))
        distinct, number = captions.unique(return_inverse=True)
        order = torch.arange(len(captions), device=captions.device)
        first = torch.full_like(distinct, len(captions)).scatter_reduce(0, number, order, "amin")
        image_ranks, text_ranks = ranks(images[first], texts[first], torch.arange(len(first), device=first.device))
        return {"image_to_text": recall(image_ranks), "text_to_image": recall(text_ranks)}
