"""CenterCLIP's clustering of one picture's tokens: k-medoids from a farthest-point start.

Shapes: B images, N tokens, K patch tokens, R clusters, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from common.precision import wide
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order
from patchrank.reducers.farthest import farthest, squared_distances
from patchrank.reducers.groups import merge_groups


def assigned(distances: Tensor, medoids: Tensor) -> Tensor:
    """The cluster (long [B,K]) of each token: its nearest of the medoids (long [B,R]); a medoid is its own nearest.

    distances: [B,K,K], whose diagonal is lower than all else.
    """
    rows = distances.gather(1, medoids[..., None].expand(-1, -1, distances.shape[2]))
    return rows.argmin(1)


def k_medoids(tokens: Tensor, count: int, rounds: int) -> tuple[Tensor, Tensor]:
    """k-medoids of tokens [B,K,F] by Euclidean distance -> medoids (long [B,R], ascending), clusters (long [B,K]).

    The start is the token of the largest norm, then the farthest from all before (KKZ). In each round every token goes
    to its nearest medoid, and of each cluster the member with the least sum of distances to the members becomes the
    medoid. Where nothing changes any more, further rounds change nothing.
    """
    tokens = wide(tokens)
    distances = squared_distances(tokens).sqrt()
    same = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    medoids = farthest(distances, torch.linalg.vector_norm(tokens, dim=-1).argmax(-1), count)
    nearest = distances.masked_fill(same, -1)
    numbers = torch.arange(count, device=tokens.device)[:, None]
    for _ in range(rounds):
        cluster = assigned(nearest, medoids)
        together = cluster[:, :, None] == cluster[:, None]
        spread = (distances * together).sum(-1)  # [B,K]
        members = cluster[:, None] == numbers  # [B,R,K]
        medoids = spread[:, None].masked_fill(~members, torch.inf).argmin(-1)
    medoids = in_order(medoids)
    return medoids, assigned(nearest, medoids)


@reducer(
    "kmedoids",
    "k-medoids (CenterCLIP)",
    source="Zhao et al., SIGIR 2022 (CenterCLIP)",
    licence="released code CC-BY-NC-4.0; nothing of it is here",
    differs="One picture instead of a segment of frames, without its fine-tuning. Ten rounds for all pictures (ours), "
    "where its code stops after at most 100 once the batch's medoids move less than 1e-5: that would make a picture's "
    "answer depend on its batch. Its spectral form needs an SVD for each picture and is not here.",
)
class KMedoids(Keeping):
    """Cluster the patches into R groups by Euclidean distance and keep the medoids, in the order of their places.

    form: "medoids", as released by default, drops the other tokens; "means" replaces each medoid by its cluster's mean,
        by size, and counts it as all its patches in later attention.
    rounds: of k-medoids.
    """

    def __init__(self, keep: float, form: Literal["medoids", "means"] = "medoids", rounds: int = 10) -> None:
        super().__init__(keep)
        if form not in ("medoids", "means"):
            raise ValueError(f"form {form!r} is none of medoids, means")
        if rounds < 0:
            raise ValueError(f"rounds {rounds} is negative; 0 keeps the start")
        self.form, self.rounds = form, rounds

    def macs(self, call: Call) -> int:
        """The distances between all pairs; rounds only compare and add."""
        return call.patches**2 * call.width

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens."""
        patches = context.patches(x)
        with torch.no_grad():
            medoids, cluster = k_medoids(patches, self.left(patches.shape[1]), self.rounds)
        if self.form == "medoids":
            return context.select(x, medoids)
        return merge_groups(x, context, cluster, medoids.shape[1], proportional=True)
