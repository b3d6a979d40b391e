"""What the benchmarks of the embedded models share: paths of weights, WaveCLIP and its teacher, batches of scenes.

Shapes: B pictures of a batch, M in all, S picture size, H height, W width.

Thresholds and settings are chosen on ``val``; ``test`` gives the numbers and nothing else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import WEIGHTS
from common.clip import CLIP
from common.data.embedded.module import SPLITS, VIEW, EmbeddedDataModule, prompt, samples, scenes_of
from common.data.transforms import center_view, to_batch
from common.evaluate.accuracy import accuracy, zero_shot
from common.preprocess import Preprocess
from common.zeroshot import embed_prompts
from waveclip import WaveTower

REVISION = 2
"""The scenes of WAVECLIP's and Patch Ranking's tables and figures, the frontier and the packaged model: of shape."""
TEACHER = WEIGHTS / "embedded_clip.safetensors"
"""Revision 1's CLIP, for its reference ladder."""
MODELS = {REVISION: (WEIGHTS / "shapes_clip.safetensors", WEIGHTS / "shapes_waveclip.safetensors")}
"""Teacher and student of one level for 48 px, those of training seed 0, by revision."""
TEACHER_96, STUDENT_96 = WEIGHTS / "shapes_clip_96.safetensors", WEIGHTS / "shapes_waveclip_96.safetensors"
"""Revision 2's for scenes of 96 px; this WaveCLIP has two levels."""
LOGGED = {1: "embedded", 2: "shapes"}
"""The data's name in the log of reads of test, by revision."""
RULES = {
    1: "every emoji of one code point that Twemoji draws and whose CLDR short name has at most 11 characters "
    "(no country flags, keycaps, skin tones or joined sequences), held-out names aside",
    2: "every emoji of one code point in Unicode's groups Food & Drink, Activities, Objects and Symbols that Twemoji "
    "draws and whose CLDR short name has at most 11 characters and no word for a colour, held-out names aside",
}
"""Which names the classification tells apart, by revision."""
FASHION_MNIST_ATTRIBUTION = (
    "Trained on the training pictures of Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017), copyright Zalando "
    "SE, MIT licence."
)
"""The line that weights trained on Fashion-MNIST carry; the embedded data has its own in ``common.data.embedded``."""
PART = 500
"""Images of a smoke run, and of one entry of the stored counts of correct answers."""
_BATCH = 250
_ARCHITECTURES = {1: "common/embedded_clip.json", 2: "common/shapes_clip.json"}


def models(revision: int = REVISION) -> tuple[CLIP, WaveTower]:
    """The committed teacher and student for 48 px. ValueError: no such file (`make retrain` makes them)."""
    for path in MODELS[revision]:
        if not path.is_file():
            raise ValueError(f"no weights at {path}; `make retrain` trains them")
    teacher, student = MODELS[revision]
    return CLIP.load(teacher).eval(), WaveTower.load(student).eval()


def prompts(revision: int = REVISION) -> list[str]:
    """The prompt of each seen name, in the order of the labels."""
    return [prompt(name) for name in scenes_of(revision).class_names("seen")]


def batches(
    split: str, pictures: int | None, image_size: int | None = None, revision: int = REVISION
) -> Iterable[Mapping[str, Any]]:
    """The batches {"image" [B,3,S,S], "label" [B]} of a split in its fixed order.

    pictures: how many of the first ones, a multiple of 250; they are drawn now, and nothing is packed. None: all.
    image_size: at which the scenes are drawn; see EmbeddedDataModule.
    """
    if pictures is None:
        data = EmbeddedDataModule(_ARCHITECTURES[revision], _BATCH, image_size=image_size, revision=revision)
        return data.dataloader(split, train=False)
    return _drawn_batches(split, pictures, image_size or VIEW, revision)


def _drawn_batches(split: str, count: int, view: int, revision: int) -> Iterator[Mapping[str, Any]]:
    shown, labels = first_pictures(split, count, revision, view)
    for start in range(0, count, _BATCH):
        part = slice(start, start + _BATCH)
        yield {"image": to_batch(shown[part], Preprocess(size=view)), "label": labels[part]}


def first_pictures(split: str, count: int, revision: int, view: int = VIEW) -> tuple[list[np.ndarray], Tensor]:
    """The first pictures of a split as evaluation shows them, uint8 [H,W,3] each, and their labels [M]."""
    shown, labels = [], []
    for sample in samples(split, count, view, revision):
        image = Image.open(io.BytesIO(sample["jpg"]))
        shown.append(center_view(image, Random(0), image_size=view, view=view))
        labels.append(json.loads(sample["json"])["label"])
    return shown, torch.tensor(labels)


def right_answers(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], prompts: Sequence[str], by_tokens: bool = True
) -> Tensor:
    """Whether a CLIP names each picture rightly among the prompts of all classes, bool [M].

    loader: batches with "image" and "label".  by_tokens: whether a model that compares tokens (FILIP) does so, or
    compares embeddings as the others do.
    """
    if by_tokens and hasattr(model, "class_scorer"):
        return accuracy(model.class_scorer([[text] for text in prompts]), loader, len(prompts)).correct
    return zero_shot(model, loader, embed_prompts(model, prompts)).correct


def heads_beyond() -> list[str]:
    """The heads of columns of what revision 2's models can do beyond the trained names, each with its chance."""
    names, captions = len(scenes_of(REVISION).class_names("unseen")), SPLITS[REVISION]["retrieval"][0]
    return [
        f"{names} held-out names, chance {100 / names:.1f} %",
        f"own caption among {captions:,}, chance {100 / captions:.2f} %",
    ]
