"""ImageNet-1k zero-shot accuracy of Table 2's rows, from released or trained weights.

Shapes: B images, M images in all, C = 1000 classes, E joint dim.

    IMAGENET=DIR WEIGHTS=DIR make reproduce-table2

IMAGENET holds the 50,000 validation images as ``val/<WordNet id>/*.JPEG`` (or is that ``val`` folder). WEIGHTS holds
one state dict for each model, named by it, such as ``clip-vit-b-16.pt``. BASELINES in benchmarks/waveclip/rivals.py
lists the names and the released weights that belong to them; the student, ``waveclip-vit-b-16.safetensors``, serves all
WAVECLIP rows. A row without its file stays "not run".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.waveclip.rivals import BASELINES, SUFFIXES, TEACHER, WAVECLIP, Baseline, weights_file
from common.clip import CLIP
from common.data.classification import ClassificationSet, classification_set
from common.early_exit import exit_at, threshold_for
from common.evaluate.accuracy import wilson_interval, zero_shot
from common.models import OpenClip
from common.zeroshot import class_embeddings, imagenet_names, imagenet_templates, similarity
from waveclip.gating import MarginGate
from waveclip.tower import WaveTower


class _Transformed(Dataset):
    """Labelled images by the transform of a row: {"image": [3,S,S], "label": int}."""

    def __init__(self, images: ClassificationSet, row: Baseline) -> None:
        self.images, self.transform = images, row.transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index]
        return {"image": self.transform(image), "label": label}


def row_accuracies(
    rows: Sequence[dict[str, Any]],
    imagenet: str | Path,
    weights: str | Path,
    templates: Sequence[str] | None = None,
    batch_size: int = 64,
    workers: int = 4,
) -> list[dict[str, Any] | None]:
    """Each row's {"top1" in %, "interval", "images"}, or None where its file is missing.

    rows: with "model" (the stem of a file) and, for WAVECLIP, "refined"; see benchmarks/paper/waveclip.yaml.
    templates: None: CLIP's 80.
    ValueError: ImageNet is not there or incomplete, WEIGHTS has no file at all, a file does not fit, or WAVECLIP lacks
    its teacher.
    """
    folder = Path(weights).expanduser().absolute()
    files = {row["model"]: weights_file(folder, row["model"]) for row in rows}
    if not any(files.values()):
        raise ValueError(
            f"WEIGHTS={folder} has no file for any row; name them {', '.join(files)} with one of {SUFFIXES}"
        )
    templates = imagenet_templates() if templates is None else templates
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = validation_images(imagenet)
    accuracies: dict[tuple[str, float | None], dict[str, Any]] = {}
    for name, file in files.items():
        if file is None:
            continue
        row = BASELINES[TEACHER if name == WAVECLIP else name]
        loader = DataLoader(_Transformed(images, row), batch_size, num_workers=workers, pin_memory=device == "cuda")
        if name == WAVECLIP:
            shares = [row["refined"] for row in rows if row["model"] == name]
            teacher = weights_file(folder, TEACHER)
            if teacher is None:
                raise ValueError(f"{file.name} needs its teacher's text tower: add {TEACHER}.pt to {folder}")
            clip = row.build(teacher).to(device)
            classes = imagenet_classes(clip, templates)
            results = wave_accuracies(WaveTower.load(file), clip, classes, loader, shares, device)
            accuracies |= {(name, share): result for share, result in zip(shares, results, strict=True)}
        else:
            model = row.build(file).to(device)
            result = zero_shot(model, loader, imagenet_classes(model, templates), device, progress=True)
            accuracies[name, None] = _accuracy(result.correct)
    return [accuracies.get((row["model"], row.get("refined"))) for row in rows]


def validation_images(root: str | Path) -> ClassificationSet:
    """ImageNet's validation images. root: the folder that holds ``val``, or that folder. ValueError: not complete."""
    root = Path(root).expanduser().absolute()
    try:
        return classification_set("imagenet", root.parent if root.name == "val" else root)
    except ValueError as error:
        raise ValueError(f"IMAGENET={root}: {error}") from error


def imagenet_classes(model: CLIP | OpenClip, templates: Sequence[str]) -> Tensor:
    """Class embeddings [C,E] of the 1,000 names; our towers read prompts only as far as the longest one."""
    tokenizer, device = partial(model.tokenizer, longest=True), next(model.parameters()).device
    return class_embeddings(model.encode_text, tokenizer, imagenet_names(), templates, device=device)


@torch.no_grad()
def wave_accuracies(
    wave: WaveTower,
    clip: CLIP,
    classes: Tensor,
    loader: DataLoader,
    shares: Sequence[float],
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Accuracy of a one-level WaveCLIP when the given shares of the images go on to the fine level.

    Every image is evaluated once, at both levels. For a share p the round(pM) images of least margin take the fine
    answer, behind a margin gate at the ``threshold`` of the result; no label enters the choice.
    clip: the teacher, for the logit scale.  classes: [C,E].
    ValueError: a student of more wavelet levels.
    """
    if wave.steps != 2:
        raise ValueError(f"this student answers at {wave.steps} steps; the table's rows are of two")
    wave.to(device).eval()
    gate, scale = MarginGate(0.0), clip.logit_scale.exp()
    margins, correct = [], []
    for batch in track(loader, description="evaluating"):
        cosines = torch.stack([similarity(z, classes) for z in wave(batch["image"].to(device))])
        margins.append(gate.confidence((scale * cosines[0]).softmax(-1)).cpu())
        correct.append(cosines.argmax(-1).cpu() == batch["label"])
    margin, right = torch.cat(margins), torch.cat(correct, dim=1)
    results = []
    for share in shares:
        threshold = threshold_for(margin, share)
        answers, exits = exit_at(threshold, margin[None], right)
        results.append(_accuracy(answers) | {"threshold": threshold, "refined": exits[1]})
    return results


def _accuracy(correct: Tensor) -> dict[str, Any]:
    right, total = int(correct.sum()), len(correct)
    low, high = wilson_interval(right, total)
    return {"top1": 100 * right / total, "interval": [100 * low, 100 * high], "images": total}
