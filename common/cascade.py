"""A cascade of two models that share nothing: the first answers, and the second where the first is not sure.

Shapes: B images, S image size of the second model, s that of the first, C classes, E joint dim.

``common.deploy`` prepares a picture for each model (``cascaded``). To evaluate one (``Cascade``), images come as the
second model's pictures; the first one sees them made smaller, so a file is read once. Alone, the first model would read
pictures that are rounded to 8 bits after resizing, or, of the embedded benchmark, drawn at its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.adaptive import Run, paths_of
from common.arguments import check_first
from common.early_exit import margin
from common.models import Model, load_model
from common.preprocess import Preprocess
from common.stages import EncodeImage, Stage


class Resized(nn.Module):
    """Pictures that are prepared for one model, prepared for another one: [B,3,S,S] -> [B,3,s,s]."""

    def __init__(self, given: Preprocess, wanted: Preprocess) -> None:
        super().__init__()
        self.size, self.interpolation = wanted.size, wanted.interpolation
        for name, values in (
            ("mean", given.mean),
            ("std", given.std),
            ("to_mean", wanted.mean),
            ("to_std", wanted.std),
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> [B,3,s,s], resized as PIL does, without its rounding."""
        pixels = images * self.std + self.mean
        if pixels.shape[-1] != self.size:
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size, mode=self.interpolation, antialias=True).clamp(0, 1)
        return (pixels - self.to_mean) / self.to_std


class Cascade(nn.Module):
    """The image sides of a cascade, one stage each; ``common.evaluate.tasks.runner`` classifies by it.

    members: the first and the second model.
    """

    def __init__(self, first: Model, second: Model) -> None:
        super().__init__()
        self.members = first, second
        self.resized = Resized(second.preprocess, first.preprocess)
        self.first, self.second = EncodeImage(first.images), EncodeImage(second.images)

    def stages(self) -> list[Stage]:
        """Both models; the second takes the images again."""
        return [
            Stage("first", _First(self.resized, self.first), ("images",), ("first", "again")),
            Stage("second", self.second, ("again",), ("second",)),
        ]


class _First(nn.Module):
    def __init__(self, resized: Resized, encode: EncodeImage) -> None:
        super().__init__()
        self.resized, self.encode = resized, encode

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S] -> (z [B,E], images)."""
        return *self.encode(self.resized(images)), images


def cascaded(first: Run, second: Run, threshold: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first model's answers, and the second's for the images where the first's margin is below the threshold.

    The result maps images [B,3,s,s] and the same ones [B,3,S,S] to class probabilities [B,C] and the path: long [B].
    """

    def run(small: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, _ = first(small)
        path = (~(margin(scores) >= threshold)).long()  # an answer that is no number is not sure
        unsure = path.nonzero().squeeze(1)
        if len(unsure):
            scores[unsure] = second(images[unsure])[0]
        return scores, path

    return run


def load_first(name: str) -> Model:
    """The first model of a cascade. ValueError: nothing is there, or no model that stands in one file or folder."""
    check_first(name)
    try:
        return load_model(name)
    except ValueError as error:
        raise ValueError(f"--first: {error}") from error


def check_members(first: Model, second: Model) -> None:
    """ValueError: both are one model, the second has a setting of its own, or the first has no text tower."""
    if first.weights["image"] == second.weights["image"]:
        raise ValueError(f"--first: {first.name} is the model itself, which then runs twice; name a smaller one")
    own = paths_of(second.images).setting_name
    if own is not None:
        raise ValueError(f"--first: {second.name} has a {own} of its own; a cascade ends in a model without one")
    if first.texts is None:
        raise ValueError(f"--first: {first.name} (type {first.type}) has no text tower; name a model that has one")


def led_by(model: Model, first: Model) -> Model:
    """The model behind a ``first`` one, which answers where it is sure; see ``common.evaluate.points``.

    ValueError: see ``check_members``, or the first one reads larger pictures or crops them otherwise.
    """
    check_members(first, model)
    if first.image_size > model.image_size:
        raise ValueError(
            f"--first: {first.name} reads pictures of {first.image_size} px, {model.name} of {model.image_size}; name "
            "the one of the smaller pictures with --first, the other one with --model"
        )
    if first.preprocess.resize_mode != model.preprocess.resize_mode:
        raise ValueError(
            f"--first: {first.name} crops pictures by {first.preprocess.resize_mode}, {model.name} by "
            f"{model.preprocess.resize_mode}; both see one crop, so name models that were prepared alike"
        )
    files = {f"first/{name}": digest for name, digest in first.files.items()}
    return replace(model, name=f"{first.name} then {model.name}", files=model.files | files, folder=None, first=first)
