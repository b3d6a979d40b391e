"""A model as its user sees it: ``load("DIR").classify(pictures, labels, gmacs=8.0)``.

Shapes: B images of a batch, C classes, E joint dim, P paths of a model, cheapest first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.arguments import checked_labels
from common.data.embedded.module import TEMPLATES, class_names
from common.data.files import Picture, find_pictures, read_ahead
from common.data.transforms import eval_transform, to_batch
from common.deploy.calibration import Calibration
from common.deploy.early_exit import NEVER
from common.deploy.paths import OnePath, adaptive
from common.directory import CALIBRATION, read
from common.models import EMBEDDED, Model, is_embedded, load_model
from common.paths import runs_directory
from common.zeroshot import PHOTO, class_embeddings, fill


@dataclass(frozen=True)
class Answer:
    """What the model says of one picture.

    picture: its path, or its number.  label and probability: the likeliest class.  level: where the model stopped,
    for one that has levels.  gmacs: what it cost in the image tower; None where no count is known.
    error: why there is no label.
    """

    picture: str
    label: str | None = None
    probability: float | None = None
    level: int | None = None
    gmacs: float | None = None
    error: str | None = None


class Deployed:
    """A loaded model with its own class names and prompts, and what was calibrated for it.

    device: where it runs.  class_names, templates: used where a call names none.
    """

    def __init__(
        self, model: Model, class_names: Sequence[str] = (), templates: Sequence[str] = PHOTO, device: str = "cpu"
    ) -> None:
        self.model, self.device = model, device
        self.class_names, self.templates = list(class_names), tuple(templates)
        self.paths: OnePath = adaptive(model.images.to(device))
        model.text_encoder().to(device)

    @property
    def knob(self) -> str | None:
        """What can be set: "threshold" (of a model with levels), "keep" (a keep rate) or None."""
        return self.paths.knob

    @cached_property
    def costs(self) -> list[float]:
        """GMACs of the image tower for one picture on every path [P]. ValueError: an uncounted operation."""
        return self.paths.costs(self.model.image_size)

    @property
    def calibration_file(self) -> Path:
        """Where the calibration is kept: in the model directory, or, for other models, in $EFFCLIP_RUNS."""
        if self.model.folder is not None:
            return self.model.folder / CALIBRATION
        name = "-".join(self.model.weights[side] for side in ("image", "text"))
        return runs_directory() / "calibrations" / f"{name}.json"

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration, if there is one. ValueError: it was made for other weights."""
        if not self.calibration_file.is_file():
            return None
        found = Calibration.read(self.calibration_file)
        if found.weights != self.model.weights:
            raise ValueError(f"{self.calibration_file} was made for other weights; run `effclip calibrate` again")
        return found

    def setting(self, gmacs: float | None = None, threshold: float | None = None) -> float | None:
        """The setting that a call asks for; without a wish the calibrated one, else the model's own.

        gmacs: mean budget for a picture.  threshold: itself.
        ValueError: both, or a wish that this model cannot meet, with what to do.
        """
        if gmacs is not None and threshold is not None:
            raise ValueError(f"gmacs {gmacs:g} and threshold {threshold:g} are two ways to say one thing; give one")
        if threshold is not None:
            if self.knob != "threshold":
                raise ValueError(f"threshold {threshold:g}: {self.model.name} has no levels to stop at; leave it out")
            return threshold
        if gmacs is not None:
            return self._within(gmacs)
        return self.calibration.point.setting if self.knob and self.calibration else self.paths.own

    def _within(self, gmacs: float) -> float | None:
        least = min(self.costs)
        if gmacs < least:
            raise ValueError(f"gmacs {gmacs:g}: a picture costs {least:.4g} GMACs at least; give that or more")
        if self.knob == "keep":
            return max(rate for rate, cost in zip(self.paths.rates, self.costs, strict=True) if cost <= gmacs)
        if gmacs >= self.costs[-1]:
            return None if self.knob is None else NEVER
        if self.calibration is None:
            raise ValueError(
                f"gmacs {gmacs:g}: no threshold is known for a budget, since nothing was calibrated; run `effclip "
                f"calibrate --data NAME --gmacs {gmacs:g}` with this model, or give a threshold"
            )
        return self.calibration.within(gmacs)

    def prompts_hash(self, labels: Sequence[str], templates: Sequence[str]) -> str:
        """16 hex digits that name the prompts of a classification, in whatever order its labels stand."""
        texts = sorted("\t".join(fill(template, label) for template in templates) for label in labels)
        return sha256("\n".join(texts).encode()).hexdigest()[:16]

    def classes(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings [C,E]. ValueError: a label that the model's vocabulary cannot spell."""
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
        batch_size: int = 64,
        workers: int | None = None,
    ) -> list[Answer]:
        """One answer a picture, in order; see ``stream``."""
        if isinstance(pictures, str | Path | Image.Image):
            pictures = [pictures]
        parts = list(pictures)
        sources = (
            source for part in parts for source in ([part] if isinstance(part, Image.Image) else find_pictures([part]))
        )
        asked = self.ask(labels, gmacs=gmacs, threshold=threshold, templates=templates)
        return list(asked.stream(sources, batch_size, workers))

    def ask(
        self,
        labels: Sequence[str] | None = None,
        *,
        gmacs: float | None = None,
        threshold: float | None = None,
        templates: Sequence[str] | None = None,
    ) -> Question:
        """A classification ready to run, its class embeddings computed and its setting chosen.

        labels: class names; None: the model's own.  templates: prompts with {}; None: the model's own.
        gmacs, threshold: see ``setting``.
        ValueError: no labels, an unknown word in them, a wish that cannot be met.
        """
        if labels is None and not self.class_names:
            raise ValueError(f"{self.model.name} has no class names of its own; give labels")
        labels = self.class_names if labels is None else checked_labels(list(labels))
        templates = self.templates if templates is None else tuple(templates)
        question = Question(self, labels, templates, self.setting(gmacs, threshold))
        if threshold is None and self.knob == "threshold" and self.calibration and not question.calibrated_on_these:
            warnings.warn(
                "the calibration was made with other labels or prompts, so the mean cost may differ from what it says",
                stacklevel=2,
            )
        return question


