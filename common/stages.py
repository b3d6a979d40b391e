"""A model as graphs of flat tensors, the form in which it is exported and its cost is counted.

Shapes: B images, S image size, E joint dim.

Most models are one graph. A model that computes its embedding level by level has one graph a level, and each graph
passes its state to the next. The path that stops after a level is the chain of the graphs up to that level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One graph: ``module(*inputs) -> (z [B,E] of length 1, *state)``; the state is the next stage's input.

    The first stage has one input, the images [B,3,S,S]. The first dimension of every tensor is the batch.
    inputs, outputs: the names of the tensors.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@runtime_checkable
class Staged(Protocol):
    """A model that divides its inference into several graphs."""

    def stages(self) -> list[Stage]:
        """The graphs, in the order in which they run."""
        ...


class EncodeImage(nn.Module):
    """A model's ``encode_image`` as a module: the whole inference in one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """images [B,3,S,S] -> (z [B,E],)."""
        return (self.model.encode_image(images),)


def stages_of(model: nn.Module) -> list[Stage]:
    """``model.stages()`` of a ``Staged`` model, otherwise one stage that runs ``encode_image``."""
    if isinstance(model, Staged):
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
    """The outputs of every stage's module; each takes the state that the one before it returned."""
    results, inputs = [], (images,)
    for module in modules:
        results.append(tuple(module(*inputs)))
        inputs = results[-1][1:]
    return results


def inputs_of(stages: Sequence[Stage], images: Tensor) -> list[tuple[Tensor, ...]]:
    """The inputs of every stage, for images [B,3,S,S]."""
    results = run_chain([stage.module for stage in stages[:-1]], images)
    return [(images,), *(result[1:] for result in results)]
