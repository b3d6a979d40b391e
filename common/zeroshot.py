"""Zero-shot classification: prompt templates -> class embeddings -> scores.

Shapes: B images, C classes, P templates, T text tokens, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.article import filled

PHOTO: tuple[str, ...] = ("a photo of a {}.",)
"""The single prompt of quick evaluations."""

Template = str | Callable[[str], str]
"""A prompt with ``{}`` for the class name and optionally ``{a}`` for its article; or a function of the class name."""


def training_prompts(data: Any) -> Sequence[str] | None:
    """One prompt for each class that the training batches of a data module are labelled with; None: they have none.

    data: says them as ``train_class_prompts`` where they are not the ``class_prompts`` of validation.
    """
    return getattr(data, "train_class_prompts", getattr(data, "class_prompts", None))


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 class names of ImageNet as open_clip curates them, in the order of the sorted WordNet ids."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # takes seconds, and few commands are about ImageNet

    return tuple(IMAGENET_CLASSNAMES)


@cache
def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompts for ImageNet, with ``{}`` for the class name."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def fill(template: Template, name: str) -> str:
    """The prompt of one class; see ``common.article.filled``. ValueError: a template without ``{}``."""
    return template(name) if callable(template) else filled(template, name)


@torch.no_grad()
def class_embeddings(
    text_tower: nn.Module | Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[Template] = PHOTO,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Tensor:
    """One unit vector per class, [C,E]: the normalised mean of its prompts' normalised embeddings.

    text_tower: ids [B,T] -> [B,E], normalised or not.  tokenizer: texts -> ids [B,T].
    templates: prompts with ``{}`` for the class name, or functions of it.
    batch_size: prompts in a batch; all prompts of a class are in one batch.
    device: the ids' device; None: that of the tower's parameters.
    ValueError: no names, no templates, or a template without ``{}``.
    """
    if not class_names or not templates:
        raise ValueError(f"{len(class_names)} class names and {len(templates)} templates; give one of each at least")
    if device is None and isinstance(text_tower, nn.Module):
        device = next(text_tower.parameters()).device
    step = max(1, batch_size // len(templates))
    embeddings = []
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        prompts = [fill(template, name) for name in names for template in templates]
        z = F.normalize(text_tower(tokenizer(prompts).to(device)).float(), dim=-1)
        embeddings.append(F.normalize(z.unflatten(0, (len(names), len(templates))).mean(1), dim=-1))
    return torch.cat(embeddings)


def similarity(image_embeddings: Tensor, classes: Tensor) -> Tensor:
    """Cosines [B,C] in fp32 of image embeddings [B,E], normalised here, with unit class embeddings [C,E].

    Autocast does not apply here: in bfloat16 one image of twelve ties between two classes.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):
        return F.normalize(image_embeddings.float(), dim=-1) @ classes.float().to(image_embeddings.device).T


@torch.no_grad()
def embed_prompts(clip: nn.Module, prompts: Sequence[str], batch_size: int = 512, truncate: bool = False) -> Tensor:
    """Normalised embeddings [C,E] of C texts, by the model's ``tokenizer`` and ``encode_text``.

    truncate: cut texts that are too long; otherwise they are a ValueError.
    """
    device = next(clip.parameters()).device
    batches = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
    return torch.cat([clip.encode_text(clip.tokenizer(batch, truncate, longest=True).to(device)) for batch in batches])
