"""A classification set of the catalogue as image-text pairs, for training: each picture with a prompt of its class.

Shapes: B pairs, T text tokens, S image size, M pictures of the training part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from random import Random
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from common.clip import load_architecture
from common.data import catalogue
from common.data.classification import ClassificationSet, classification_set
from common.data.pictures import loader
from common.data.reader import caption_id, collate
from common.data.shards import position
from common.data.transforms import train_transform
from common.tokenizer import Tokenizer
from common.zeroshot import fill


class Pairs(Dataset):
    """Pictures in open_clip's training view, each with a caption drawn from its class's prompts.

    Item (epoch, index) is a sample as ``common.data.reader.collate`` takes it. Box and prompt follow from (seed,
    epoch, key). ``caption_id`` is one for all prompts of a class, since each of them fits all of its pictures.
    """

    def __init__(self, pictures: ClassificationSet, image_size: int, tokenizer: Tokenizer, seed: int) -> None:
        self.pictures, self.seed, self.transform = pictures, seed, train_transform(image_size)
        prompts = [[fill(template, name) for template in pictures.templates] for name in pictures.class_names]
        self._ids = [[tokenizer.ids(prompt) for prompt in of_class] for of_class in prompts]
        self._caption_ids = [caption_id(of_class[0]) for of_class in prompts]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        label, key = self.pictures.labels[index], self.pictures.keys[index]
        rng = Random(f"{self.seed}/{epoch}/{key}")
        return {
            "image": self.transform(self.pictures.picture(index), rng),
            "ids": rng.choice(self._ids[label]),
            "caption_id": self._caption_ids[label],
            "label": label,
            "key": key,
        }


class PairLoader:
    """Full batches of one process's share of the pairs, permuted by (seed, epoch); goes on where a trainer stopped.

    progress: gives (epoch, batches of it that are done) when an iteration begins.

    It wraps a DataLoader instead of being one, because Lightning may take a DataLoader apart and rebuild it.
    """

    def __init__(
        self,
        pairs: Pairs,
        batch_size: int,
        num_workers: int,
        progress: Callable[[], tuple[int, int]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(pairs) < world * batch_size:
            raise ValueError(
                f"{len(pairs)} training pictures do not fill a batch of {batch_size} on {world} processes; lower "
                "batch_size"
            )
        self._pairs, self._progress = pairs, progress
        self.batch_size, self.num_workers, self.rank, self.world = batch_size, num_workers, rank, world

    def __len__(self) -> int:
        return len(self._pairs) // (self.world * self.batch_size)

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The places, (epoch, index), of every batch of an epoch."""
        order = list(range(len(self._pairs)))
        Random(f"{self._pairs.seed}/{epoch}").shuffle(order)
        own = order[self.rank :: self.world]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return [[(epoch, index) for index in own[start : start + self.batch_size]] for start in starts]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator, so that this runs at the first batch, when a resumed trainer's counters stand right.
        epoch, done = self._progress()
        yield from DataLoader(
            self._pairs,
            batch_sampler=self.batches(epoch)[done:],
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )


class ClassificationDataModule(LightningDataModule):
    """Train a CLIP on the pictures and prompts of a classification set, and validate it by zero-shot accuracy.

    Args:
        data: A set of the catalogue that has training pictures, such as fashion_mnist.
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        root: Folder of the catalogue's sets; default: $EFFCLIP_DATA.
        protocol: mlip or coop, where the set's splits and prompts differ.
        held_out: Training pictures, drawn once for all seeds, that validate instead; null: the set's own val split.
        batch_size: Pairs per batch on each device.
        num_workers: Worker processes per device; 0 reads in the training process.
        seed: Start of all randomness, together with epoch and key.

    A training batch is {"image": normalised float [B,3,S,S], "text": long [B,T], "caption_id": long [B], equal for
    pictures of one class, "label": long [B], "key": list[str]}; validation and test have no texts. ValueError, at
    once: data that is missing, and what to download; no training pictures or none to validate with; a prompt that
    the architecture's vocabulary cannot spell.
    """

    def __init__(
        self,
        data: str,
        *,
        architecture: str,
        root: str | None = None,
        protocol: str = "mlip",
        held_out: int | None = None,
        batch_size: int = 128,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        entry = catalogue.entry(data, protocol)
        needed = {"train"} if held_out is not None else {"train", "val"}
        if not needed <= set(entry.splits):
            raise ValueError(
                f"{entry.title} has the splits {list(entry.splits)}; training needs train, and val or held_out pictures"
            )
        self.root = root or os.environ.get("EFFCLIP_DATA")
        if not self.root:
            raise ValueError(
                f"{entry.title}: give --data.root or set EFFCLIP_DATA to the folder of the data sets. It needs "
                f"{entry.get}"
            )
        self.architecture = load_architecture(architecture)
        text = self.architecture["text_cfg"]
        self.image_size = self.architecture["vision_cfg"]["image_size"]
        self.entry, self.batch_size, self.num_workers = entry, batch_size, num_workers
        train = classification_set(entry, self.root, "train")
        if held_out is None:
            self.val_pictures = classification_set(entry, self.root, "val")
        else:
            train, self.val_pictures = _split(train, held_out, f"{data}/held out")
        self.pairs = Pairs(train, self.image_size, Tokenizer(text["context_length"], text.get("vocabulary")), seed)

    @cached_property
    def test_pictures(self) -> ClassificationSet:
        """The set's test split, read when it is first asked for."""
        return classification_set(self.entry, self.root, "test")

    @property
    def class_prompts(self) -> list[str]:
        """The first prompt of each class, in the order of the labels: what validation classifies by."""
        return [fill(self.entry.templates[0], name) for name in self.val_pictures.class_names]

    def train_dataloader(self) -> PairLoader:
        """Shuffled pairs, the same number of batches on every rank; without a trainer always the first epoch."""
        trainer = self.trainer
        if trainer is None:
            return PairLoader(self.pairs, self.batch_size, self.num_workers, lambda: (0, 0))
        progress, place = partial(position, trainer), (trainer.global_rank, trainer.world_size)
        return PairLoader(self.pairs, self.batch_size, self.num_workers, progress, *place)

    def val_dataloader(self) -> DataLoader:
        """Each validation picture with its label."""
        return loader(self.val_pictures, self.image_size, self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """Each test picture with its label."""
        return loader(self.test_pictures, self.image_size, self.batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """The test split, for embeddings."""
        return self.test_dataloader()


def _split(pictures: ClassificationSet, held_out: int, seed: str) -> tuple[ClassificationSet, ClassificationSet]:
    """All but ``held_out`` random pictures, and those. ValueError: one of the two parts would be empty."""
    if not 0 < held_out < len(pictures):
        raise ValueError(f"held_out {held_out} of {len(pictures)} training pictures leaves none on one side")
    order = list(range(len(pictures)))
    Random(seed).shuffle(order)
    rest, held = (pictures.subset(sorted(part)) for part in (order[held_out:], order[:held_out]))
    return rest, held
