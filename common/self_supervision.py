"""Self-supervision on two views of a picture: SimCLR (SLIP, A-CLIP), SimSiam (DeCLIP) and BYOL (A-CLIP).

Shapes: B pairs on this rank, G pairs on all ranks, E joint dim, H hidden width, P width of a projection.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from common.contrastive import gather_rows, places_among_ranks, scaled_cosines


def views_of(batch: dict[str, Any], wanted: int, method: str, augmentation: str = "mocov2") -> list[Tensor]:
    """The further image views of a batch. ValueError: not as many as wanted; the setting is named.

    augmentation: which one draws the views that ``method`` reads.
    """
    views = batch.get("image_views", [])
    if len(views) != wanted:
        names = ", ".join([augmentation] * wanted)
        raise ValueError(
            f"{method} reads {wanted} further views of each picture, the batch has {len(views)}; set the data's "
            f"image_views: [{names}]"
        )
    return views


def _need_several(rows: int) -> None:
    """ValueError: too few rows for a variance."""
    if rows < 2:
        raise ValueError(
            f"a batch of {rows} picture has no variance to normalise by; make the data's batch_size 2 or more"
        )


class BatchNormOverRanks(nn.BatchNorm1d):
    """Batch normalisation with mean and variance of the rows of all ranks, on any device and backend.

    With gradient, as ``nn.SyncBatchNorm``, which knows GPUs alone. B must be equal on all ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B,H] -> [B,H]. ValueError: one row over all ranks in training."""
        ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if self.training:
            _need_several(ranks * len(x))
        if ranks == 1 or not self.training:
            return super().forward(x)
        wide = x.float()
        mean, square = gather_rows(torch.stack([wide.mean(0), wide.square().mean(0)])[None]).mean(0)
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            rows = ranks * len(x)
            # lerp takes one dtype alone, and a tower of bf16 keeps its statistics in bf16.
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * rows / (rows - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        normalised = (wide - mean) * (variance + self.eps).rsqrt()
        return (normalised * self.weight + self.bias).to(x.dtype)


def perceptron(*widths: int, norm: type[nn.BatchNorm1d], last_norm: bool = False) -> nn.Sequential:
    """Linear maps from width to width, with ``norm`` and ReLU between them; ``last_norm``: a norm at the end too."""
    layers: list[nn.Module] = []
    for number, (narrow, wide) in enumerate(pairwise(widths), 1):
        last = number == len(widths) - 1
        layers.append(nn.Linear(narrow, wide))
        if not last:
            layers += [norm(wide), nn.ReLU()]
        elif last_norm:
            layers.append(norm(wide))
    return nn.Sequential(*layers)


def simclr(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's loss (Chen et al., 2020) of two views over the negatives of all ranks -> scalar.

    first, second: projections [B,P] of two views, not normalised.

    An anchor's positive is the other view of its picture; its negatives are both views of all other pictures, 2G - 2.
    """
    first, second = (F.normalize(view.float(), dim=-1) for view in (first, second))
    all_first, all_second = gather_rows(first), gather_rows(second)
    target, scale = places_among_ranks(first), torch.tensor(1 / temperature, device=first.device)

    def side(anchors: Tensor, others: Tensor, same: Tensor) -> Tensor:
        itself = F.one_hot(target, len(same)).bool()
        alike = scaled_cosines(anchors, same, scale).masked_fill(itself, -torch.inf)
        return F.cross_entropy(torch.cat([scaled_cosines(anchors, others, scale), alike], dim=1), target)

    return 0.5 * (side(first, all_second, all_first) + side(second, all_first, all_second))


class SimSiam(nn.Module):
    """SimSiam (Chen and He, 2021) on image embeddings, with DeCLIP's widths: E -> 1024 -> 1024 -> 1024 -> 512 -> 1024.

    Batch normalisation is of each rank alone, as in DeCLIP.
    """

    def __init__(self, embed_dim: int, hidden: int = 1024) -> None:
        super().__init__()
        self.projector = perceptron(embed_dim, hidden, hidden, hidden, norm=nn.BatchNorm1d, last_norm=True)
        self.predictor = perceptron(hidden, hidden // 2, hidden, norm=nn.BatchNorm1d)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Image embeddings [B,E] of two views, not normalised -> scalar in [-1, 1].

        Each view's prediction is drawn to the other's projection, through which no gradient flows.
        ValueError: one pair on this rank in training.
        """
        if self.training:
            _need_several(len(first))
        z1, z2 = self.projector(first), self.projector(second)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return -0.5 * (_agreement(p1, z2) + _agreement(p2, z1))


def byol(prediction: Tensor, projection: Tensor) -> Tensor:
    """BYOL's loss (Grill et al., 2020): the mean of 2 - 2 cos between predictions and constant projections [B,P]."""
    return 2 - 2 * _agreement(prediction, projection)


def _agreement(prediction: Tensor, projection: Tensor) -> Tensor:
    """The mean cosine of predictions with constant projections, both [B,P]."""
    return F.cosine_similarity(prediction.float(), projection.detach().float(), dim=-1).mean()
