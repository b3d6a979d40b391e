"""A model as graphs of flat tensors, which is how it is exported and counted.

Shapes: B images, S image size, E joint dim.

Most models are one graph. A model that gives its embedding level by level is one graph a level, each handing on
what the next one needs; the path that stops after a level is the chain of the graphs up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One graph: ``module(*inputs) -> (z [B,E] of length 1, *state)``, the state being the next stage's inputs.

    The first stage's one input are the pictures [B,3,S,S]. All tensors have the batch first.
    inputs, outputs: the tensors' names.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class EncodeImage(nn.Module):
    """A model's ``encode_image`` as a module: all of its inference in one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """images [B,3,S,S] -> (z [B,E],)."""
        return (self.model.encode_image(images),)


def stages_of(model: nn.Module) -> list[Stage]:
    """The stages that a model with ``encode_image`` names by its own ``stages()``, else the one that is all of it."""
    if hasattr(model, "stages"):
        return model.stages()
    return [Stage("image", EncodeImage(model), ("images",), ("embedding",))]


class Chain(nn.Module):
    """Stages run one after another, which is the path of an image that exits after the last of them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(modules)

    def forward(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """images [B,3,S,S] -> the outputs of every stage."""
        return run_chain(self.stages, images)


@torch.no_grad()
def run_chain(modules: Sequence[nn.Module], images: Tensor) -> list[tuple[Tensor, ...]]:
    """The outputs of every stage's module, each fed with the state that the one before gave."""
    results, inputs = [], (images,)
    for module in modules:
        results.append(tuple(module(*inputs)))
        inputs = results[-1][1:]
    return results


def inputs_of(stages: Sequence[Stage], images: Tensor) -> list[tuple[Tensor, ...]]:
    """The inputs of every stage for images [B,3,S,S]."""
    results = run_chain([stage.module for stage in stages[:-1]], images)
    return [(images,), *(result[1:] for result in results)]
