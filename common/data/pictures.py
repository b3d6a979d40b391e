"""Sets of pictures, and the loader that reads every picture exactly once.

Shapes: B pictures of a batch, S picture size, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.account import Unusable
from common.data.images import open_picture
from common.data.sources import missing_files
from common.data.transforms import Transform, eval_transform, to_batch
from common.preprocess import Preprocess


class PictureSet(Dataset):
    """Pictures in files or in one array.

    pictures: paths, or uint8 [H,W] or [H,W,3].  root: the folder of the keys.
    labels: one a picture, or None.  keys: a picture's path below the root, or ``prefix`` and its number.
    border: pixels at each edge of a file's picture that are cut off.
    ValueError: no pictures, missing files, or a file that is listed twice.
    """

    def __init__(
        self,
        pictures: Sequence[str | np.ndarray],
        root: str | Path,
        labels: list[int] | None = None,
        prefix: str = "",
        border: int = 0,
    ) -> None:
        if not len(pictures):
            raise ValueError(f"no pictures in {root}")
        self.pictures, self.labels, self.border = pictures, labels, border
        # Pictures of an array are known by their content, wherever it lies.
        self.root = str(root) if isinstance(pictures[0], str) else prefix
        if isinstance(pictures[0], str):
            missing = missing_files(pictures)
            if missing:
                raise ValueError(f"{len(missing)} of {len(pictures)} pictures are missing, such as {missing[0]}")
            start = f"{root}/"
            self.keys = [path.removeprefix(start) for path in pictures]
        else:
            self.keys = [f"{prefix}{index:06d}" for index in range(len(pictures))]
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(f"{len(self.keys) - len(set(self.keys))} pictures in {root} are listed more than once")

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> Image.Image:
        """A picture, upright and in RGB. ValueError: its file cannot be decoded."""
        stored = self.pictures[index]
        if not isinstance(stored, str):
            return Image.fromarray(np.asarray(stored)).convert("RGB")
        try:
            image = open_picture(Path(stored))
        except Unusable as error:
            raise ValueError(f"{stored} is no picture that can be read ({error}); replace or remove it") from error
        edge = self.border
        return image.crop((edge, edge, image.width - edge, image.height - edge)) if edge else image

    @property
    def version(self) -> str:
        """A hash that changes with the pictures: of the pixels, or root, size and time of every file, and labels."""
        result = sha256(repr((self.root, self.keys, self.labels)).encode())
        for picture in self.pictures:
            if isinstance(picture, str):
                status = os.stat(picture)
                result.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
            else:
                result.update(np.ascontiguousarray(picture).tobytes())
        return result.hexdigest()[:16]


class _Prepared(Dataset):
    def __init__(self, pictures: PictureSet, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {
            "image": self.transform(self.pictures.picture(index), Random(0)),  # deterministic in evaluation
            "key": self.pictures.keys[index],
        }
        return item if self.pictures.labels is None else item | {"label": self.pictures.labels[index]}


def _collate(items: list[dict[str, Any]], preprocess: Preprocess) -> dict[str, Any]:
    pixels = to_batch([item["image"] for item in items], preprocess)
    batch = {"image": pixels, "key": [item["key"] for item in items]}
    if "label" in items[0]:
        batch["label"] = torch.tensor([item["label"] for item in items])
    return batch


def loader(
    dataset: PictureSet,
    preprocess: Preprocess,
    batch_size: int = 64,
    num_workers: int = 0,
    sampler: Sampler | None = None,
) -> DataLoader:
    """Batches {"image": float [B,3,S,S], "key": list[str]} and "label": long [B] where there are labels.

    The loader reads every picture exactly once, in the order of the data set, prepared as for evaluation.
    num_workers: processes; 0 reads in the calling one.
    sampler: indices of the pictures to read instead.
    """
    return DataLoader(
        _Prepared(dataset, eval_transform(preprocess)),
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(_collate, preprocess=preprocess),
        pin_memory=torch.cuda.is_available(),
    )
