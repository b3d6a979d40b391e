"""The three evaluations of a loaded model: zero-shot classification, image-text retrieval, linear probe.

Shapes: B images of a batch, M images in all, T texts, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.lookup import Captioned, Labelled
from common.data.sources import few_shot
from common.evaluate.accuracy import Accuracy, accuracy, wilson_interval
from common.evaluate.class_cache import cached_class_embeddings
from common.evaluate.probe import fit_best
from common.models import Model
from common.progress import bar
from common.retrieval import ranks, recall
from common.zeroshot import Template, embed_prompts

DTYPES = ("float32", "bfloat16", "float16")
FULL = "full"


@dataclass(frozen=True)
class Settings:
    """How to evaluate; nothing here but ``dtype`` and ``limit`` may change a number.

    dtype: of the image tower; below float32 it runs under autocast, everything else stays in float32.
    limit: the first so many pictures of each split; None: all.
    """

    batch_size: int = 256
    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {list(DTYPES)}")
        for name, least in (("batch_size", 1), ("workers", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")


def zero_shot(model: Model, source: Labelled, templates: Sequence[Template], settings: Settings) -> dict[str, Any]:
    """Top-1, top-5 and mean per class (fractions) of a labelled source by its class names in ``templates``."""
    found = accuracy(
        scorer(model, source.class_names, templates, settings),
        _batches(model, source, settings),
        len(source.class_names),
        settings.device,
        progress=True,
    )
    return _accuracies(found)


def scorer(
    model: Model, class_names: Sequence[str], templates: Sequence[Template], settings: Settings
) -> Callable[[Tensor], Tensor]:
    """images [B,3,S,S] -> cosines with every class [B,C]; the class embeddings come from the cache where they are."""
    texts = model.text_encoder().to(settings.device)
    classes = cached_class_embeddings(texts, model.weights["text"], class_names, templates)
    encode = _encoder(model, settings)
    return lambda images: encode(images) @ classes.T


def retrieval(model: Model, source: Captioned, settings: Settings) -> dict[str, Any]:
    """R@1, R@5 and R@10 (fractions) from pictures to texts and back, with Wilson's interval of each R@1.

    ValueError: the loader gives another number of pictures than the source has lists of captions.
    """
    encode = _encoder(model, settings)
    batches = _batches(model, source, settings)
    images = torch.cat([encode(batch["image"]) for batch in bar(batches, f"embedding {source.split}")])
    captions = source.captions[: settings.limit]
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures were read, but {len(captions)} have captions; check the data")
    owner = torch.tensor([i for i, of in enumerate(captions) for _ in of], device=images.device)
    texts = model.text_encoder().to(settings.device)
    embedded = embed_prompts(texts, [caption for of in captions for caption in of], truncate=True)
    of_image, of_text = ranks(images, embedded, owner)
    return {
        "samples": len(images),
        "texts": len(embedded),
        "image_to_text": recall(of_image) | {"interval": _interval(of_image == 1)},
        "text_to_image": recall(of_text) | {"interval": _interval(of_text == 1)},
    }


def linear_probe(
    model: Model,
    source: Labelled,
    training: Mapping[str, Labelled],
    shots: Sequence[int | str],
    seeds: int,
    settings: Settings,
) -> dict[str, Any]:
    """Accuracy (fractions) of logistic regression on unit embeddings, for each of ``shots``.

    training: {"train": source, "val": source}; without "val" every fifth sample of each class of train serves,
        and comes back for the final fit.
    shots: samples of each class, or "full".  seeds: draws of few shots, over which mean and deviation are given.
    """
    train, test = (_features(model, part, settings) for part in (training["train"], source))
    num_classes = len(source.class_names)
    if "val" in training:
        val = _features(model, training["val"], settings)
    else:
        chosen = _every_fifth(train[1])
        train, val = tuple(x[~chosen] for x in train), tuple(x[chosen] for x in train)
    results: dict[str, Any] = {}
    for shot in shots:
        draws = []
        for seed in range(1 if shot == FULL else seeds):
            parts = (train, val) if shot == FULL else _few(train, val, int(shot), seed)
            probe, strength, tried = fit_best(*parts, with_val=shot == FULL)
            batches = [{"image": x, "label": y} for x, y in zip(test[0].split(4096), test[1].split(4096), strict=True)]
            found = accuracy(lambda x, probe=probe: probe.scores(x, num_classes), batches, num_classes, settings.device)
            draws.append(
                _accuracies(found)
                | {"strength": strength, "tried_on_val": {f"{c:.3g}": score for c, score in tried.items()}}
                | {"gradient": probe.gradient, "iterations": probe.iterations}
            )
        results[str(shot)] = _over_draws(draws)
    return {"samples": len(test[1]), "train_samples": len(train[1]), "val_samples": len(val[1]), "shots": results}


def first(batches: Iterable[Mapping[str, Any]], limit: int | None) -> Iterator[dict[str, Any]]:
    """The batches of the first ``limit`` samples, the last one cut (None: all)."""
    left = limit
    for batch in batches:
        if left is None:
            yield dict(batch)
            continue
        yield {key: values[:left] for key, values in batch.items()}
        left -= len(batch["image"])
        if left <= 0:
            return


def _batches(model: Model, source: Labelled | Captioned, settings: Settings) -> Iterable[Mapping[str, Any]]:
    loader = source.loader(model.image_size, settings.batch_size, settings.workers)
    return loader if settings.limit is None else first(loader, settings.limit)


def _encoder(model: Model, settings: Settings) -> Callable[[Tensor], Tensor]:
    """images [B,3,S,S] -> unit embeddings fp32 [B,E] on the settings' device."""
    tower, device = model.images.to(settings.device), torch.device(settings.device)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        lower = settings.dtype != "float32"
        with torch.autocast(device.type, getattr(torch, settings.dtype)) if lower else nullcontext():
            z = tower.encode_image(images.to(device))
        return F.normalize(z.float(), dim=-1)

    return encode


