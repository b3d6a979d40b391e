"""Comparisons of tokens in fp32 at least, whatever the precision around them.

Shapes: B images, K and K' tokens, F features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least: distances near zero are noise in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A block in which no autocast rounds the products of x: scores that differ little would tie in half precision."""
    kind = x.device.type  # "meta" has no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def products(a: Tensor, b: Tensor) -> Tensor:
    """The products [B,K,K'] of tokens a [B,K,F] with all tokens b [B,K',F], in fp32 at least, under autocast too."""
    with without_autocast(a):
        return wide(a) @ wide(b).transpose(1, 2)


def wide_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear`` of x in fp32 at least, under autocast too."""
    with without_autocast(x):
        if not isinstance(linear.weight, Tensor) or linear.weight.dtype == wide(linear.weight).dtype:
            return linear(wide(x))  # the module's own map, which may be packed or quantised
        return F.linear(wide(x), wide(linear.weight), None if linear.bias is None else wide(linear.bias))
