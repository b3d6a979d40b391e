"""ImageNet-1k zero-shot accuracy of Table 2's rows, from released or trained weights.

Shapes: B images, M images in all, C = 1000 classes, E joint dim.

    IMAGENET=DIR WEIGHTS=DIR make reproduce-table2

IMAGENET holds the validation pictures as ``val/<WordNet id>/*.JPEG`` (or is that ``val`` folder). WEIGHTS
holds one state dict for each model, named by it, such as ``clip-vit-b-16.pt``. BASELINES in
benchmarks/baselines.py lists the names and the released weights that belong to them; the student,
``waveclip-vit-b-16.safetensors``, serves all WAVECLIP rows. A row without its file stays "not run".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from benchmarks.waveclip.rivals import BASELINES, SUFFIXES, TEACHER, WAVECLIP, MobileCLIP, weights_file
from common.clip import CLIP
from common.evaluate.accuracy import wilson_interval, zero_shot
from common.zeroshot import IMAGENET_NAMES, IMAGENET_TEMPLATES, class_embeddings, similarity
from waveclip.gating import MarginGate
from waveclip.tower import WaveTower


class ImageNetValidation(Dataset):
    """Labelled pictures of a ``val/<WordNet id>/*.JPEG`` tree; a part of the 1,000 classes will do.

    Items: {"image": transformed picture, "label": int in ImageNet's order, "key": path within the tree}.
    ValueError: no such folder, folders that are no WordNet ids of ImageNet-1k, or no pictures.
    """

    def __init__(self, root: str | Path, transform: Callable[..., Tensor]) -> None:
        root = Path(root).expanduser().absolute()
        if not root.is_dir():
            raise ValueError(f"IMAGENET={root} is no folder; it should hold val/<WordNet id>/*.JPEG")
        self.root = root / "val" if (root / "val").is_dir() else root
        self.transform = transform
        labels = {wnid: label for label, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
        folders = sorted(path for path in self.root.iterdir() if path.is_dir())
        unknown = [path.name for path in folders if path.name not in labels]
        if unknown or not folders:
            raise ValueError(
                f"{self.root} has {len(folders)} folders, {len(unknown)} of them no WordNet id of ImageNet "
                f"{unknown[:3]}; sort the validation pictures into val/<WordNet id>/, such as val/n01440764/"
            )
        self.samples = [
            (path, labels[folder.name])
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in IMG_EXTENSIONS
        ]
        if not self.samples:
            raise ValueError(f"the folders of {self.root} hold no pictures {IMG_EXTENSIONS}; unpack them there")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        image = self.transform(default_loader(str(path)))
        return {"image": image, "label": label, "key": str(path.relative_to(self.root))}


def row_accuracies(
    rows: Sequence[dict[str, Any]],
    imagenet: str | Path,
    weights: str | Path,
    templates: Sequence[str] = IMAGENET_TEMPLATES,
    batch_size: int = 64,
    workers: int = 4,
) -> list[dict[str, Any] | None]:
    """Each row's {"top1" in %, "interval", "images"}, or None where its file is missing.

    rows: with "model" (a file's stem) and, for WAVECLIP, "refined"; see benchmarks/paper/waveclip.yaml.
    ValueError: no usable pictures, no file at all, a file that does not fit, WAVECLIP without its teacher.
    """
    folder = Path(weights).expanduser().absolute()
    files = {row["model"]: weights_file(folder, row["model"]) for row in rows}
    if not any(files.values()):
        raise ValueError(
            f"WEIGHTS={folder} has no file for any row; name them {', '.join(files)} with one of {SUFFIXES}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(name: str) -> DataLoader:
        data = ImageNetValidation(imagenet, BASELINES[TEACHER if name == WAVECLIP else name].transform())
        return DataLoader(data, batch_size, num_workers=workers, pin_memory=device == "cuda")

    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    for name, file in files.items():
        if file is None:
            continue
        loader = load(name)
        if name == WAVECLIP:
            shares = [row["refined"] for row in rows if row["model"] == name]
            teacher = weights_file(folder, TEACHER)
            if teacher is None:
                raise ValueError(f"{file.name} needs its teacher's text tower: add {TEACHER}.pt to {folder}")
            clip = BASELINES[TEACHER].build(teacher).to(device)
            classes = imagenet_classes(clip, templates)
            outcomes = wave_accuracies(WaveTower.load(file), clip, classes, loader, shares, device)
            found |= {(name, share): outcome for share, outcome in zip(shares, outcomes, strict=True)}
        else:
            model = BASELINES[name].build(file).to(device)
            result = zero_shot(model, loader, imagenet_classes(model, templates), device, progress=True)
            found[name, None] = _outcome(result.correct)
    return [found.get((row["model"], row.get("refined"))) for row in rows]


def imagenet_classes(model: CLIP | MobileCLIP, templates: Sequence[str]) -> Tensor:
    """Class embeddings [C,E] of the 1,000 names; causal towers read only as far as the longest prompt."""
    tokenizer = partial(model.tokenizer, longest=True) if isinstance(model, CLIP) else model.tokenizer
    return class_embeddings(model.text_tower, tokenizer, IMAGENET_NAMES, templates)


@torch.no_grad()
def wave_accuracies(
    wave: WaveTower,
    clip: CLIP,
    classes: Tensor,
    loader: DataLoader,
    shares: Sequence[float],
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Accuracy of a one-level WaveCLIP when the given shares of the pictures go on to the fine level.

    Every picture is seen once, at both levels; for a share p the round(pM) pictures of least margin take the
    fine answer. That is the margin gate at the threshold given with the result, which is set without labels.
    clip: the teacher, for the logit scale.  classes: [C,E].
    ValueError: a student of more wavelet levels.
    """
    if wave.steps != 2:
        raise ValueError(f"this student answers at {wave.steps} steps; the table's rows are of two")
    wave.to(device).eval()
    gate, scale = MarginGate(0.0), clip.logit_scale.exp()
    margins, correct = [], []
    for batch in track(loader, description="evaluating"):
        guesses = [similarity(z, classes) for z in wave(batch["image"].to(device))]
        margins.append(gate.confidence((scale * guesses[0]).softmax(-1)).cpu())
        correct.append(torch.stack([guess.argmax(-1).cpu() == batch["label"] for guess in guesses], dim=1))
    order = torch.cat(margins).argsort()
    margin, right = torch.cat(margins)[order].tolist(), torch.cat(correct)[order]
    outcomes = []
    for share in shares:
        refined = round(share * len(order))
        answers = torch.cat([right[:refined, 1], right[refined:, 0]])
        # Half-way between the last picture that is refined and the first that is not.
        below, above = [0.0, *margin][refined], [*margin, 1.0][refined]
        outcomes.append(_outcome(answers) | {"threshold": (below + above) / 2, "refined": refined / len(order)})
    return outcomes


def _outcome(correct: Tensor) -> dict[str, Any]:
    right, total = int(correct.sum()), len(correct)
    low, high = wilson_interval(right, total)
    return {"top1": 100 * right / total, "interval": [100 * low, 100 * high], "images": total}
