"""Merging tokens by groups: every patch token has a group, and each group becomes one token.

Shapes: B images, N tokens, K patch tokens, R groups, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.reduction import ReductionContext


def sizes_of(context: ReductionContext) -> Tensor:
    """The number of patches that each token stands for, [B,K] in fp32."""
    return torch.ones_like(context.positions, dtype=torch.float32) if context.sizes is None else context.sizes


def log_sizes(context: ReductionContext, x: Tensor, sizes: Tensor) -> Tensor:
    """The bias [B,1,1,N] of proportional attention from the patches' sizes [B,K]: their logs; 0 for exempt tokens."""
    all_sizes = context.with_patches(x.new_ones(x.shape[0], x.shape[1], 1), sizes[..., None].to(x.dtype))
    return all_sizes.log()[:, None, None, :, 0]


def grouped_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [B,R,F] of values [B,K,F] over each group; group: long [B,K] below R."""
    start = values.new_zeros(values.shape[0], groups, values.shape[-1])
    return start.scatter_add(1, group[..., None].expand_as(values), values)


def numbered(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Groups [B,K] from pairs of places (long [B,P]) and their groups (long [B,P] or [P]); together all K places."""
    places = torch.cat([place for place, _ in parts], dim=1)
    groups = torch.cat([number.expand_as(place) for place, number in parts], dim=1)
    return torch.zeros_like(places).scatter(1, places, groups)


def merge_groups(
    x: Tensor,
    context: ReductionContext,
    group: Tensor,
    groups: int,
    weights: Tensor | None = None,
    proportional: bool = False,
) -> tuple[Tensor, ReductionContext]:
    """Replace the patch tokens of x [B,N,D] by the weighted means of their groups, in the groups' order.

    group: long [B,K].  weights: [B,K]; None: sizes.
    Sizes add up; a token of several patches has position -1 and stands at the mean of their places, by size.
    proportional: later attention counts a token as all its patches (log sizes as bias), as it does in any case where
        an earlier reducer asked for it.
    """
    patches, sizes = context.patches(x), sizes_of(context)
    weights = (sizes if weights is None else weights).to(torch.promote_types(patches.dtype, torch.float32))
    tiny = torch.finfo(weights.dtype).tiny
    share = weights / grouped_sum(weights[..., None], group, groups).clamp(min=tiny).squeeze(-1).gather(1, group)
    means = grouped_sum(patches * share[..., None].to(patches.dtype), group, groups)
    total = grouped_sum(sizes[..., None], group, groups)
    members = grouped_sum(torch.ones_like(context.positions)[..., None], group, groups).squeeze(-1)
    positions = grouped_sum(context.positions[..., None], group, groups).squeeze(-1).where(members == 1, -1)
    centres = context.centres
    if centres is not None:
        scale = sizes[..., None].to(centres.dtype)
        centres = grouped_sum(centres * scale, group, groups) / total.to(centres.dtype).clamp(min=tiny)
    x, total = context.with_patches(x, means), total.squeeze(-1)
    bias = log_sizes(context, x, total) if proportional or context.bias is not None else None
    return x, replace(context, positions=positions, sizes=total, centres=centres, bias=bias)


def append_fused(
    x: Tensor, context: ReductionContext, source: Tensor, before: ReductionContext, weights: Tensor, gone: Tensor
) -> tuple[Tensor, ReductionContext]:
    """Put one token Σ w_j x_j behind the patch tokens of x [B,N,D]: the sum of the tokens that went.

    source, before: tokens [B,N',D] and context before they went.  weights: [B,K'].  gone: bool [B,K'].
    The token has position -1, the sizes of all that went, and stands at the mean of their places by ``weights``.
    """
    weights = weights * gone
    fused = weights.to(x.dtype)[:, None] @ before.patches(source)  # [B,1,D]
    sizes = torch.cat([sizes_of(context), (sizes_of(before) * gone).sum(1, keepdim=True)], dim=1)
    positions = torch.cat([context.positions, context.positions.new_full((x.shape[0], 1), -1)], dim=1)
    centres = context.centres
    if centres is not None:
        share = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        centre = (share[..., None].to(centres.dtype) * before.centres).sum(1, keepdim=True)
        centres = torch.cat([centres, centre], dim=1)
    x = context.with_patches(x, torch.cat([context.patches(x), fused], dim=1))
    bias = None if context.bias is None else log_sizes(context, x, sizes)
    return x, replace(context, positions=positions, sizes=sizes, centres=centres, bias=bias)
