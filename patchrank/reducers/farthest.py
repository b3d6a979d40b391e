"""Greedy farthest-point selection: each further token is the one farthest from all that were taken.

Shapes: B images, K tokens, R chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import products, wide
from patchrank.reducers.base import marked


def cosines(tokens: Tensor) -> Tensor:
    """Cosines [B,K,K] between all pairs of tokens [B,K,F], in fp32 at least."""
    unit = F.normalize(wide(tokens), dim=-1)
    return products(unit, unit)


def squared_distances(tokens: Tensor) -> Tensor:
    """Squared Euclidean distances [B,K,K] between all pairs of tokens [B,K,F], in fp32 at least; 0 on the diagonal.

    They are symmetric to the last bit, so that both tokens of a pair tie, whatever the product's rounding.
    """
    tokens = wide(tokens)
    squares = tokens.square().sum(-1)
    distances = squares[:, :, None] + squares[:, None] - products(2 * tokens, tokens)
    same = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    return torch.maximum(distances, distances.mT).clamp(min=0).masked_fill(same, 0)


def row(matrix: Tensor, place: Tensor) -> Tensor:
    """Row ``place`` (long [B]) of each matrix [B,K,K] -> [B,K]."""
    return matrix.gather(1, place[:, None, None].expand(-1, 1, matrix.shape[2])).squeeze(1)


def farthest(distances: Tensor, first: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Choose ``count`` of K tokens by their distances [B,K,K], in the order of their choice -> long [B,R].

    first: long [B], the token to begin with.  weights: [B,K], by which the distance to what was taken is multiplied.
    The R - 1 steps work on [B,K] tensors. A token is never taken twice; of equal ones the first is.
    """
    chosen = [first]
    near = row(distances, first)
    taken = marked(near, first[:, None])
    for _ in range(count - 1):
        score = near if weights is None else near * weights
        place = score.masked_fill(taken, -torch.inf).argmax(-1)
        chosen.append(place)
        near = torch.minimum(near, row(distances, place))
        taken = taken.logical_or(marked(near, place[:, None]))
    return torch.stack(chosen, dim=1)
