"""The model that a user works with: ``load("DIR").classify(pictures, labels, gmacs=8.0)``.

Shapes: B images of a batch, C classes, E joint dim, P paths of a model, cheapest first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.adaptive import OnePath, Run, path_costs, paths_of
from common.arguments import DTYPES, checked_labels
from common.cascade import cascaded, check_members, load_first
from common.data.files import find_pictures
from common.deploy.calibration import Calibration, calibration_file
from common.deploy.classification import Answer, Classification
from common.directory import CALIBRATION, read
from common.early_exit import NEVER, margin
from common.inference import chosen_device, optimize_for_inference
from common.models import OPEN_CLIP, Model, load_model
from common.packaged import PackagedModel, default_model, packaged_model
from common.preprocess import Preprocess
from common.zeroshot import PHOTO, class_embeddings, fill


class Deployed:
    """A loaded model with its default class names and prompts, and its calibration if there is one.

    device: where it runs.  class_names, templates: the defaults of a call.
    dtype: the image tower's, "float32", "bfloat16" or "float16" (by autocast); cosines stay in float32.
    calibration: the name or .json file of a calibration to follow; see ``calibration_file``.
    first: a model that answers before this one where it is sure (``common.cascade``). Each sees the picture prepared
        for it, and has class embeddings and a scale of its own.
    ValueError: an unknown dtype, no such calibration, or two models that make no cascade.
    """

    def __init__(
        self,
        model: Model,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = PHOTO,
        device: str = "cpu",
        dtype: str = "float32",
        calibration: str | Path | None = None,
        first: Deployed | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of {list(DTYPES)}")
        self.model, self.device, self.dtype, self.first = model, device, dtype, first
        self._named = None if calibration is None else calibration_file(str(calibration))
        if self._named is not None and not self._named.is_file():
            raise ValueError(
                f"no calibration at {self._named}; `effclip calibrate --calibration {calibration}` makes one"
            )
        self.class_names, self.templates = list(class_names), tuple(templates)
        self.paths: OnePath = paths_of(model.images)
        if self._named is not None and self.setting_name is None:
            raise ValueError(f"calibration {calibration}: {model.name} has one cost; leave it out")
        towers = model.images.to(device), model.text_encoder().to(device)
        if model.type != OPEN_CLIP:
            for tower in towers:
                optimize_for_inference(tower)
        if first is not None:
            self._check_costs()

    @property
    def members(self) -> list[Deployed]:
        """The models that see a picture: this one, and in a cascade the first one before it."""
        return [self] if self.first is None else [self.first, self]

    @property
    def preprocesses(self) -> list[Preprocess]:
        """How a picture is prepared for each of ``members``."""
        return [member.model.preprocess for member in self.members]

    @property
    def name(self) -> str:
        """The model's name, or "SMALL then BIG" of a cascade."""
        return " then ".join(member.model.name for member in self.members)

    @property
    def weights(self) -> dict[str, str]:
        """The hashes of the model's weights; those of a cascade's first model are "first/image" and "first/text"."""
        first = {} if self.first is None else self.first.model.weights
        return self.model.weights | {f"first/{side}": value for side, value in first.items()}

    @property
    def setting_name(self) -> str | None:
        """The name of the setting: "threshold" (a model with levels, a cascade), "keep" (keep rates), or None."""
        return self.paths.setting_name if self.first is None else "threshold"

    @cached_property
    def costs(self) -> list[float]:
        """GMACs of the image towers for one picture on every path [P]. ValueError: an operation of unknown cost."""
        if self.first is None:
            return self.paths.costs(self.model.image_size)
        each = [path_costs(member.paths.stages(None), member.model.image_size)[-1].gmacs for member in self.members]
        return list(accumulate(each))

    @property
    def calibration_file(self) -> Path:
        """The calibration's file: the named one, else in the model directory, else stored by the weights' hash."""
        if self._named is not None:
            return self._named
        if self._folder is not None:
            return self._folder / CALIBRATION
        return calibration_file("-".join(self.weights[side] for side in sorted(self.weights)))

    @property
    def _folder(self) -> Path | None:
        """The model directory; a cascade lies in none."""
        return self.model.folder if self.first is None else None

    @property
    def follows_calibration(self) -> bool:
        """Whether a call without a budget uses the calibration: where it was named, or lies in the model directory."""
        return self._named is not None or (self._folder is not None and self.calibration is not None)

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration; None where there is no file. ValueError: it was made for other weights."""
        if not self.calibration_file.is_file():
            return None
        calibration = Calibration.read(self.calibration_file)
        if calibration.weights != self.weights:
            raise ValueError(f"{self.calibration_file} was made for other weights; run `effclip calibrate` again")
        return calibration

    def _check_costs(self) -> None:
        try:
            alone, both = self.costs
        except ValueError:  # of an architecture whose cost is not known
            return
        if 2 * alone > both:
            raise ValueError(
                f"--first: {self.first.model.name} costs {alone:.4g} GMACs a picture, more than {self.model.name} with "
                f"{both - alone:.4g}; name the cheaper one with --first, the other one with --model"
            )

    def setting(self, gmacs: float | None = None, threshold: float | None = None) -> float | None:
        """The setting for a budget or a threshold; without either that of ``follows_calibration``, or the default.

        gmacs: mean budget for a picture.  threshold: returned as it is.
        ValueError: both are given, or the model cannot meet the request.
        """
        if gmacs is not None and threshold is not None:
            raise ValueError(f"gmacs {gmacs:g} and threshold {threshold:g} are two ways to say one thing; give one")
        if threshold is not None:
            if self.setting_name != "threshold":
                raise ValueError(f"threshold {threshold:g}: {self.name} has no levels to stop at; leave it out")
            if not 0 <= threshold <= 1:
                raise ValueError(f"threshold {threshold:g}: confidence lies in [0, 1]; give a number from there")
            return threshold
        if gmacs is not None:
            return self._within(gmacs)
        used = self._used_calibration(gmacs, threshold)
        if used is not None:
            return used.point.setting
        return self.paths.default_setting if self.first is None else NEVER

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
        """Class embeddings [C,E] of this model. ValueError: a label has a word outside the model's vocabulary."""
        texts = self.model.texts
        tokenizer = partial(texts.tokenizer, longest=True)
        try:
            return class_embeddings(texts.encode_text, tokenizer, labels, templates, device=self.device)
        except ValueError as error:  # of a cascade's two vocabularies, say whose
            raise ValueError(f"{self.model.name}: {error}") from error

    def classes_of_all(self, labels: Sequence[str], templates: Sequence[str]) -> list[Tensor]:
        """Class embeddings [C,E] of each of ``members``."""
        return [member.classes(labels, templates) for member in self.members]

    @property
    def scale(self) -> Tensor:
        """The multiplier of this model's cosines."""
        return self.model.texts.logit_scale.detach().exp()

    def runner(self, setting: float | None, classes: Sequence[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Classification at a setting: see ``Run``, with images [B,3,S,S] for each of ``members``.

        classes: class embeddings [C,E] of each of ``members``.
        """
        if self.first is None:
            return self.paths.runner(setting, *classes, self.scale)
        return cascaded(*self._alone(classes), NEVER if setting is None else setting)

    def observer(self, classes: Sequence[Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """``OnePath.probabilities_of_all_paths`` as a function of images [B,3,S,S] for each of ``members``.

        classes: class embeddings [C,E] of each of ``members``.
        """
        if self.first is None:
            return partial(self.paths.probabilities_of_all_paths, classes=classes[0], scale=self.scale)
        runs = self._alone(classes)

        def observe(*images: Tensor) -> tuple[Tensor, Tensor]:
            scores = torch.stack([run(x)[0] for run, x in zip(runs, images, strict=True)])
            return scores, margin(scores[0])[None]

        return observe

    def _alone(self, classes: Sequence[Tensor]) -> list[Run]:
        """Each member of a cascade by its default path."""
        return [m.paths.runner(None, own, m.scale) for m, own in zip(self.members, classes, strict=True)]

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
        ValueError: no labels, a word outside the vocabulary, a request that the model cannot meet, or a cascade
            without one.
        """
        if labels is None and not self.class_names:
            raise ValueError(f"{self.name} has no class names of its own; give labels")
        labels = self.class_names if labels is None else checked_labels(labels)
        if isinstance(templates, str):
            raise ValueError(f"templates {templates!r} are one text; give a list of prompts")
        templates = self.templates if templates is None else tuple(templates)
        if topk < 1:
            raise ValueError(f"topk {topk} must be at least 1")
        setting, used = self.setting(gmacs, threshold), self._used_calibration(gmacs, threshold)
        if self.first is not None and (gmacs, threshold, used) == (None, None, None):
            raise ValueError(
                f"{self.name}: give a threshold, gmacs or a calibration, which say when the first model's answer stands"
            )
        classification = Classification(self, labels, templates, setting, min(topk, len(labels)), used)
        if used is not None and self.setting_name == "threshold" and not classification.calibrated_on_these:
            warnings.warn(
                "the calibration was made with other labels or prompts, so the mean cost may differ from what it says",
                stacklevel=2,
            )
        return classification


def load(
    model: str | Path | None = None,
    weights: str | None = None,
    quick_gelu: bool | None = None,
    text_model: str | None = None,
    device: str | None = None,
    preprocess: str | None = None,
    dtype: str = "float32",
    calibration: str | Path | None = None,
    first: str | Path | None = None,
) -> Deployed:
    """Load a model to classify with. The other arguments are those of ``common.models.load_model``.

    model: a model directory, a weights file or an open_clip name; None: the packaged one
        (``common.packaged``), which may know only a few words.
    device: None: a GPU where there is one.
    dtype, calibration: see ``Deployed``.
    first: a smaller model, which makes a cascade of both; see ``Deployed``.
    ValueError: ``load_model`` refuses a model, it has no text tower, other arguments come without a model, or two
        models make no cascade.
    """
    if model is None and any(value is not None for value in (weights, quick_gelu, text_model, preprocess, first)):
        raise ValueError(
            "--first, --weights, --quick-gelu, --preprocess and --text-model belong to a --model; name one"
        )
    device = chosen_device(device)
    packaged = default_model() if model is None else packaged_model(model)
    loaded = load_model(str(model or packaged.weights), weights, quick_gelu, text_model, preprocess)
    names = _class_names(loaded, packaged)
    if first is None:
        return Deployed(loaded, names, _templates(loaded), device, dtype, calibration)
    front = load_first(str(first))
    check_members(front, loaded)  # before a missing text tower is said of --model
    names, templates = names or _class_names(front, packaged_model(first)), _templates(loaded, front)
    return Deployed(
        loaded, names, templates, device, dtype, calibration, Deployed(front, names, templates, device, dtype)
    )


def _class_names(model: Model, packaged: PackagedModel | None) -> Sequence[str]:
    if model.folder is not None:
        return read(model.folder).class_names
    return () if packaged is None else packaged.class_names


def _templates(*models: Model) -> Sequence[str]:
    """Those that a model's texts were tuned for, else those of the data that one was trained on, else PHOTO.

    ValueError: texts of two models were tuned for different ones.
    """
    tuned = {model.templates for model in models if model.templates}
    if len(tuned) > 1:
        names = " and ".join(model.name for model in models)
        raise ValueError(f"--first: the texts of {names} were tuned for different templates, so no prompt suits both")
    return next((own for own in (*tuned, *(model.own_templates for model in models)) if own), PHOTO)
