"""Nearest-neighbour supervision (DeCLIP; MLIP's Table 5): a similar earlier caption is a second positive.

Shapes: B pairs on this rank, G pairs on all ranks, Q length of the queue, E joint dim.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.contrastive import gather_rows, info_nce, places_among_ranks, scaled_cosines

Form = Literal["declip", "symmetric"]
"""How neighbours teach, see ``NearestCaptions``."""


class NearestCaptions(nn.Module):
    """InfoNCE between images and the nearest neighbours of their captions in a queue of Q earlier embeddings.

    form="declip" is DeCLIP's: images choose among the neighbours of all ranks, not the other way round. Each rank has a
        queue of its own captions, which starts with random directions. A checkpoint holds that of the first rank.
    form="symmetric" is ours: both directions, and one queue of the captions of all ranks, which starts empty. The first
        batch's loss is constant. Pairs with the same neighbour are joint positives, as pairs with equal captions are
        in ``info_nce``.

    Neighbours have no gradient, so the loss trains the image side and the scale.
    ValueError: a queue without places, or no such form.
    """

    def __init__(self, size: int, dim: int, form: Form = "declip") -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} captions has no neighbours; give at least one place")
        if form not in get_args(Form):
            raise ValueError(f"neighbour_form {form!r} is none of {', '.join(get_args(Form))}")
        self.form = form
        start = F.normalize(torch.randn(size, dim), dim=-1) if form == "declip" else torch.zeros(size, dim)
        # A parameter, because DDP copies the first rank's buffers to all ranks at every step.
        self.queue = nn.Parameter(start, requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """image, text [B,E], normalised -> scalar; in training, the texts then enter the queue."""
        place = self.nearest(text)
        loss = self.loss(image, place, logit_scale, label_smoothing)
        if self.training:
            self.push(text)
        return loss

    def loss(self, image: Tensor, place: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """InfoNCE of images [B,E] with the neighbours at the places [B] of the queue -> scalar."""
        neighbours = self.queue.detach()[place]
        if self.form == "declip":
            logits = scaled_cosines(image, gather_rows(neighbours), logit_scale)
            return F.cross_entropy(logits, places_among_ranks(image), label_smoothing=label_smoothing)
        # In an empty queue every neighbour is place 0: all pairs are joint positives, and their loss is constant.
        return info_nce(image, neighbours, logit_scale, same=place, label_smoothing=label_smoothing)

    @torch.no_grad()
    def nearest(self, text: Tensor) -> Tensor:
        """text [B,E] -> the places long [B] of the queue's most similar embeddings; 0 while it is empty."""
        cosines = scaled_cosines(text, self.queue, torch.ones((), device=text.device))
        if self.form == "symmetric":
            filled = torch.arange(len(self.queue), device=text.device) < self.seen
            cosines = cosines.masked_fill(~filled, -torch.inf)
        return cosines.argmax(1)

    @torch.no_grad()
    def push(self, text: Tensor) -> None:
        """Replace the oldest entries by this rank's texts [B,E], or in the symmetric form by those of all ranks.

        Of more than Q texts the last Q enter.
        """
        size = len(self.queue)
        text = (text.detach() if self.form == "declip" else gather_rows(text.detach()))[-size:]
        text = text.nan_to_num(0.0, 0.0, 0.0)  # a run that stops at such a step is saved with this queue
        places = (self.seen + torch.arange(len(text), device=text.device)) % size
        self.queue.index_copy_(0, places, text.to(self.queue.dtype))
        self.seen += len(text)
