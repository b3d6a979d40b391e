"""What a WaveCLIP costs when it stops after each level, and on average.

Shapes: B images, N tokens, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from common.deploy.paths import path_costs
from common.flops import Macs, count_macs, expected_macs
from common.tower import Block
from waveclip.tower import WaveTower


@dataclass(frozen=True)
class Cost:
    """Tokens that entered the first block, and multiply-adds, for one image."""

    tokens: float
    macs: Macs


class WavePath(nn.Module):
    """A WaveTower that refines ``steps`` times, whatever the gate would say: the cached path of one exit."""

    def __init__(self, wave: WaveTower, steps: int) -> None:
        super().__init__()
        self.wave, self.steps = wave, steps

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B,3,S,S] -> the embeddings [B,E] of every level on the way."""
        z, state = self.wave.begin(images)
        levels = [z]
        for _ in range(self.steps):
            z, state = self.wave.refine(state)
            levels.append(z)
        return levels


def exit_costs(wave: WaveTower, image_size: int) -> list[Cost]:
    """The cost of stopping at each level, coarsest first, for one image of ``image_size`` pixels."""
    tokens = accumulate(map(wave.tokens_in, range(wave.steps)))
    return [Cost(*pair) for pair in zip(tokens, path_costs(wave.stages(), image_size), strict=True)]


def cost(model: nn.Module, image_size: int) -> Cost:
    """One image's cost in any model of our blocks; tokens are summed over the first block's calls."""
    entered: list[int] = []
    block = next(part for part in model.modules() if isinstance(part, Block))
    hook = block.register_forward_pre_hook(lambda part, inputs: entered.append(int(inputs[0].shape[1])))
    try:
        macs = count_macs(model, torch.zeros(1, 3, image_size, image_size))
    finally:
        hook.remove()
    return Cost(sum(entered), macs)


def expected(costs: Sequence[Cost], fractions: Sequence[float]) -> Cost:
    """The mean over exits, ``fractions[i]`` of the images leaving at ``costs[i]``; see ``expected_macs``."""
    macs = expected_macs([each.macs for each in costs], fractions)
    return Cost(sum(each.tokens * share for each, share in zip(costs, fractions, strict=True)), macs)
