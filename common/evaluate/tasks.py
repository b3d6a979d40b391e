"""Three evaluations of a loaded model: zero-shot classification, image-text retrieval, linear probe.

Shapes: B images of a batch, M images in all, T texts, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.adaptive import Run, paths_of
from common.arguments import DTYPES
from common.cascade import Cascade, cascaded
from common.data.lookup import Captioned, Labelled
from common.data.sources import few_shot
from common.evaluate.accuracy import Accuracy, accuracy, wilson_interval
from common.evaluate.class_cache import cached_class_embeddings
from common.evaluate.probe import fit_best
from common.inference import optimize_for_inference
from common.models import OPEN_CLIP, Model
from common.preprocess import Preprocess
from common.progress import bar
from common.retrieval import ranks, recall
from common.zeroshot import Template, embed_prompts, fill

Feature = Literal["embedding", "penultimate"]
"""What a linear probe reads: joint embeddings, or the class token before projection, as CLIP and SLIP do."""
Features = tuple[Tensor, Tensor]
"""Unit features [M,E] and labels long [M] of labelled pictures."""
FULL = "full"


@dataclass(frozen=True)
class Settings:
    """How to evaluate. Only ``dtype``, ``limit`` and ``threshold`` may change the results.

    dtype: the image tower's; below float32 the tower runs under autocast, and everything else stays in float32.
    limit: evaluate only so many images of each split, see ``Labelled.drawn``; None: all.
    threshold: of early exit, for zero-shot classification by a model with levels; None: all levels.
    """

    batch_size: int = 256
    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    limit: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {list(DTYPES)}")
        for name, least in (("batch_size", 1), ("workers", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")


def zero_shot(model: Model, source: Labelled, templates: Sequence[Template], settings: Settings) -> dict[str, Any]:
    """Zero-shot top-1, top-5 and mean-per-class accuracy (fractions), with class names filled into ``templates``.

    Behind a threshold, "exits" are the shares of the images that stop at each level.
    """
    run = runner(model, source.class_names, templates, settings)
    classes = len(source.class_names)
    result, exits = observed(run, bar(pictures_of(model, source, settings), "evaluating"), classes, settings.device)
    return accuracies(result) | ({} if settings.threshold is None else {"exits": exits})


def observed(
    run: Run, loader: Iterable[Mapping[str, Any]], num_classes: int, device: str
) -> tuple[Accuracy, list[float]]:
    """The accuracy of a ``runner`` on batches, and the share of the images that took each path."""
    taken: list[Tensor] = []

    def scores(images: Tensor) -> Tensor:
        result, path = run(images)
        taken.append(path.cpu())
        return result

    result = accuracy(scores, loader, num_classes, device)
    return result, (torch.cat(taken).bincount() / len(result.correct)).tolist()


def runner(model: Model, class_names: Sequence[str], templates: Sequence[Template], settings: Settings) -> Run:
    """The function images [B,3,S,S] -> scores of every class [B,C], and the path that gave them, long [B].

    There is one path, or one for each level or member of a cascade where the settings have a threshold.
    ValueError: a threshold for a model without levels.
    """
    if settings.threshold is None:
        scores = scorer(model, class_names, templates, settings)
        return lambda images: (scores(images), torch.zeros(len(images), dtype=torch.long))
    if isinstance(model.images, Cascade):
        return _cascaded(model.images, class_names, templates, settings)
    paths = paths_of(model.images.to(settings.device))
    if paths.setting_name != "threshold":
        raise ValueError(f"threshold {settings.threshold:g}: {model.name} has no levels to stop at; leave it out")
    if model.type != OPEN_CLIP:
        optimize_for_inference(model.images)
    classes = classes_of(model, class_names, templates, settings)
    run = paths.runner(settings.threshold, classes, model.texts.logit_scale.detach().exp())

    @torch.no_grad()
    def run_levels(images: Tensor) -> tuple[Tensor, Tensor]:
        with _precision(settings):
            return run(images.to(settings.device))

    return run_levels


def _cascaded(cascade: Cascade, class_names: Sequence[str], templates: Sequence[Template], settings: Settings) -> Run:
    """The first model's probabilities, and the second's for the images where the first's margin is too small."""

    def alone(member: Model) -> Run:
        scores = scorer(member, class_names, templates, settings)
        scale = member.text_encoder().logit_scale.detach().exp()
        return lambda images: ((scale * scores(images)).softmax(-1), torch.zeros(len(images), dtype=torch.long))

    answers = cascaded(*map(alone, cascade.members), settings.threshold)
    resized = cascade.resized.to(settings.device)

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(settings.device)
        return answers(resized(images), images)

    return run