def _features(model: Model, source: Labelled, settings: Settings) -> tuple[Tensor, Tensor]:
    """Unit embeddings [M,E] and labels long [M] of a labelled source."""
    encode = _encoder(model, settings)
    found = [
        (encode(batch["image"]), batch["label"].to(settings.device))
        for batch in bar(_batches(model, source, settings), f"embedding {source.split}")
    ]
    features, labels = map(torch.cat, zip(*found, strict=True))
    return features, labels


def _every_fifth(labels: Tensor) -> Tensor:
    """bool [M]: the fifth, tenth, ... sample of each class."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[4::5]] = True
    if not chosen.any():
        raise ValueError(f"{len(labels)} training samples have no class of five, so none can be set aside for val")
    return chosen


def _few(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], shots: int, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``shots`` training samples and at most four validation samples of each class, as CoOp draws them."""
    labels, counts = train[1].unique(return_counts=True)
    if counts.min() < shots:
        poorest = labels[counts.argmin()].item()
        raise ValueError(f"class {poorest} has {counts.min()} training samples, fewer than {shots} shots")
    places = few_shot(train[1].tolist(), shots, seed), few_shot(val[1].tolist(), min(shots, 4), seed)
    return tuple(tuple(x[rows] for x in part) for part, rows in zip((train, val), places, strict=True))


def _over_draws(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """One draw as it is; several as means, with the deviation of top-1 and each draw's own numbers."""
    if len(draws) == 1:
        return draws[0]
    means = {name: fmean(draw[name] for draw in draws) for name in ("top1", "top5", "mean_per_class")}
    return means | {"deviation": stdev(draw["top1"] for draw in draws), "draws": draws}


def _accuracies(found: Accuracy) -> dict[str, Any]:
    return {
        "samples": len(found.correct),
        "top1": found.top1,
        "top5": found.top5,
        "mean_per_class": found.mean_per_class,
        "interval": list(found.interval),
    }


def _interval(correct: Tensor) -> list[float]:
    return list(wilson_interval(int(correct.sum()), len(correct)))
