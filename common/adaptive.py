"""A uniform view of models: each image takes one of P paths of known cost; a threshold or keep rate may select it.

Shapes: B images, S image size, C classes, E joint dim, P paths of a model, cheapest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from common.contrastive import scaled_cosines
from common.early_exit import NEVER
from common.flops import Macs, count_macs
from common.stages import Chain, Stage, stages_of

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images [B,3,S,S] -> class probabilities [B,C], and the path that gave them: long [B]."""

RATES = tuple(tenth / 10 for tenth in range(1, 11))
"""The keep rates among which calibration chooses, beside the model's default."""


@runtime_checkable
class LevelModel(Protocol):
    """A model that computes its embedding level by level, so that each image can exit at the first confident one."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """images [B,3,S,S] -> z [B,E] of every level."""

    def stages(self) -> list[Stage]:
        """One graph for each level."""

    def classifier(self, class_embeddings: Tensor, logit_scale: Tensor, threshold: float) -> Any:
        """Early-exit classification among class_embeddings [C,E].

        The result is called with images, and returns ``scores`` [B,C] and ``exit_step`` [B]. It also has
        ``probabilities(z)`` [B,C] and ``gate.confidence(probabilities)`` [B].
        """


@runtime_checkable
class KeepRateModel(Protocol):
    """A model that prunes tokens. It keeps the same share of them for all images."""

    keep: float
    """The keep rate, in (0, 1]."""
    prunable: bool
    """Whether other keep rates are possible."""

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E]."""

    def at(self, keep: float) -> nn.Module:
        """The same model at another keep rate."""


class OnePath:
    """The one path of a model without a setting. model: has ``encode_image``, in evaluation mode."""

    setting_name: str | None = None
    """The name of the setting: "threshold", "keep", or None."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def default_setting(self) -> float | None:
        """The setting where none is chosen."""
        return None

    def stages(self, setting: float | None) -> list[Stage]:
        """The model's graphs at a setting. A threshold changes none of them."""
        return stages_of(self.model)

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one image of S pixels on every path [P]. ValueError: an operation whose cost is not known."""
        return [path_costs(self.stages(None), image_size)[-1].gmacs]

    def runner(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification at a setting. None: the default one.

        classes: unit embeddings [C,E].  scale: multiplier of the cosines.
        """
        return lambda images: (probabilities(self.model, images, classes, scale), torch.zeros(len(images)).long())

    def probabilities_of_all_paths(
        self, images: Tensor, classes: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Probabilities [P,B,C] by every path, and the confidences [P-1,B] that choose among levels.

        The confidences are None where one setting serves all images.
        """
        return probabilities(self.model, images, classes, scale)[None], None


class Levels(OnePath):
    """The levels of a model. Each image exits at the first level whose confidence reaches the threshold."""

    setting_name = "threshold"
    model: LevelModel

    @property
    def default_setting(self) -> float:
        """The threshold that sends every image through all levels."""
        return NEVER

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one image of S pixels that exits at each level."""
        return [macs.gmacs for macs in path_costs(self.stages(None), image_size)]

    def runner(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification behind the threshold ``setting``. None: by all levels."""
        classify = self.model.classifier(classes, scale, self.default_setting if setting is None else setting)

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            prediction = classify(images)
            return prediction.scores, prediction.exit_step

        return run

    @torch.no_grad()
    def probabilities_of_all_paths(self, images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [P,B,C] of every level, and the gate's confidence [P-1,B] at all but the last."""
        classify = self.model.classifier(classes, scale, self.default_setting)
        levels = torch.stack([classify.probabilities(z) for z in self.model(images)])
        return levels, torch.stack([classify.gate.confidence(level) for level in levels[:-1]])


class KeepRates(OnePath):
    """The keep rates of a model, one path each. The rate is chosen before the model sees the images."""

    setting_name = "keep"
    model: KeepRateModel

    @property
    def default_setting(self) -> float:
        """The rate that the model was saved with."""
        return self.model.keep

    @property
    def rates(self) -> list[float]:
        """The keep rate of each path [P], ascending."""
        return sorted({*RATES, self.default_setting})

    def stages(self, setting: float | None) -> list[Stage]:
        """The model's graph at the keep rate ``setting``. None: at the default one."""
        return stages_of(self.model.at(self.default_setting if setting is None else setting))

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one image of S pixels at each of ``rates``."""
        return [path_costs(self.stages(rate), image_size)[-1].gmacs for rate in self.rates]

    def runner(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification at the keep rate ``setting``, one of ``rates``. None: at the default one."""
        rate = self.default_setting if setting is None else setting
        model, path = self.model.at(rate), self.rates.index(rate)
        return lambda images: (probabilities(model, images, classes, scale), torch.full((len(images),), path))

    def probabilities_of_all_paths(self, images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        """Probabilities [P,B,C] at each of ``rates``."""
        return torch.stack([self.runner(rate, classes, scale)(images)[0] for rate in self.rates]), None


def paths_of(model: nn.Module) -> OnePath:
    """The paths of a model, by the protocol that it has."""
    if isinstance(model, LevelModel):
        return Levels(model)
    return KeepRates(model) if isinstance(model, KeepRateModel) and model.prunable else OnePath(model)


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """images [B,3,S,S] -> softmax [B,C] of the scaled cosines with classes [C,E], at least in fp32."""
    return scaled_cosines(model.encode_image(images), classes, scale).softmax(-1)


def path_costs(stages: Sequence[Stage], image_size: int) -> list[Macs]:
    """The cost of one image of S pixels that exits after each stage, all stages before included.

    ValueError: an operation whose cost is not known.
    """
    device = next(stages[0].module.parameters()).device
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    chains = (Chain([stage.module for stage in stages[:end]]) for end in range(1, len(stages) + 1))
    return [count_macs(chain, image) for chain in chains]