def scorer(
    model: Model, class_names: Sequence[str], templates: Sequence[Template], settings: Settings
) -> Callable[[Tensor], Tensor]:
    """The function images [B,3,S,S] -> cosines with every class [B,C]; class embeddings are cached on disk.

    A model that scores by more than one embedding has ``class_scorer``, which gives this function for its prompts.
    """
    if hasattr(model.images, "class_scorer"):
        scores = model.images.to(settings.device).class_scorer(
            [[fill(template, name) for template in templates] for name in class_names]
        )

        def precise(images: Tensor) -> Tensor:
            with _precision(settings):
                return scores(images).float()

        return precise
    classes = classes_of(model, class_names, templates, settings)
    encode = encoder(model, settings)
    return lambda images: encode(images) @ classes.T


def classes_of(model: Model, class_names: Sequence[str], templates: Sequence[Template], settings: Settings) -> Tensor:
    """The class embeddings [C,E] of a model on the settings' device, cached on disk. ValueError: no text tower."""
    texts = model.text_encoder().to(settings.device)
    return cached_class_embeddings(texts, model.weights["text"], class_names, templates)


def retrieval(model: Model, source: Captioned, settings: Settings) -> dict[str, Any]:
    """R@1, R@5 and R@10 (fractions) from images to texts and back, with Wilson's interval of each R@1.

    ValueError: the loader's number of images differs from the source's number of caption lists.
    """
    encode = encoder(model, settings)
    batches = pictures_of(model, source, settings)
    images = torch.cat([encode(batch["image"]) for batch in bar(batches, f"embedding {source.split}")])
    captions = source.captions[: settings.limit]
    return retrieved(images, captions, embedded_captions(model, captions, settings))[0]


def embedded_captions(model: Model, captions: Sequence[Sequence[str]], settings: Settings) -> Tensor:
    """Embeddings [T,E] of all captions, one picture's after another's."""
    texts = [caption for of_picture in captions for caption in of_picture]
    return embed_prompts(model.text_encoder().to(settings.device), texts, truncate=True)


def retrieved(images: Tensor, captions: Sequence[Sequence[str]], texts: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The metrics of ``retrieval``, and whether each image's best text is one of its own: bool [M].

    images: [M,E].  captions: M lists.  texts: [T,E], their embeddings.  ValueError: other than M lists.
    """
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures were read, but {len(captions)} have captions; check the data")
    owner = torch.tensor([i for i, of_picture in enumerate(captions) for _ in of_picture], device=images.device)
    image_ranks, text_ranks = ranks(images, texts, owner)
    metrics = {
        "samples": len(images),
        "texts": len(texts),
        "image_to_text": recall(image_ranks) | {"interval": _interval(image_ranks == 1)},
        "text_to_image": recall(text_ranks) | {"interval": _interval(text_ranks == 1)},
    }
    return metrics, (image_ranks == 1).cpu()


def linear_probe(
    model: Model,
    source: Labelled,
    training: Mapping[str, Labelled],
    shots: Sequence[int | str],
    seeds: int,
    settings: Settings,
    features: Feature = "embedding",
) -> dict[str, Any]:
    """Accuracy (fractions) of logistic regression on features of length 1, for each of ``shots``.

    training: {"train": source, "val": source}. Without "val", every fifth training sample of each class is held out
        to choose the penalty; the final fit on the full set includes it again.
    shots: training samples per class, or "full".
    seeds: random draws per number of shots; results are their mean and standard deviation.
    ValueError: penultimate features of a model that has none.
    """
    encode = encoder(model, settings, features)

    def embedded(data: Labelled) -> Features:
        return embedded_pictures(encode, bar(pictures_of(model, data, settings), f"embedding {data.split}"), settings)

    test, num_classes = embedded(source), len(source.class_names)
    val = embedded(training["val"]) if "val" in training else None
    train, val = train_and_val(embedded(training["train"]), val)
    results: dict[str, Any] = {}
    for shot in shots:
        draws = []
        for seed in range(1 if shot == FULL else seeds):
            parts = (train, val) if shot == FULL else _few(train, val, int(shot), seed)
            result, solution = probed(*parts, test, num_classes, settings, with_val=shot == FULL)
            draws.append(accuracies(result) | solution)
        results[str(shot)] = _over_draws(draws)
    return {"samples": len(test[1]), "train_samples": len(train[1]), "val_samples": len(val[1]), "shots": results}


def probed(
    train: Features, val: Features, test: Features, num_classes: int, settings: Settings, with_val: bool = True
) -> tuple[Accuracy, dict[str, Any]]:
    """The accuracy on ``test`` of the best probe, see ``fit_best``; and its penalty and how the solver ended."""
    probe, strength, tried = fit_best(train, val, with_val)
    batches = [{"image": x, "label": y} for x, y in zip(test[0].split(4096), test[1].split(4096), strict=True)]
    result = accuracy(partial(probe.scores, num_classes=num_classes), batches, num_classes, settings.device)
    return result, {
        "strength": strength,
        "tried_on_val": {f"{c:.3g}": score for c, score in tried.items()},
        "gradient": probe.gradient,
        "iterations": probe.iterations,
    }


def train_and_val(train: Features, val: Features | None) -> tuple[Features, Features]:
    """What a probe learns from, and what its penalty is chosen on; without val every fifth sample of each class."""
    if val is not None:
        return train, val
    chosen = _every_fifth(train[1])
    return (train[0][~chosen], train[1][~chosen]), (train[0][chosen], train[1][chosen])


def first(batches: Iterable[Mapping[str, Any]], limit: int | None) -> Iterator[dict[str, Any]]:
    """The batches of the first ``limit`` samples (None: all); the last batch is cut to fit."""
    left = limit
    for batch in batches:
        if left is None:
            yield dict(batch)
            continue
        yield {key: values[:left] for key, values in batch.items()}
        left -= len(batch["image"])
        if left <= 0:
            return


def pictures_of(model: Model, source: Labelled | Captioned, settings: Settings) -> Iterable[Mapping[str, Any]]:
    """The images of a split, prepared for a model, up to the settings' limit."""
    return _read(source, model.preprocess, settings)


def _read(source: Labelled | Captioned, preprocess: Preprocess, settings: Settings) -> Iterable[Mapping[str, Any]]:
    places = source.drawn(settings.limit) if isinstance(source, Labelled) else None
    options = {} if places is None else {"sampler": places}
    loader = source.loader(preprocess, settings.batch_size, settings.workers, **options)
    return loader if settings.limit is None else first(loader, settings.limit)


def pictures_of_each(
    preprocesses: Sequence[Preprocess], source: Labelled, settings: Settings
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Images [B,3,S,S] prepared in each of several ways, and their labels [B], up to the settings' limit."""
    ways = list(dict.fromkeys(preprocesses))  # each is read once
    for batches in zip(*(_read(source, how, settings) for how in ways), strict=True):
        assert all(batch["key"] == batches[0]["key"] for batch in batches), "loaders of one split differ in their order"
        images = dict(zip(ways, (batch["image"] for batch in batches), strict=True))
        yield [images[how] for how in preprocesses], batches[0]["label"]


def encoder(model: Model, settings: Settings, features: Feature = "embedding") -> Callable[[Tensor], Tensor]:
    """The function images [B,3,S,S] -> unit features fp32 [B,E] on the settings' device."""
    tower, device = model.images.to(settings.device), torch.device(settings.device)
    if model.type != OPEN_CLIP:
        optimize_for_inference(tower)
    check_features(model, features)
    compute = tower.encode_image if features == "embedding" else tower.penultimate

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with _precision(settings):
            z = compute(images.to(device))
        return F.normalize(z.float(), dim=-1)

    return encode


def check_features(model: Model, features: Feature) -> None:
    """ValueError: penultimate features of a model that has none."""
    if features == "penultimate" and not hasattr(model.images, "penultimate"):
        raise ValueError(
            f"{model.name} (type {model.type}) gives embeddings alone, not what is before its projection; probe those "
            "with --features embedding"
        )


def _precision(settings: Settings) -> AbstractContextManager:
    """The context in which an image tower computes in the settings' dtype."""
    if settings.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, getattr(torch, settings.dtype))


def embedded_pictures(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Any]], settings: Settings
) -> Features:
    """The features of labelled batches."""
    parts = [(encode(batch["image"]), batch["label"].to(settings.device)) for batch in batches]
    features, labels = map(torch.cat, zip(*parts, strict=True))
    return features, labels


