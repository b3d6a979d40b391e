"""Tokens and multiply-adds of a WaveCLIP that exits at each level, and their mean over exits.

Shapes: B images, S image size, E joint dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from common.adaptive import path_costs
from common.flops import Macs, count_macs, expected_macs
from common.tower import Block
from waveclip.tower import WaveTower


@dataclass(frozen=True)
class Cost:
    """Tokens that entered the first block, and multiply-adds, for one image."""

    tokens: float
    macs: Macs


class WavePath(nn.Module):
    """The cached path to one exit: a WaveTower that refines ``steps`` times, without a gate."""

    def __init__(self, wave: WaveTower, steps: int) -> None:
        super().__init__()
        self.wave, self.steps = wave, steps

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B,3,S,S] -> the embeddings [B,E] of every level up to the exit."""
        z, state = self.wave.begin(images)
        levels = [z]
        for _ in range(self.steps):
            z, state = self.wave.refine(state)
            levels.append(z)
        return levels


def exit_costs(wave: WaveTower, image_size: int) -> list[Cost]:
    """The cost of one image of S pixels that exits at each level, coarsest first."""
    tokens = accumulate(map(wave.tokens_in, range(wave.steps)))
    return [Cost(*pair) for pair in zip(tokens, path_costs(wave.stages(), image_size), strict=True)]


def cost(model: nn.Module, image_size: int) -> Cost:
    """The cost of one image in any model of our blocks; tokens are summed over the calls of the first block."""
    entered: list[int] = []
    block = next(part for part in model.modules() if isinstance(part, Block))
    hook = block.register_forward_pre_hook(lambda part, inputs: entered.append(int(inputs[0].shape[1])))
    try:
        macs = count_macs(model, torch.zeros(1, 3, image_size, image_size))
    finally:
        hook.remove()
    return Cost(sum(entered), macs)


def expected(costs: Sequence[Cost], shares: Sequence[float]) -> Cost:
    """The mean cost where ``shares[i]`` of the images pay ``costs[i]``; see ``expected_macs``."""
    macs = expected_macs([cost.macs for cost in costs], shares)
    return Cost(sum(cost.tokens * share for cost, share in zip(costs, shares, strict=True)), macs)
