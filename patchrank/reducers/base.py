"""What the reducers share: the cost of a call, how many tokens stay, and the same removal in several blocks.

Shapes: B images, N tokens, K patch tokens, R kept, M cached tokens, D width, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.adapters.tower import AdaptedTower
from common.precision import without_autocast
from common.reducer_registry import Setting
from common.reduction import Place, Reducer, ReductionContext
from common.tower import ImageTower
from patchrank.scores import keep_count


class Call(NamedTuple):
    """One picture and one call of a reducer, by which its multiply-adds are counted.

    patches: K.  others: leading and trailing tokens.  width: D.  heads: H.  cached: M.
    ran: whether the block's attention ran, so that its keys are there.  embed_dim: E, for reducers with a readout.
    """

    patches: int
    others: int
    width: int
    heads: int
    cached: int = 0
    ran: bool = False
    embed_dim: int = 0

    @property
    def tokens(self) -> int:
        """N."""
        return self.patches + self.others

    @property
    def norm(self) -> int:
        """One normalisation of all tokens, 5 per value as ``common.flops`` counts."""
        return 5 * self.tokens * self.width

    @property
    def class_row(self) -> int:
        """The class token's attention, in this suite's blocks (``common.attention.class_logits``)."""
        width = self.width
        return self.norm + self.tokens * width * self.heads + 2 * width**2 + self.cached * width

    @property
    def keys(self) -> int:
        """The block's keys; 0 where they are there."""
        return 0 if self.ran else self.norm + self.tokens * self.width**2

    @property
    def values(self) -> int:
        """The block's values, computed again."""
        return self.norm + self.tokens * self.width**2

    @property
    def attention(self) -> int:
        """The whole attention matrix: norm, queries (and keys), and their products."""
        maps = 1 if self.ran else 2
        products = self.tokens * (self.cached + self.tokens) * self.width
        return self.norm + maps * self.tokens * self.width**2 + products


class TokenReducer(nn.Module, ABC):
    """A reducer of ``common.reduction`` that leaves a number of tokens known beforehand."""

    masks = False
    """Whether a mask hides some of the tokens that it leaves."""

    @abstractmethod
    def left(self, patches: int) -> int:
        """How many patch tokens it leaves of ``patches``."""

    def macs(self, call: Call) -> int:
        """Multiply-adds of one call for one picture, as ``common.flops.count_macs`` counts them."""
        return 0

    @abstractmethod
    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> the tokens that are left, and their context."""


class Keeping(TokenReducer):
    """A reducer that leaves the share ``keep`` of the patch tokens. ValueError: a rate outside (0, 1]."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        keep_count(keep, 1)
        self.keep = keep

    def left(self, patches: int) -> int:
        return keep_count(self.keep, patches)


class Removing(TokenReducer):
    """A reducer that takes ``removed`` patch tokens away, at most half of them. ValueError: a negative number."""

    def __init__(self, removed: int) -> None:
        super().__init__()
        if removed < 0:
            raise ValueError(f"removed {removed} is negative; it is the number of tokens that a block loses")
        self.removed = removed

    def count(self, patches: int) -> int:
        """How many of ``patches`` go."""
        return min(self.removed, patches // 2)

    def left(self, patches: int) -> int:
        return patches - self.count(patches)


def spread(make: Callable[[int, Setting, int], Reducer]) -> Callable[[Setting], dict[Place, Reducer]]:
    """A builder of reducers that remove the same number of tokens in the middle of every block from ``layer`` on.

    make: removed, setting, block -> reducer.
    Summed over the blocks, as many tokens are gone as when ``keep`` of the patches enter ``layer``, up to rounding.
    A block loses at most half, so below a keep rate of about 0.4 fewer go, and the tower costs more than by pruning.
    """

    def build(setting: Setting) -> dict[Place, Reducer]:
        gone = setting.patches - keep_count(setting.keep, setting.patches)
        removed = round(2 * gone / (setting.blocks - setting.layer + 1))
        return {(i, "middle"): make(removed, setting, i) for i in range(setting.layer, setting.blocks)}

    return build


@dataclass(frozen=True, eq=False)
class Readout:
    """A tower's last norm and projection of each token, in the tower's own precision under autocast too.

    For a tower of another library it is what that pools of a token alone: where the class token is read, its norm and
    projection of the token; where patches are averaged, that of the token's mean; behind a pooling head, the head's
    answer to this token.

    An object, so that copies of a reducer and its tower read the copy's.
    """

    tower: ImageTower | AdaptedTower

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B,K,D] -> [B,K,E]."""
        tower = self.tower
        with without_autocast(tokens):
            if not isinstance(tower, AdaptedTower):
                return tower.ln_post(tokens.to(tower.proj.dtype)) @ tower.proj
            weights = next(part for part in tower.source.parameters() if part.is_floating_point())
            # A mean leaves the leading tokens out, so the token stands in their places too.
            alone = tokens.to(weights.dtype).flatten(0, 1)[:, None]
            read = tower.pool(alone if tower.reads_class else alone.expand(-1, 1 + tower.leading, -1))
            return read.unflatten(0, tokens.shape[:2])


def readout_of(setting: Setting, name: str, class_token: bool = False) -> Readout:
    """The readout of a setting's tower.

    name: of the reducer that reads it.  class_token: whether the reducer reads that of the class token, too.
    ValueError: then, a tower without a class token.
    """
    tower = setting.tower
    if class_token and isinstance(tower, AdaptedTower) and not tower.has_class_token:
        raise ValueError(
            f"{name} compares patches with the class token's readout, and this tower has no class token; take "
            "zoo-prune, or divprune"
        )
    return Readout(tower)


def in_order(kept: Tensor) -> Tensor:
    """Chosen places (long [B,R]) in ascending order."""
    return kept.sort(dim=-1).values


def most(scores: Tensor, count: int) -> Tensor:
    """The places (long [B,R]) of the ``count`` highest scores [B,K], highest first; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]


def marked(like: Tensor, places: Tensor) -> Tensor:
    """bool [B,K]: which of the K tokens stand at ``places`` (long [B,R]); the shape is that of ``like`` [B,K].

    A tracer knows no scatter of booleans.
    """
    return torch.zeros_like(like, dtype=torch.uint8).scatter(1, places, 1) > 0
