"""Fashion-MNIST for real: its data and goals; ``benchmarks.together.photos`` trains and measures.

    EFFCLIP_DATA=DIR make reproduce-fashion-mnist

The weights of CLIP and WaveCLIP are committed with the numbers. A smoke run works on stand-in images.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT
from benchmarks.embedded import FASHION_MNIST_ATTRIBUTION
from benchmarks.together import photo_tables, photos
from benchmarks.together.photo_models import PhotoSet
from benchmarks.training.drift import first_losses
from common.data.classification import classification_set
from common.paths import runs_directory

GOALS = 0.85, 0.02
"""An accuracy that the CLIP passes, and a distance from it that WaveCLIP's full level keeps."""


def run(smoke: bool = False) -> dict[str, Any] | None:
    """Train and measure the models; None: ONLY trained a part.

    ValueError: the data is not there, and what to get.
    """
    root = os.environ.get("EFFCLIP_DATA")
    if smoke:
        root = str(stand_in())
    elif root and os.environ.get("DOWNLOAD"):
        classification_set("fashion_mnist", root, download=True)
    return photos.measure(pictures(root, smoke), smoke)


def pictures(root: str | None, smoke: bool = False) -> PhotoSet:
    """Fashion-MNIST below the folder ``root``. smoke: stand-in images, whose models are not committed."""
    return PhotoSet(
        "fashion-mnist",
        "stand-in pictures" if smoke else "Fashion-MNIST",
        "common/fashion_mnist_clip.yaml",
        "waveclip/fashion_mnist.yaml",
        out=runs_directory() / "smoke" if smoke else ROOT / "benchmarks",
        command="make reproduce-fashion-mnist",
        credit=FASHION_MNIST_ATTRIBUTION,
        data={"root": str(Path(root).expanduser().absolute())} if root else {},
        losses=stand_in_losses,
    )


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}, with the goals."""
    return photo_tables.render(result | {"goals": GOALS})


def stand_in(folder: Path | None = None) -> Path:
    """A folder in Fashion-MNIST's format, with as many images: one pattern of noise for each class.

    It serves checks that must run without the data. folder: default ``smoke/fashion-mnist-data`` in $EFFCLIP_RUNS.
    """
    folder = folder or runs_directory() / "smoke" / "fashion-mnist-data"
    folder.mkdir(parents=True, exist_ok=True)
    patterns = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images", patterns[labels]), ("labels", labels)):
            head = struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape)
            file = folder / f"{prefix}-{kind}-idx{values.ndim}-ubyte.gz"
            file.write_bytes(gzip.compress(head + values.tobytes(), 1))
    return folder


def stand_in_losses(recipe: str, folder: Path | None = None) -> list[float]:
    """The losses of a recipe's first steps on the stand-in images, against which later code is checked for drift."""
    return first_losses(recipe, data=pictures(str(stand_in(folder))).module())
