"""Nearest-neighbour supervision (DeCLIP; MLIP's Table 5): a similar earlier caption is a second positive.

Shapes: B pairs on this rank, G pairs on all ranks, Q length of the queue, E joint dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.contrastive import gather_rows, info_nce, scaled_cosines


class NearestCaptions(nn.Module):
    """InfoNCE between images and the nearest neighbours of their captions in a queue of Q earlier embeddings.

    The queue holds the last Q text embeddings of all ranks, equal on every rank, and is part of the checkpoint. It
    starts empty, and the loss of the first batch is 0. Neighbours have no gradient, so the loss trains the image
    side and the scale. Pairs with the same neighbour are joint positives, as pairs with equal captions are in
    ``info_nce``.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} captions has no neighbours; give at least one place")
        self.register_buffer("queue", torch.zeros(size, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """image, text [B,E], normalised -> scalar; in training, the texts of all ranks then enter the queue."""
        place = self.nearest(text)
        # In an empty queue every neighbour is place 0: all pairs are joint positives, and their loss is 0.
        loss = info_nce(image, self.queue[place], logit_scale, same=place, label_smoothing=label_smoothing)
        if self.training:
            self.push(gather_rows(text.detach()))
        return loss

    @torch.no_grad()
    def nearest(self, text: Tensor) -> Tensor:
        """text [B,E] -> the places long [B] of the queue's most similar embeddings; 0 while it is empty."""
        cosines = scaled_cosines(text, self.queue, torch.ones((), device=text.device))
        filled = torch.arange(len(self.queue), device=text.device) < self.seen
        return cosines.masked_fill(~filled, -torch.inf).argmax(1)

    @torch.no_grad()
    def push(self, text: Tensor) -> None:
        """Replace the oldest entries by texts [G,E]; of more than Q texts the last Q enter."""
        size = len(self.queue)
        text = text[-size:]
        places = (self.seen + torch.arange(len(text), device=text.device)) % size
        self.queue.index_copy_(0, places, text.to(self.queue.dtype))
        self.seen += len(text)
