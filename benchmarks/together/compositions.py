"""The models of the frontier: every method alone, and early exit with token reduction in the fine level.

A composition needs no training. WaveCLIP's coarse level answers the images of which it is confident. For the others a
reducer thins the tokens of the fine level, while the cached coarse tokens stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks import WEIGHTS
from benchmarks.mlip.ablations import BASELINE, MODEL
from benchmarks.mlip.models import MAKE
from benchmarks.patchrank.tasks import PRUNE_LAYER
from common.clip import CLIP
from common.reducer_registry import Setting, named
from common.reduction import Place, ReducedTower, Reducer
from mlip.model import MLIP
from patchrank.predictor import load_predictor
from patchrank.reducers import ClassAttention, EViT, RandomKeep
from patchrank.tower import PatchRankTower
from waveclip import WaveTower
from waveclip.reduced import ReducedWaveTower

LAYER = 1
"""The first of 4 blocks that sees fewer tokens; for EViT and merging the last whose attention sees all of them."""
KEEPS = (0.25, 0.45, 0.65, 0.85)
FINE_KEEPS = (0.25, 0.5, 0.75)
"""Shares of the patch tokens that stay: of the teacher's 36, and of the fine level's 27."""
DENSE, WAVE = "dense teacher", "WaveCLIP"
RANKED = "teacher + rank predictor"
FOR_ALL = WEIGHTS / "embedded_patchrank.safetensors"
"""Revision 1's predictor, of 4 pictures of each of its names."""
_REVISION_1 = (
    "lightning fit -c patchrank/embedded_predictor.yaml --model.weights benchmarks/weights/embedded_clip.safetensors "
    "--model.architecture common/embedded_clip.json --data.architecture common/embedded_clip.json "
    "--data.name embedded-plain"
)
TRAINED = {
    RANKED: (FOR_ALL, _REVISION_1),
    "CLIP trained as MLIP": (BASELINE, MAKE[BASELINE]),
    "MLIP": (MODEL, MAKE[MODEL]),
}
"""The methods with weights of their own: the file, and the command that trains it."""


@dataclass(frozen=True)
class Family:
    """One method, or two together, over its settings.

    models: by keep rate (None: no setting). Each has ``encode_image``; one with early exit is a WaveTower or a
        ReducedWaveTower.
    clip: the CLIP with the text tower and logit scale of these models.
    """

    name: str
    models: Mapping[float | None, nn.Module]
    clip: CLIP
    composed: bool = False


def reducers(keep: float, patches: int, blocks: int) -> dict[str, dict[Place, Reducer]]:
    """Each training-free method's reducers at a keep rate of at least 0.25, for a tower or a level of a tower."""
    setting = Setting(keep, LAYER, patches, blocks)
    return {
        "random": {LAYER: RandomKeep(keep)},
        "class attention": {LAYER: ClassAttention(keep)},
        "EViT": {(LAYER, "middle"): EViT(keep)},
        "ToMe": named("tome").reducers(setting),
        "MLIP's merging": named("mlip-merging").reducers(setting),
    }


def families(teacher: CLIP, wave: WaveTower, smoke: bool = False, embedded: bool = True) -> list[Family]:
    """Every method and composition whose weights exist, the dense teacher first.

    wave: of one level.  smoke: one keep rate.  embedded: whether the methods trained for the embedded teacher are
    among them.
    """
    tower = teacher.image_tower
    blocks, fine = len(tower.transformer.resblocks), wave.steps - 1
    methods = [Family(DENSE, {None: ReducedTower(tower, {})}, teacher)]
    whole = {keep: reducers(keep, tower.grid**2, blocks) for keep in (KEEPS[1:2] if smoke else KEEPS)}
    within = {
        keep: reducers(keep, wave.tokens_in(fine) - 1, blocks) for keep in (FINE_KEEPS[1:2] if smoke else FINE_KEEPS)
    }
    names = list(next(iter(whole.values())))
    for name in names:
        models = {keep: ReducedTower(tower, by_name[name]) for keep, by_name in whole.items()}
        methods.append(Family(f"teacher + {name}", models, teacher))
    methods += trained(teacher, list(whole)) if embedded else []
    methods.append(Family(WAVE, {None: wave}, teacher))
    for name in names:
        models = {keep: ReducedWaveTower(wave, {fine: by_name[name]}) for keep, by_name in within.items()}
        methods.append(Family(f"{WAVE} + {name}", models, teacher, composed=True))
    return methods


def trained(teacher: CLIP, keeps: Sequence[float]) -> list[Family]:
    """The methods of TRAINED whose weights exist; the rank predictor prunes the teacher at ``keeps``."""
    methods = []
    for name, (path, _) in TRAINED.items():
        if not path.is_file():
            continue
        if name == RANKED:
            predictor = load_predictor(path, teacher.image_tower, PRUNE_LAYER).eval()
            towers = {keep: PatchRankTower(teacher.image_tower, predictor, keep, PRUNE_LAYER) for keep in keeps}
            methods.append(Family(name, towers, teacher))
        else:
            clip = MLIP.load(path).eval()
            methods.append(Family(name, {None: clip.image_tower}, clip))
    return methods
