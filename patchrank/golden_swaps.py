"""A golden ranking's kept patches, bettered by exchanging one of them at a time.

Shapes: B images, S image size, N patch tokens, K kept ones.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from common.adapters import AdaptedTower
from common.tower import ImageTower
from patchrank.golden import Variants, default_memory
from patchrank.scores import removal_costs


@torch.no_grad()
def swapped(
    tower: ImageTower | AdaptedTower, images: Tensor, order: Tensor, kept: int, prune_layer: int, steps: int
) -> Tensor:
    """Orders [B,N] of images [B,3,S,S] whose first K patches preserve the embedding no worse than those of ``order``.

    order: long [B,N], most important first.  kept: K.  steps: the most exchanges of a picture.
    Each exchange brings back the dropped patch that helps most, then drops the one that is missed least. Greedy rounds
    never take a removal back; an exchange does. It remains a local search: no set of K patches is proved the best.
    ValueError: K that leaves nothing to exchange.
    """
    batch, tokens = order.shape
    if not 0 < kept < tokens:
        raise ValueError(f"kept {kept} of {tokens} patches leaves nothing to exchange; keep 1 to {tokens - 1}")
    variants = Variants(tower, images, prune_layer, default_memory(images.device))
    cost = partial(removal_costs, "feature", variants.full())
    single = torch.eye(tokens, dtype=torch.bool, device=order.device)
    everything = single.new_ones(batch, tokens)
    stays = single.new_zeros(batch, tokens).scatter(1, order[:, :kept], True)
    for _ in range(steps):
        # 1. The dropped patch that helps most when it is back.
        without = cost(variants.without(~(stays[:, None] | single), everything))
        back = without.masked_fill(stays, torch.inf).argmin(1, keepdim=True)
        larger = stays.scatter(1, back, True)
        # 2. Of those now kept, the one that is missed least; it may be the same one.
        missed = cost(variants.without(single & larger[:, None], larger)).masked_fill(~larger, torch.inf)
        after = larger.scatter(1, missed.argmin(1, keepdim=True), False)
        if torch.equal(after, stays):
            break
        stays = after
    # The kept ones first, both parts in their former order.
    return order.gather(1, stays.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
