"""Early exit and token reduction together: reducers inside the levels of a WaveTower, beside its cache.

Shapes: B images, S image size, K chosen rows, E joint dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from common.reduction import Place, Reducer, check_places
from common.stages import Stage
from waveclip.gating import MarginGate
from waveclip.progressive import ProgressiveClassifier
from waveclip.tower import Level, WaveState, WaveTower


class ReducedWaveTower(nn.Module):
    """A WaveTower with reducers in its levels. It shares the tower; without reducers it equals the tower.

    A level's reducers work on that level's patch tokens, numbered by band and then by place. The class token and the
    cached keys and values of earlier levels stay as they are. A token that a reducer drops is missing from the cache
    of the blocks after it, so later levels do not see it there. A merged token counts by its size (proportional
    attention) within its level alone, since the cache holds no sizes and no mask.

    reducers: step -> place -> reducer; see ``common.reduction.Place``. Those that are modules become submodules.
    ValueError: a step or a place that the tower does not have, or a reducer that masks tokens before the last step.
    """

    def __init__(self, wave: WaveTower, reducers: Mapping[int, Mapping[Place, Reducer]]) -> None:
        super().__init__()
        layers = len(wave.transformer.resblocks)
        for step, places in reducers.items():
            if not 0 <= step < wave.steps:
                raise ValueError(f"reducers at step {step}: this tower has steps 0 to {wave.steps - 1}")
            check_places(places, layers)
            masking = [reducer for reducer in places.values() if getattr(reducer, "masks", False)]
            if masking and step < wave.steps - 1:
                raise ValueError(
                    f"{type(masking[0]).__name__} at step {step} masks tokens, to which later steps would attend "
                    f"through the cache; it may stand at the last step, {wave.steps - 1}"
                )
        self.wave, self.reducers = wave, {step: dict(places) for step, places in reducers.items()}
        flat = (reducer for places in reducers.values() for reducer in places.values())
        self.reducer_modules = nn.ModuleList(reducer for reducer in flat if isinstance(reducer, nn.Module))

    @property
    def steps(self) -> int:
        """S + 1, the number of embeddings, coarse to fine."""
        return self.wave.steps

    def tokens_in(self, step: int) -> int:
        """The tokens that enter at one step, class token included, before a reducer drops any."""
        return self.wave.tokens_in(step)

    def begin(self, images: Tensor) -> tuple[Tensor, WaveState]:
        """images [B,3,S,S] -> z_0 [B,E] and the state to refine; see ``WaveTower.begin``."""
        return self.wave.begin(images, self.reducers.get(0))

    def refine(self, state: WaveState, rows: Tensor | None = None) -> tuple[Tensor, WaveState]:
        """The next level's z [K,E] and state; see ``WaveTower.refine``."""
        return self.wave.refine(state, rows, self.reducers.get(state.done))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B,3,S,S] -> (z_0, ..., z_S), each [B,E], level by level over the cache."""
        z, state = self.begin(images)
        levels = [z]
        while state.bands:
            z, state = self.refine(state)
            levels.append(z)
        return tuple(levels)

    def classifier(
        self, class_embeddings: Tensor, logit_scale: float | Tensor, threshold: float
    ) -> ProgressiveClassifier:
        """Early exit over the reduced levels, as ``WaveTower.classifier``."""
        return ProgressiveClassifier(self, class_embeddings, logit_scale, MarginGate(threshold))

    def stages(self) -> list[Stage]:
        """One graph a level, as ``WaveTower.stages``."""
        return [replace(stage, module=Level(self, step)) for step, stage in enumerate(self.wave.stages())]

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> the last level's embedding [B,E], of length 1 unless told otherwise."""
        z = self(images)[-1]
        return F.normalize(z, dim=-1) if normalize else z
