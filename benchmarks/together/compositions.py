"""The models of the frontier: every method alone, and early exit with token reduction in the refined level.

A composition joins what is there, without training: WaveCLIP's coarse level answers what it is sure of, and where it
is not, a reducer thins the fine level's tokens while the cached coarse ones stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks.mlip.ablations import BASELINE, MODEL
from benchmarks.mlip.models import MAKE
from benchmarks.patchrank.methods import merging
from benchmarks.patchrank.runs import COMMAND
from benchmarks.patchrank.tasks import FOR_ALL, PRUNE_LAYER
from common.clip import CLIP
from common.reduction import Place, ReducedTower, Reducer
from mlip.merging import Merging
from mlip.model import MLIP
from patchrank.baselines import ClassAttention, EViT, RandomKeep
from patchrank.predictor import load_predictor
from patchrank.tower import PatchRankTower
from waveclip import WaveTower
from waveclip.reduced import ReducedWaveTower

LAYER = 1
"""Of 4 blocks, the first that sees fewer tokens (EViT and merging: whose attention is the last to see all)."""
KEEPS = (0.25, 0.45, 0.65, 0.85)
FINE_KEEPS = (0.25, 0.5, 0.75)
"""Shares of the patch tokens that stay, of the teacher's 36 and of the fine level's 27."""
DENSE, WAVE = "dense teacher", "WaveCLIP"
RANKED = "teacher + rank predictor"
TRAINED = {
    RANKED: (FOR_ALL, COMMAND),
    "CLIP trained as MLIP": (BASELINE, MAKE[BASELINE]),
    "MLIP": (MODEL, MAKE[MODEL]),
}
"""The methods that have weights of their own: the file, and the command that trains it."""


@dataclass(frozen=True)
class Family:
    """One method, or two together, over its settings.

    models: by keep rate (None: nothing to set). Each has ``encode_image``; one that exits early is a WaveTower or a
        ReducedWaveTower.
    clip: whose texts and logit scale the embeddings are read against.
    """

    name: str
    models: Mapping[float | None, nn.Module]
    clip: CLIP
    composed: bool = False


def reducers(keep: float, patches: int, blocks: int) -> dict[str, dict[Place, Reducer]]:
    """Each training-free method's reducers at a keep rate of at least 0.25, for a tower or a level of a tower."""
    halfway = keep**0.5
    return {
        "random": {LAYER: RandomKeep(keep)},
        "class attention": {LAYER: ClassAttention(keep)},
        "EViT": {(LAYER, "middle"): EViT(keep)},
        "ToMe": merging(patches, blocks, keep, LAYER),
        "MLIP's merging": {(layer, "middle"): Merging(halfway) for layer in (LAYER, LAYER + 1)},
    }


def families(teacher: CLIP, wave: WaveTower, smoke: bool = False) -> list[Family]:
    """Every method and composition whose weights are there, the dense teacher first.

    wave: of one level.  smoke: one keep rate.
    """
    tower = teacher.image_tower
    blocks, fine = len(tower.transformer.resblocks), wave.steps - 1
    found = [Family(DENSE, {None: ReducedTower(tower, {})}, teacher)]
    whole = {keep: reducers(keep, tower.grid**2, blocks) for keep in (KEEPS[1:2] if smoke else KEEPS)}
    within = {
        keep: reducers(keep, wave.tokens_in(fine) - 1, blocks) for keep in (FINE_KEEPS[1:2] if smoke else FINE_KEEPS)
    }
    names = list(next(iter(whole.values())))
    for name in names:
        models = {keep: ReducedTower(tower, by_name[name]) for keep, by_name in whole.items()}
        found.append(Family(f"teacher + {name}", models, teacher))
    found += trained(teacher, list(whole))
    found.append(Family(WAVE, {None: wave}, teacher))
    for name in names:
        models = {keep: ReducedWaveTower(wave, {fine: by_name[name]}) for keep, by_name in within.items()}
        found.append(Family(f"{WAVE} + {name}", models, teacher, composed=True))
    return found


def trained(teacher: CLIP, keeps: Sequence[float]) -> list[Family]:
    """The methods of TRAINED whose weights are there; the rank predictor prunes the teacher at ``keeps``."""
    found = []
    for name, (path, _) in TRAINED.items():
        if not path.is_file():
            continue
        if name == RANKED:
            predictor = load_predictor(path, teacher.image_tower, PRUNE_LAYER).eval()
            towers = {keep: PatchRankTower(teacher.image_tower, predictor, keep, PRUNE_LAYER) for keep in keeps}
            found.append(Family(name, towers, teacher))
        else:
            clip = MLIP.load(path).eval()
            found.append(Family(name, {None: clip.image_tower}, clip))
    return found
