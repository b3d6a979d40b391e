"""What the benchmarks of the embedded models share: paths of weights, WaveCLIP and its teacher, batches of scenes.

Thresholds and settings are chosen on ``val``; ``test`` gives the numbers and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from benchmarks import WEIGHTS
from common.clip import CLIP
from common.data.embedded.module import EmbeddedDataModule
from common.evaluate.accuracy import accuracy, zero_shot
from common.zeroshot import embed_prompts
from waveclip import WaveTower

TEACHER, STUDENT = WEIGHTS / "embedded_clip.safetensors", WEIGHTS / "embedded_waveclip.safetensors"
"""The CLIP for scenes of 48 px, and the WaveCLIP of one level that was distilled from it."""
TEACHER_96, STUDENT_96 = WEIGHTS / "embedded_clip_96.safetensors", WEIGHTS / "embedded_waveclip_96.safetensors"
"""The same for scenes of 96 px; this WaveCLIP has two levels."""
GUIDE = WEIGHTS / "embedded_guide.safetensors"
"""The Guide of MLIP's embedded models."""
RULE = (
    "every emoji of one code point that Twemoji draws and whose CLDR short name has at most 11 characters "
    "(no country flags, keycaps, skin tones or joined sequences), held-out names aside"
)
"""Which names the embedded classification tells apart."""
FASHION_MNIST_ATTRIBUTION = (
    "Trained on the training pictures of Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017), copyright Zalando "
    "SE, MIT licence."
)
"""The line that weights trained on Fashion-MNIST carry; the embedded data has its own in ``common.data.embedded``."""
PART = 500
"""Images of a smoke run, and of one entry of the stored counts of correct answers."""
_BATCH = 250


def models() -> tuple[CLIP, WaveTower]:
    """The committed teacher and student for 48 px. ValueError: no such file (`make retrain` makes them)."""
    for path in (TEACHER, STUDENT):
        if not path.is_file():
            raise ValueError(f"no weights at {path}; `make retrain` trains them")
    return CLIP.load(TEACHER).eval(), WaveTower.load(STUDENT).eval()


def batches(split: str, pictures: int | None, image_size: int | None = None) -> Iterable[Mapping[str, Any]]:
    """The batches of a split in its fixed order.

    pictures: how many of the first images, a multiple of 250; None: all.
    image_size: at which the scenes are drawn; see EmbeddedDataModule.
    """
    loader = EmbeddedDataModule(batch_size=_BATCH, image_size=image_size).dataloader(split, train=False)
    return loader if pictures is None else islice(loader, pictures // _BATCH)


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
