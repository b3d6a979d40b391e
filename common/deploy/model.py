"""The model that a user works with: ``load("DIR").classify(pictures, labels, gmacs=8.0)``.

Shapes: B images of a batch, C classes, E joint dim, P paths of a model, cheapest first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.adaptive import OnePath, paths_of
from common.arguments import checked_labels
from common.data.files import Picture, find_pictures, read_ahead
from common.data.transforms import eval_transform, to_batch
from common.deploy.calibration import Calibration, calibration_file
from common.directory import CALIBRATION, read
from common.early_exit import NEVER
from common.inference import DTYPES, chosen_device, optimize_for_inference
from common.models import OPEN_CLIP, Model, load_model
from common.packaged import default_model, packaged_model
from common.zeroshot import PHOTO, class_embeddings, fill


@dataclass(frozen=True)
class Answer:
    """The classification of one picture.

    picture: its path, or its number.  label, probability: the most probable class.
    level: the level at which the picture exited, for a model with levels.
    gmacs: the cost in the image tower; None where it cannot be counted.  error: the reason why there is no label.
    top: the most probable classes with their probabilities, as many as were asked for.
    """

    picture: str
    label: str | None = None
    probability: float | None = None
    level: int | None = None
    gmacs: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()


class Deployed:
    """A loaded model with its default class names and prompts, and its calibration if there is one.

    device: where it runs.  class_names, templates: the defaults of a call.
    dtype: the image tower's, "float32", "bfloat16" or "float16" (by autocast); cosines stay in float32.
    calibration: the name or .json file of a calibration to follow; see ``calibration_file``.
    """

    def __init__(
        self,
        model: Model,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = PHOTO,
        device: str = "cpu",
        dtype: str = "float32",
        calibration: str | Path | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of {list(DTYPES)}")
        self.model, self.device, self.dtype = model, device, dtype
        self._named = None if calibration is None else calibration_file(str(calibration))
        if self._named is not None and not self._named.is_file():
            raise ValueError(
                f"no calibration at {self._named}; `effclip calibrate --calibration {calibration}` makes one"
            )
        self.class_names, self.templates = list(class_names), tuple(templates)
        self.paths: OnePath = paths_of(model.images)
        if self._named is not None and self.paths.setting_name is None:
            raise ValueError(f"calibration {calibration}: {model.name} has one cost; leave it out")
        towers = model.images.to(device), model.text_encoder().to(device)
        if model.type != OPEN_CLIP:
            for tower in towers:
                optimize_for_inference(tower)

    @property
    def setting_name(self) -> str | None:
        """The name of the setting: "threshold" (a model with levels), "keep" (keep rates), or None."""
        return self.paths.setting_name

    @cached_property
    def costs(self) -> list[float]:
        """GMACs of the image tower for one picture on every path [P]. ValueError: an operation of unknown cost."""
        return self.paths.costs(self.model.image_size)

    @property
    def calibration_file(self) -> Path:
        """The calibration's file: the named one, else in the model directory, else stored by the weights' hash."""
        if self._named is not None:
            return self._named
        if self.model.folder is not None:
            return self.model.folder / CALIBRATION
        return calibration_file("-".join(self.model.weights[side] for side in ("image", "text")))

    @property
    def follows_calibration(self) -> bool:
        """Whether a call without a budget uses the calibration: where it was named, or lies in the model directory."""
        return self._named is not None or (self.model.folder is not None and self.calibration is not None)

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration; None where there is no file. ValueError: it was made for other weights."""
        if not self.calibration_file.is_file():
            return None
        calibration = Calibration.read(self.calibration_file)
        if calibration.weights != self.model.weights:
            raise ValueError(f"{self.calibration_file} was made for other weights; run `effclip calibrate` again")
        return calibration

    def setting(self, gmacs: float | None = None, threshold: float | None = None) -> float | None:
        """The setting for a budget or a threshold; without either that of ``follows_calibration``, or the default.

        gmacs: mean budget for a picture.  threshold: returned as it is.
        ValueError: both are given, or the model cannot meet the request.
        """
        if gmacs is not None and threshold is not None:
            raise ValueError(f"gmacs {gmacs:g} and threshold {threshold:g} are two ways to say one thing; give one")
        if threshold is not None:
            if self.setting_name != "threshold":
                raise ValueError(f"threshold {threshold:g}: {self.model.name} has no levels to stop at; leave it out")
            if not 0 <= threshold <= 1:
                raise ValueError(f"threshold {threshold:g}: confidence lies in [0, 1]; give a number from there")
            return threshold
        if gmacs is not None:
            return self._within(gmacs)
        used = self._used_calibration(gmacs, threshold)
        return self.paths.default_setting if used is None else used.point.setting

    def _used_calibration(self, gmacs: float | None, threshold: float | None) -> Calibration | None:
        """The calibration from which ``setting`` takes its answer; None: it needs none."""
        if self.setting_name is None or threshold is not None:
            return None
        if gmacs is None:
            return self.calibration if self.follows_calibration else None
        return self.calibration if self.setting_name == "threshold" and gmacs < self.costs[-1] else None

    def _within(self, gmacs: float) -> float | None:
        least = min(self.costs)
        if not gmacs >= least:
            raise ValueError(f"gmacs {gmacs:g}: a picture costs {least:.4g} GMACs at least; give that or more")
        if self.setting_name == "keep":
            return max(rate for rate, cost in zip(self.paths.rates, self.costs, strict=True) if cost <= gmacs)
        if gmacs >= self.costs[-1]:
            return None if self.setting_name is None else NEVER
        if self.calibration is None:
            raise ValueError(
                f"gmacs {gmacs:g}: no threshold is known for a budget, since nothing was calibrated; run `effclip "
                f"calibrate --data NAME --gmacs {gmacs:g}` with this model, or give a threshold"
            )
        return self.calibration.within(gmacs)

    def prompts_hash(self, labels: Sequence[str], templates: Sequence[str]) -> str:
        """A hash (16 hex digits) of the prompts of a classification. The order of the labels does not matter."""
        texts = sorted("\t".join(fill(template, label) for template in templates) for label in labels)
        return sha256("\n".join(texts).encode()).hexdigest()[:16]

    def classes(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings [C,E]. ValueError: a label has a word outside the model's vocabulary."""
        texts = self.model.texts
        tokenizer = partial(texts.tokenizer, longest=True)
        return class_embeddings(texts.encode_text, tokenizer, labels, templates, device=self.device)

    @property
    def scale(self) -> Tensor:
        """The multiplier of the cosines."""
        return self.model.texts.logit_scale.detach().exp()

    def classify(
        self,
        pictures: str | Path | Image.Image | Iterable[str | Path | Image.Image],
        labels: Sequence[str] | None = None,
        *,
        gmacs: float | None = None,
        threshold: float | None = None,
        templates: Sequence[str] | None = None,
        topk: int = 1,
        batch_size: int = 64,
        workers: int | None = None,
    ) -> list[Answer]:
        """One answer for each picture, in order; see ``Classification.stream``."""
        if isinstance(pictures, str | Path | Image.Image):
            pictures = [pictures]
        parts = list(pictures)
        sources = (
            source for part in parts for source in ([part] if isinstance(part, Image.Image) else find_pictures([part]))
        )
        classification = self.prepare(labels, gmacs=gmacs, threshold=threshold, templates=templates, topk=topk)
        return list(classification.stream(sources, batch_size, workers))

    def prepare(
        self,
        labels: Sequence[str] | None = None,
        *,
        gmacs: float | None = None,
        threshold: float | None = None,
        templates: Sequence[str] | None = None,
        topk: int = 1,
    ) -> Classification:
        """A classification ready to run: class embeddings are computed and the setting is chosen.

        labels: class names.  templates: prompts with {}.  None: the model's defaults.
        gmacs, threshold: see ``setting``.
        topk: how many classes ``Answer.top`` holds; more than there are gives all of them.
        ValueError: no labels, a word outside the vocabulary, or a request that the model cannot meet.
        """
        if labels is None and not self.class_names:
            raise ValueError(f"{self.model.name} has no class names of its own; give labels")
        labels = self.class_names if labels is None else checked_labels(list(labels))
        templates = self.templates if templates is None else tuple(templates)
        if topk < 1:
            raise ValueError(f"topk {topk} must be at least 1")
        setting, used = self.setting(gmacs, threshold), self._used_calibration(gmacs, threshold)
        classification = Classification(self, labels, templates, setting, min(topk, len(labels)), used)
        if used is not None and self.setting_name == "threshold" and not classification.calibrated_on_these:
            warnings.warn(
                "the calibration was made with other labels or prompts, so the mean cost may differ from what it says",
                stacklevel=2,
            )
        return classification


class Classification:
    """Zero-shot classification among fixed labels at a fixed setting; made by ``Deployed.prepare``.

    calibration: the one from which the setting was taken, if any.
    """

    def __init__(
        self,
        deployed: Deployed,
        labels: Sequence[str],
        templates: Sequence[str],
        setting: float | None,
        topk: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        self.deployed, self.labels, self.templates, self.setting = deployed, labels, templates, setting
        self.topk, self.calibration = topk, calibration
        self._run = deployed.paths.runner(setting, deployed.classes(labels, templates), deployed.scale)

    @property
    def calibrated_on_these(self) -> bool:
        """Whether the model's calibration was made with these labels and templates."""
        calibration = self.deployed.calibration
        return calibration is not None and calibration.prompts == self.deployed.prompts_hash(
            self.labels, self.templates
        )

    def stream(
        self, sources: Iterable[Path | Image.Image], batch_size: int = 64, workers: int | None = None
    ) -> Iterator[Answer]:
        """One answer for each picture, in order. Threads read the pictures, two batches ahead.

        workers: the number of threads; None: one for each core, at most eight.
        The answer for a damaged picture has an error and no label.
        ValueError, at once: batch_size or workers is below 1.
        """
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        decoded = read_ahead(sources, eval_transform(self.deployed.model.preprocess), workers, 2 * batch_size)
        groups = iter(lambda: list(islice(decoded, batch_size)), [])
        return chain.from_iterable(map(self._answers, groups))

    def _answers(self, pictures: Sequence[Picture]) -> Iterator[Answer]:
        pixels = [picture.pixels for picture in pictures if picture.error is None]
        results = iter(self._results(to_batch(pixels, self.deployed.model.preprocess)) if pixels else ())
        for picture in pictures:
            error = picture.error
            yield Answer(picture.name, error=error) if error is not None else Answer(picture.name, **next(results))

    @torch.no_grad()
    def _results(self, images: Tensor) -> Iterator[dict[str, Any]]:
        """images [B,3,S,S] -> what ``Answer`` says of each image."""
        device, dtype = torch.device(self.deployed.device), getattr(torch, self.deployed.dtype)
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            scores, path = self._run(images.to(device))
        best, costs = scores.float().topk(self.topk, dim=-1), self._costs
        for labels, probabilities, index in zip(
            best.indices.tolist(), best.values.tolist(), path.tolist(), strict=True
        ):
            names = [self.labels[label] for label in labels]
            yield {
                "label": names[0],
                "probability": probabilities[0],
                "level": index if self.deployed.setting_name == "threshold" else None,
                "gmacs": None if costs is None else costs[index],
                "top": tuple(zip(names, probabilities, strict=True)),
            }

    @cached_property
    def _costs(self) -> list[float] | None:
        try:
            return self.deployed.costs
        except ValueError:
            return None  # a foreign architecture may have an operation whose cost is not known


def load(
    model: str | Path | None = None,
    weights: str | None = None,
    quick_gelu: bool | None = None,
    text_model: str | None = None,
    device: str | None = None,
    preprocess: str | None = None,
    dtype: str = "float32",
    calibration: str | Path | None = None,
) -> Deployed:
    """Load a model to classify with. The other arguments are those of ``common.models.load_model``.

    model: a model directory, a weights file or an open_clip name; None: the packaged one
        (``common.packaged``), which may know only a few words.
    device: None: a GPU where there is one.
    dtype, calibration: see ``Deployed``.
    ValueError: ``load_model`` refuses the model, it has no text tower, or other arguments come without a model.
    """
    if model is None and (weights, quick_gelu, text_model, preprocess) != (None, None, None, None):
        raise ValueError("--weights, --quick-gelu, --preprocess and --text-model belong to a --model; name one")
    device = chosen_device(device)
    packaged = default_model() if model is None else packaged_model(model)
    loaded = load_model(str(model or packaged.weights), weights, quick_gelu, text_model, preprocess)
    names: Sequence[str] = ()
    if loaded.folder is not None:
        names = read(loaded.folder).class_names
    elif packaged is not None:
        names = packaged.class_names
    return Deployed(loaded, names, loaded.own_templates or PHOTO, device, dtype, calibration)
