"""Tuning a CLIP's image tower to a reducer that needs no training: it learns to keep its embeddings with fewer tokens.

Shapes: B images, S image size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.clip import CLIP
from common.reducer_registry import installed_reducers, named, schedule
from common.reduction import ReducedTower
from patchrank.frozen_clip import ReducedTowerTraining


class ReducerTuning(ReducedTowerTraining):
    """Train a copy of the image tower to reproduce a frozen CLIP's image embeddings under a reducer.

    It is the control of trained reducers such as CrossGET: what the tower's own training brings with a reducer that
    learns nothing. The loss is theirs, the cosine distance to the full embedding. The result is a plain CLIP, which
    ``effclip evaluate --reducer`` reduces at this rate or another.

    Args:
        reducer: one of docs/reducers.md that needs neither training nor texts.
        keep: its keep rate.
        place: the block at which it begins, or several; the keep rate holds at each.
        settings: see ``FrozenCLIPTraining``.
    """

    def __init__(
        self, *, reducer: str = "tome", keep: float = 0.6, place: int | list[int] = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.tuned = copy.deepcopy(self.clip)
        tower = self.tuned.image_tower.requires_grad_(True)
        installed_reducers()
        places = [place] if isinstance(place, int) else place
        self.model = ReducedTower(tower, schedule(named(reducer), tower, keep, places))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The mean cosine distance of one batch."""
        with torch.no_grad():
            target = self.clip.image_tower(batch["image"])
        loss = (1 - F.cosine_similarity(self(batch["image"]).float(), target.float(), dim=-1)).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def deployable(self) -> tuple[CLIP, None]:
        """The CLIP with the tuned tower."""
        return self.tuned, None