class Question:
    """Which of these labels fits a picture, at a chosen setting; made by ``Deployed.ask``."""

    def __init__(
        self, deployed: Deployed, labels: Sequence[str], templates: Sequence[str], setting: float | None
    ) -> None:
        self.deployed, self.labels, self.templates, self.setting = deployed, labels, templates, setting
        self._run = deployed.paths.at(setting, deployed.classes(labels, templates), deployed.scale)

    @property
    def calibrated_on_these(self) -> bool:
        """Whether the model's calibration was made with these labels and templates."""
        found = self.deployed.calibration
        return found is not None and found.prompts == self.deployed.prompts_hash(self.labels, self.templates)

    def stream(
        self, sources: Iterable[Path | Image.Image], batch_size: int = 64, workers: int | None = None
    ) -> Iterator[Answer]:
        """One answer a picture, in order; the pictures are read by threads, a few batches ahead and no more.

        workers: threads; None: one a core, at most eight. A damaged picture's answer has an error and no label.
        ValueError, at once: batch_size or workers below 1.
        """
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        decoded = read_ahead(sources, eval_transform(self.deployed.model.image_size), workers, 2 * batch_size)
        groups = iter(lambda: list(islice(decoded, batch_size)), [])
        return chain.from_iterable(map(self._answers, groups))

    def _answers(self, pictures: Sequence[Picture]) -> Iterator[Answer]:
        sound = [picture for picture in pictures if picture.error is None]
        found = iter(self._of(to_batch([picture.pixels for picture in sound])) if sound else ())
        for picture in pictures:
            error = picture.error
            yield Answer(picture.name, error=error) if error is not None else Answer(picture.name, *next(found))

    @torch.no_grad()
    def _of(self, images: Tensor) -> list[tuple[str, float, int | None, float | None]]:
        """label, probability, level and GMACs of images [B,3,S,S]."""
        scores, path = self._run(images.to(self.deployed.device))
        best, leveled = scores.max(-1), self.deployed.knob == "threshold"
        costs = self._costs
        return [
            (self.labels[label], probability, place if leveled else None, None if costs is None else costs[place])
            for label, probability, place in zip(
                best.indices.tolist(), best.values.tolist(), path.tolist(), strict=True
            )
        ]

    @cached_property
    def _costs(self) -> list[float] | None:
        try:
            return self.deployed.costs
        except ValueError:
            return None  # an architecture of others, with an operation whose cost nobody stated


def load(
    model: str | Path | None = None,
    weights: str | None = None,
    quick_gelu: bool | None = None,
    text_model: str | None = None,
    device: str | None = None,
) -> Deployed:
    """A model to classify with; see ``common.models.load_model`` for the arguments.

    model: a model directory, a weights file or an open_clip name; None: the embedded WaveCLIP, which knows the
        words of its small benchmark and no others.
    device: None: a GPU where there is one.
    ValueError: what ``load_model`` refuses, no text tower, or other arguments without a model.
    """
    if model is None and (weights, quick_gelu, text_model) != (None, None, None):
        raise ValueError("--weights, --quick-gelu and --text-model belong to a --model; name one")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = load_model(str(model or EMBEDDED), weights, quick_gelu, text_model)
    if found.folder is not None:
        described = read(found.folder)
        return Deployed(found, described.class_names, described.templates or PHOTO, device)
    if is_embedded(model or EMBEDDED):
        return Deployed(found, class_names("seen"), TEMPLATES, device)
    return Deployed(found, device=device)


def about_embedded() -> str:
    """One line on what the default model is."""
    return (
        f"the embedded WaveCLIP (benchmarks/weights, 48 px): it knows {len(class_names('seen')):,} emoji by name and "
        "nothing else, and refuses words outside of its vocabulary; --model names another"
    )
