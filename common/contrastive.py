"""The contrastive loss of CLIP over all ranks.

Shapes: B pairs on this rank, G = world size * B pairs on all ranks, E joint dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100)


class _GatherRows(torch.autograd.Function):
    """all_gather whose gradient is exact: every rank's gradient of my rows is summed back into them."""

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
    """rows [B,...] of every rank, in rank order -> [G,...]; without a process group, the rows themselves.

    Differentiable. All ranks must hold the same B (drop the last incomplete batch).
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def scaled_cosines(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """logit_scale * rows @ columns.T of unit rows [B,E] and columns [C,E] -> logits [B,C], at least in fp32.

    Also under autocast: at a scale of 100 a bfloat16 product would be off by 0.2.
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
    same: long [B], equal for pairs whose captions are equal. Their pictures fit each other's caption, so all of
        them are positives together: the term of an anchor is -log of the probability mass on its positives, which
        is the plain cross-entropy when it has one. None: each pair is its own only positive.
    label_smoothing: share of the target spread evenly over all G candidates.
    gather: take the negatives of all ranks; each rank computes its own rows, so that the mean gradient over the
        ranks (what DDP makes) is the gradient of one process with the joined batch.
    """
    all_image, all_text = (gather_rows(image), gather_rows(text)) if gather else (image, text)
    return contrast(
        scaled_cosines(image, all_text, logit_scale),
        scaled_cosines(text, all_image, logit_scale),
        same=same,
        label_smoothing=label_smoothing,
    )


def contrast(of_image: Tensor, of_text: Tensor, *, same: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Symmetric InfoNCE of ready logits -> scalar, for similarities other than the cosine of two embeddings.

    of_image: [B,G], each picture of this rank with the texts of all ranks in rank order (or of this rank: [B,B]).
    of_text: [B,G], each text of this rank with the same pictures.  same, label_smoothing: see ``info_nce``.
    """
    pairs, candidates = of_image.shape
    gathered = candidates > pairs
    if same is None:
        offset = distributed.get_rank() * pairs if gathered else 0
        all_same = torch.arange(candidates, device=of_image.device)
        same = all_same[offset : offset + pairs]
    else:
        all_same = gather_rows(same) if gathered else same
    positive = same[:, None] == all_same
    sides = (_joint_cross_entropy(logits, positive, label_smoothing) for logits in (of_image, of_text))
    return 0.5 * sum(sides)


def _joint_cross_entropy(logits: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """-log(sum of the positives' softmax), mean over the rows of logits [B,G]; positive: boolean [B,G]."""
    log_probability = F.log_softmax(logits, dim=1)
    loss = -torch.logsumexp(log_probability.masked_fill(~positive, -torch.inf), dim=1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_probability.mean(dim=1)
    return loss.mean()


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the logarithm of the scale within [0, ln 100] in place, as CLIP does after each step."""
    logit_scale.clamp_(0, MAX_LOG_SCALE)
