"""Models whose cost can be set, and those that have one cost, seen alike: every picture takes one of P paths.

Shapes: B images, S image size, C classes, E joint dim, P paths of a model, cheapest first.

* Levels: the model answers after a level where its confidence reaches a threshold, each picture on its own. It has
  ``stages()``, ``classifier(class_embeddings, logit_scale, threshold)`` and, called with images, every level's z.
* Keep rates: the model prunes tokens, the same share for all pictures. It is ``prunable``, and has ``keep`` and
  ``at(keep)``, itself at another rate.
* Anything else with ``encode_image`` is one path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.contrastive import scaled_cosines
from common.deploy.early_exit import NEVER
from common.flops import Macs, count_macs
from common.stages import Chain, Stage, stages_of

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images [B,3,S,S] -> class probabilities [B,C], and which path gave them: long [B]."""

RATES = tuple(tenth / 10 for tenth in range(1, 11))
"""The keep rates among which calibration chooses, beside the model's own."""


class OnePath:
    """A model without a setting. model: has ``encode_image``, in evaluation mode."""

    knob: str | None = None
    """What its setting is called: "threshold", "keep", or None."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def own(self) -> float | None:
        """The setting that the model has when none is chosen."""
        return None

    def stages(self, setting: float | None) -> list[Stage]:
        """The graphs of the model at a setting; a threshold changes none of them."""
        return stages_of(self.model)

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one picture of S pixels on every path. ValueError: an operation whose cost is not known."""
        return [path_costs(self.stages(None), image_size)[-1].gmacs]

    def at(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification at a setting.

        classes: unit embeddings [C,E].  scale: multiplier of the cosines.
        """
        return lambda images: (probabilities(self.model, images, classes, scale), torch.zeros(len(images)).long())

    def every(self, images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each path says of images: probabilities [P,B,C], and the confidences [P-1,B] that choose among levels.

        None in their place: a setting chooses one path for all pictures.
        """
        return probabilities(self.model, images, classes, scale)[None], None


class Levels(OnePath):
    """A model that stops each picture at the first level whose confidence reaches a threshold."""

    knob = "threshold"

    @property
    def own(self) -> float:
        """All levels."""
        return NEVER

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one picture of S pixels that exits at each level."""
        return [macs.gmacs for macs in path_costs(self.stages(None), image_size)]

    def at(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification behind the threshold ``setting``; None: by all levels."""
        classify = self.model.classifier(classes, scale, self.own if setting is None else setting)

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            found = classify(images)
            return found.scores, found.exit_step

        return run

    @torch.no_grad()
    def every(self, images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [P,B,C] of every level, and the gate's confidence [P-1,B] in all but the last."""
        classify = self.model.classifier(classes, scale, self.own)
        found = torch.stack([classify.probabilities(z) for z in self.model(images)])
        return found, torch.stack([classify.gate.confidence(level) for level in found[:-1]])


class KeepRates(OnePath):
    """A model that keeps a share of its tokens, chosen before it sees the pictures."""

    knob = "keep"

    @property
    def own(self) -> float:
        """The rate that the model was saved with."""
        return self.model.keep

    @property
    def rates(self) -> list[float]:
        """The rate of each path, ascending."""
        return sorted({*RATES, self.own})

    def stages(self, setting: float | None) -> list[Stage]:
        """The graph at the keep rate ``setting``; None: at the model's own."""
        return stages_of(self.model.at(self.own if setting is None else setting))

    def costs(self, image_size: int) -> list[float]:
        """GMACs of one picture of S pixels at each of ``rates``."""
        return [path_costs(self.stages(rate), image_size)[-1].gmacs for rate in self.rates]

    def at(self, setting: float | None, classes: Tensor, scale: Tensor) -> Run:
        """Classification at the keep rate ``setting``, one of ``rates``; None: at the model's own."""
        rate = self.own if setting is None else setting
        model, path = self.model.at(rate), self.rates.index(rate)
        return lambda images: (probabilities(model, images, classes, scale), torch.full((len(images),), path))

    def every(self, images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        """Probabilities [P,B,C] at each of ``rates``."""
        return torch.stack([self.at(rate, classes, scale)(images)[0] for rate in self.rates]), None


def adaptive(model: nn.Module) -> OnePath:
    """The paths of a model, by what it has; see the top of this file."""
    if hasattr(model, "classifier"):
        return Levels(model)
    return KeepRates(model) if getattr(model, "prunable", False) else OnePath(model)


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