def _every_fifth(labels: Tensor) -> Tensor:
    """bool [M]: the fifth, tenth, ... sample of each class."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[4::5]] = True
    if not chosen.any():
        raise ValueError(
            f"no class has five of the {len(labels)} training samples, so none can be set aside for val; give more "
            "samples or a val split"
        )
    return chosen


def _few(train: Features, val: Features, shots: int, seed: int) -> tuple[Features, Features]:
    """``shots`` training samples and at most four validation samples of each class, as CoOp draws them."""
    labels, counts = train[1].unique(return_counts=True)
    if counts.min() < shots:
        poorest = labels[counts.argmin()].item()
        raise ValueError(f"class {poorest} has {counts.min()} training samples, fewer than {shots} shots")
    places = few_shot(train[1].tolist(), shots, seed), few_shot(val[1].tolist(), min(shots, 4), seed)
    return tuple(tuple(x[rows] for x in part) for part, rows in zip((train, val), places, strict=True))


def _over_draws(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """A single draw unchanged; several as means, with top-1's standard deviation and the draws' results."""
    if len(draws) == 1:
        return draws[0]
    means = {name: fmean(draw[name] for draw in draws) for name in ("top1", "top5", "mean_per_class")}
    return means | {"deviation": stdev(draw["top1"] for draw in draws), "draws": draws}


def accuracies(result: Accuracy) -> dict[str, Any]:
    """An accuracy as plain values: fractions, and the Wilson interval of top-1."""
    return {
        "samples": len(result.correct),
        "top1": result.top1,
        "top5": result.top5,
        "mean_per_class": result.mean_per_class,
        "interval": list(result.interval),
    }


def _interval(correct: Tensor) -> list[float]:
    return list(wilson_interval(int(correct.sum()), len(correct)))
