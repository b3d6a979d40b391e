"""ATC: agglomerative clustering of the patches by their keys.

Shapes: B images, N tokens, K patch tokens, R clusters, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping
from patchrank.reducers.farthest import cosines, row
from patchrank.reducers.groups import merge_groups

Linkage = Literal["average", "single", "complete"]


def agglomerate(distances: Tensor, clusters: int, linkage: Linkage = "average") -> Tensor:
    """Join the two nearest clusters until ``clusters`` are left: distances [B,K,K] -> cluster of each (long [B,K]).

    Clusters are numbered by their first token. The distance to a joined cluster is the mean over pairs of tokens, the
    smallest or the largest. K - R steps, each on [B,K,K] tensors, so all pictures of a batch join at once.
    """
    tokens = distances.shape[1]
    place = torch.arange(tokens, device=distances.device)
    distances = (distances + distances.transpose(1, 2)) / 2  # so that of two equal entries the upper comes first
    distances = distances.masked_fill(place[:, None] == place, torch.inf)
    label, count = place.expand(distances.shape[0], -1), torch.ones_like(distances[:, 0])
    for _ in range(tokens - clusters):
        flat = distances.flatten(1).argmin(1)
        first, second = flat // tokens, flat % tokens  # first < second
        is_first, is_second = place == first[:, None], place == second[:, None]
        near, far = row(distances, first), row(distances, second)
        if linkage == "average":
            sizes = count.gather(1, torch.stack([first, second], dim=1))
            joined = (sizes[:, :1] * near + sizes[:, 1:] * far) / sizes.sum(1, keepdim=True)
        else:
            joined = torch.minimum(near, far) if linkage == "single" else torch.maximum(near, far)
        joined = joined.masked_fill(is_first.logical_or(is_second), torch.inf)
        distances = torch.where(is_first[:, :, None], joined[:, None], distances)
        distances = torch.where(is_first[:, None], joined[:, :, None], distances)
        distances = distances.masked_fill(is_second[:, :, None].logical_or(is_second[:, None]), torch.inf)
        count = count + is_first * count.gather(1, second[:, None])
        label = torch.where(label == second[:, None], first[:, None], label)
    number = (label == place).cumsum(1) - 1
    return number.gather(1, label)


@reducer(
    "atc",
    "ATC",
    place="middle",
    needs=("keys",),
    source="Haurum et al., ECCV 2024 (ATC)",
    licence="released code MIT",
    differs="It clusters on the CPU, picture by picture (scikit-learn); here all pictures of a batch at once, with the "
    "same clusters. It stands at three places there (blocks 3, 6, 9).",
)
class ATC(Keeping):
    """Merge the patches into R clusters by agglomerative clustering of their keys, cosine distance.

    A cluster becomes its tokens' mean, by size, and counts as all its patches in later attention.

    linkage: "average" as released, "single" or "complete".
    """

    def __init__(self, keep: float, linkage: Linkage = "average") -> None:
        super().__init__(keep)
        if linkage not in ("average", "single", "complete"):
            raise ValueError(f"linkage {linkage!r} is none of average, single, complete")
        self.linkage = linkage

    def macs(self, call: Call) -> int:
        """The cosines between all pairs of mean keys, and keys that are not there yet."""
        return call.keys + call.patches**2 * call.width // call.heads

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        with torch.no_grad():
            keys = context.patches(context.block_keys().mean(1))
            count = self.left(keys.shape[1])
            cluster = agglomerate(1 - cosines(keys), count, self.linkage)
        return merge_groups(x, context, cluster, count, proportional=True)
