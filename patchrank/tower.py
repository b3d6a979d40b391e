"""CLIP's image tower without the patch tokens that the predictor ranks last (Patch Ranking, Phases II and III).

Shapes: B images, S image size, N tokens, K patch tokens among them, R patch tokens kept, D width, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.adapters import AdaptedTower
from common.clip import CLIP
from common.reduction import ReducedTower, Reducer, ReductionContext, check_places
from common.tower import ImageTower
from common.weights import load_saved, save_model
from patchrank.predictor import RankPredictor
from patchrank.prompts import Prompts, visual_reducers
from patchrank.scores import keep_count


def prune(
    x: Tensor, context: ReductionContext, scores_of: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, ReductionContext]:
    """A reducer that keeps the ``count`` patch tokens with the highest scores, in the order of their places.

    scores_of: tokens [B,1+K,D] without prompts -> [B,K]. Of equal scores the earlier token stays. The choice has no
    gradient; gradients flow through the kept tokens.
    """
    with torch.no_grad():
        scores = scores_of(x[:, : x.shape[1] - context.trailing])
    kept = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    return context.select(x, kept)


def _both(x: Tensor, context: ReductionContext, first: Reducer, second: Reducer) -> tuple[Tensor, ReductionContext]:
    return second(*first(x, context))


def in_turn(first: Mapping[int, Reducer], second: Mapping[int, Reducer]) -> dict[int, Reducer]:
    """The reducers of both; at a place that both have, ``first`` works before ``second``."""
    shared = {place: partial(_both, first=first[place], second=second[place]) for place in first.keys() & second.keys()}
    return {**first, **second, **shared}


class PatchRankTower(ReducedTower):
    """An image tower in which the predictor chooses the tokens that enter block ``prune_layer`` and the later ones.

    ``keep`` fixes the number of tokens, so shapes are static. The given tower is shared, not copied. At keep 1
    nothing is ranked, and this tower equals the given one.

    predictor: None is for keep 1 alone.
    keep: share of the patch tokens that stay, in (0, 1]; the class token always stays.
    prune_layer: number of blocks that see all tokens.
    prompts: the image prompts are appended to the tokens and never pruned.
    ValueError: a rate out of range, no such layer, no predictor, or one for other tokens.
    """

    def __init__(
        self,
        tower: ImageTower | AdaptedTower,
        predictor: RankPredictor | None,
        keep: float,
        prune_layer: int = 3,
        prompts: Prompts | None = None,
    ) -> None:
        tokens = tower.grid**2
        kept = keep_count(keep, tokens)
        if predictor is not None:
            check_places([prune_layer], len(tower.transformer.resblocks))
        pruning: dict[int, Reducer] = {}
        if kept < tokens:
            if predictor is None:
                raise ValueError(f"keep {keep} prunes, which needs a predictor; give one, or keep 1")
            all_tokens = tower.leading + tokens
            if (predictor.tokens, predictor.width) != (all_tokens, tower.width):
                raise ValueError(
                    f"a predictor for {predictor.tokens} tokens of width {predictor.width} does not fit a tower with "
                    f"{all_tokens} of width {tower.width}"
                )
            pruning[prune_layer] = partial(prune, scores_of=predictor, count=kept)
        prompting = {} if prompts is None else visual_reducers(prompts, tower)
        super().__init__(tower, in_turn(prompting, pruning))
        self.predictor, self.prompts = predictor, prompts
        self.keep, self.prune_layer, self.kept = keep, prune_layer, kept

    @property
    def prunable(self) -> bool:
        """Whether there is a predictor, so that the tower can prune at any rate."""
        return self.predictor is not None

    def whole_tower(self) -> ImageTower | AdaptedTower:
        """The tower that it prunes, in which other reducers may stand instead. ValueError: it has prompts."""
        if self.prompts is not None:
            raise ValueError("this tower's prompts were tuned with its own pruning; no other reducer takes its place")
        return self.tower

    def at(self, keep: float) -> PatchRankTower:
        """This tower at another keep rate, with shared weights. ValueError: see the class."""
        tower = PatchRankTower(self.tower, self.predictor, keep, self.prune_layer, self.prompts)
        return tower.train(self.training)

    def record(self) -> dict[str, Any]:
        """What a file records, beside the architecture, to build this tower again."""
        return {
            "keep": self.keep,
            "prune_layer": self.prune_layer,
            "predictor": self.predictor is not None,
            "prompts": None if self.prompts is None else self.prompts.settings,
        }

    @classmethod
    def from_record(cls, tower: ImageTower, record: Mapping[str, Any]) -> PatchRankTower:
        """The tower that ``record`` describes, around ``tower``; predictor and prompts have random weights."""
        predictor = RankPredictor.for_tower(tower) if record["predictor"] else None
        prompts = None if record["prompts"] is None else Prompts(**record["prompts"])
        return cls(tower, predictor, record["keep"], record["prune_layer"], prompts)

    def exported(self) -> PatchRankTower:
        """The same tower with shared weights, and evaluated prompts in place of coupled ones."""
        if self.prompts is None:
            return self
        return PatchRankTower(self.tower, self.predictor, self.keep, self.prune_layer, self.prompts.evaluated())

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write this tower, as ``exported``, to a self-describing safetensors file.

        architecture: that of the CLIP whose image tower this holds.
        ValueError: the tower is another library's, whose architecture the file cannot describe.
        """
        if isinstance(self.tower, AdaptedTower):
            raise ValueError("a tower of another library is not saved here; save its predictor with save_predictor")
        tower = self.exported()
        save_model(tower, path, {"architecture": architecture, "patchrank": tower.record()}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> PatchRankTower:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> PatchRankTower:
            return cls.from_record(CLIP(record["architecture"]).image_tower, record["patchrank"])

        problem = "does not describe a PatchRankTower; save one from a trained predictor first"
        return load_saved(path, {"architecture", "patchrank"}, problem, build)
