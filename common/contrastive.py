"""The contrastive loss of CLIP over all ranks.

Shapes: B pairs on this rank, G = world size * B pairs on all ranks, E joint dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100)


class _GatherRows(torch.autograd.Function):
    """all_gather with the exact gradient: the sum over all ranks of their gradients for this rank's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """rows [B,...] of every rank, in rank order -> [G,...]; without a process group, the rows unchanged.

    Differentiable. B must be equal on all ranks (drop the last incomplete batch).
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def places_among_ranks(rows: Tensor) -> Tensor:
    """The places long [B] of this rank's rows [B,...] among the gathered ones [G,...]."""
    distributed_run = distributed.is_available() and distributed.is_initialized()
    first = distributed.get_rank() * len(rows) if distributed_run else 0
    return first + torch.arange(len(rows), device=rows.device)


def scaled_cosines(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """logit_scale * rows @ columns.T of unit rows [B,E] and columns [C,E] -> logits [B,C], at least in fp32.

    Autocast does not apply here: at a scale of 100, a bfloat16 product is off by 0.2.
    """
    with torch.autocast(rows.device.type, enabled=False):
        wide = torch.promote_types(rows.dtype, torch.float32)
        return logit_scale * (rows.to(wide) @ columns.to(wide).T)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    same: Tensor | None = None,
    label_smoothing: float = 0.0,
    gather: bool = True,
) -> Tensor:
    """Symmetric InfoNCE of B pairs against the negatives of all ranks -> scalar.

    image, text: [B,E], normalised. logit_scale: the multiplier (already exponentiated).
    same: long [B], equal for pairs with equal captions, which are all positives of each other. An anchor's loss is
        -log of the total probability of its positives; with one positive this is cross-entropy. None: an anchor's
        only positive is its own pair.
    label_smoothing: share of the target spread evenly over all G candidates.
    gather: use the negatives of all ranks. Each rank computes its own rows, so the mean gradient over ranks (which
        DDP computes) equals the gradient of one process with the whole batch.
    """
    shared = {"same": same, "label_smoothing": label_smoothing, "gather": gather}
    return info_nce_of_views([image], [text], logit_scale, **shared)


def info_nce_of_views(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    *,
    same: Tensor | None = None,
    label_smoothing: float = 0.0,
    gather: bool = True,
) -> Tensor:
    """The mean ``info_nce`` of each view of the images with each one of the texts -> scalar.

    images, texts: [B,E] each, normalised.  Each embedding travels between the ranks once, for all of its pairs.
    """
    all_images, all_texts = (
        gather_rows(torch.cat(list(views), dim=1)).chunk(len(views), dim=1) if gather else views
        for views in (images, texts)
    )
    losses = [
        contrast(
            scaled_cosines(image, all_text, logit_scale),
            scaled_cosines(text, all_image, logit_scale),
            same=same,
            label_smoothing=label_smoothing,
        )
        for image, all_image in zip(images, all_images, strict=True)
        for text, all_text in zip(texts, all_texts, strict=True)
    ]
    return sum(losses) / len(losses)


def contrast(
    image_logits: Tensor, text_logits: Tensor, *, same: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE of given logits -> scalar, for similarities other than the cosine of two embeddings.

    image_logits: [B,G], this rank's images against the texts of all ranks in rank order; or [B,B], against this
        rank's texts.
    text_logits: the same shape, this rank's texts against the images.  same, label_smoothing: see ``info_nce``.
    """
    pairs, candidates = image_logits.shape
    gathered = candidates > pairs
    if same is None:
        all_same = torch.arange(candidates, device=image_logits.device)
        same = places_among_ranks(image_logits) if gathered else all_same
    else:
        all_same = gather_rows(same) if gathered else same
    positive = same[:, None] == all_same
    sides = (_joint_cross_entropy(logits, positive, label_smoothing) for logits in (image_logits, text_logits))
    return 0.5 * sum(sides)


def _joint_cross_entropy(logits: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """-log of the positives' total softmax probability, averaged over rows; logits [B,G], positive bool [B,G]."""
    log_probability = F.log_softmax(logits, dim=1)
    loss = -torch.logsumexp(log_probability.masked_fill(~positive, -torch.inf), dim=1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_probability.mean(dim=1)
    return loss.mean()


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Clamp the logarithm of the scale to [0, ln 100] in place, as CLIP does after each step."""
    logit_scale.clamp_(0, MAX_LOG_SCALE)
