"""A LightningDataModule over labelled pictures: all or a few per class, with prompts of their class or without texts.

Shapes: B pictures of a batch, T text tokens, S picture size, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from random import Random
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from common.clip import load_architecture
from common.data.classification import ClassificationSet
from common.data.embedded.tasks import drawing
from common.data.loader import begun, position
from common.data.lookup import EMBEDDED_TASKS, Place, labelled_set, scale_of, splits_of
from common.data.pictures import loader
from common.data.reader import caption_id, collate
from common.data.sources import few_shot
from common.data.transforms import Transform, eval_transform, train_transform
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer
from common.zeroshot import Template, fill


class TrainingView(Dataset):
    """Transformed pictures with labels and, given a tokenizer, a caption drawn from the prompts of the class.

    Item (epoch, index) is a sample as ``common.data.reader.collate`` takes it. (seed, epoch, key)
    determines its crop and caption. All prompts of a class share one ``caption_id``: each fits all its pictures.
    """

    def __init__(
        self, pictures: ClassificationSet, transform: Transform, seed: int, tokenizer: Tokenizer | None
    ) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed
        self._ids = None
        if tokenizer is not None:
            prompts = [[fill(template, name) for template in pictures.templates] for name in pictures.class_names]
            self._ids = [[tokenizer.ids(prompt) for prompt in texts] for texts in prompts]
            self._caption_ids = [caption_id(texts[0]) for texts in prompts]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        label, key = self.pictures.labels[index], self.pictures.keys[index]
        rng = Random(f"{self.seed}/{epoch}/{key}")
        sample = {"image": self.transform(self.pictures.picture(index), rng), "label": label, "key": key}
        if self._ids is None:
            return sample
        return sample | {"ids": rng.choice(self._ids[label]), "caption_id": self._caption_ids[label]}


class EpochLoader:
    """Full batches of one process's share of a view, permuted by (seed, epoch); it continues where a trainer stopped.

    progress: returns (epoch, finished batches of it) when an iteration begins.

    It wraps a DataLoader instead of being one, because Lightning may take a DataLoader apart and rebuild it.
    """

    def __init__(
        self,
        view: TrainingView,
        preprocess: Preprocess,
        batch_size: int,
        num_workers: int,
        progress: Callable[[], tuple[int, int]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(view) < world * batch_size:
            raise ValueError(
                f"{len(view)} training pictures do not fill a batch of {batch_size} on {world} processes; lower "
                "batch_size"
            )
        self._view, self._preprocess, self._progress = view, preprocess, progress
        self.batch_size, self.num_workers, self.rank, self.world = batch_size, num_workers, rank, world
        self._iterations = 0

    def __len__(self) -> int:
        return len(self._view) // (self.world * self.batch_size)

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The places, (epoch, index), of every batch of an epoch."""
        order = list(range(len(self._view)))
        Random(f"{self._view.seed}/{epoch}").shuffle(order)
        share = order[self.rank :: self.world]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return [[(epoch, index) for index in share[start : start + self.batch_size]] for start in starts]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator, so that this runs at the first batch, when a resumed trainer's counters stand right.
        epoch, done = self._progress()
        loader = DataLoader(
            self._view,
            batch_sampler=self.batches(epoch)[done:],
            num_workers=self.num_workers,
            collate_fn=partial(collate, preprocess=self._preprocess),
            pin_memory=torch.cuda.is_available(),
        )
        batches = begun(loader, again=self._iterations > 0)
        self._iterations += 1
        yield from batches


class ClassificationDataModule(LightningDataModule):
    """The training pictures of one data set, all or some shots per class, and its whole val and test splits.

    Args:
        name: A set of the catalogue that has training pictures, perhaps with its protocol (fashion_mnist, dtd@coop),
            an embedded task (embedded-sketch), or a user's own pictures: a folder with one folder a class, or with
            folders train, val and test of such folders. What a user's folder lacks is drawn from its train, see
            ``common.data.classification.own_split``.
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        root: Folder of the catalogue's sets; default: $EFFCLIP_DATA.
        shots: Training pictures of each class; null: all there are. The 2 shots of a seed contain its 1 shot, the 4
            its 2, and so on.
        held_out: Training pictures, drawn once for all seeds, that validate in the place of the set's val split.
        batch_size: Training pictures per batch on each device.
        eval_batch_size: Pictures per batch of validation and test.
        num_workers: Worker processes per device; 0 reads in the training process.
        seed: Start of all randomness, that of the shots too; views and captions together with epoch and key.
        captions: Whether training pictures come with a prompt of their class, drawn from the set's templates.
        augment: Whether training pictures are random crops; False shows them as evaluation does, shuffled.
        crop: A random crop's share of the picture, least and greatest.
        flip: Whether every second random crop, by chance, is mirrored.
        image_size: Picture size, if it differs from the architecture's.

    A training batch is {"image": normalised float [B,3,S,S], "label": long [B], "key": list[str]}, and with captions
    {"text": long [B,T], "caption_id": long [B], equal for pictures of one class}; validation and test have no texts. A
    set without a val split is not validated unless pictures are held out.
    ValueError, at once: data that is missing, and what to download; no training pictures; a prompt that the
    architecture's vocabulary cannot spell.
    """

    def __init__(
        self,
        name: str,
        architecture: str = "ViT-B-16-quickgelu",
        root: str | None = None,
        shots: int | None = None,
        held_out: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 1,
        seed: int = 0,
        captions: bool = True,
        augment: bool = True,
        crop: tuple[float, float] = (0.9, 1.0),
        flip: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "num_workers": (num_workers, 0),
        }
        for argument, (value, least) in sizes.items():
            if value < least:
                raise ValueError(f"{argument} {value} must be at least {least}")
        self.architecture = load_architecture(architecture)
        self.preprocess, text = Preprocess.of(self.architecture), self.architecture["text_cfg"]
        if image_size is not None:
            self.preprocess = replace(self.preprocess, size=image_size)
        self.name, self._place = name, Place(root or os.environ.get("EFFCLIP_DATA"))
        splits = splits_of(name, "training")
        self.splits = ("train", *(("val",) if held_out is not None or "val" in splits else ()), "test")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augment, self._crop, self._flip = augment, tuple(crop), flip
        self.training, self._held = labelled_set(name, "train", self._place), None
        if held_out is not None:
            self.training, self._held = _split(self.training, held_out, f"{name}/held out")
        if shots is not None:
            self.training = self.training.subset(few_shot(self.training.labels, shots, seed))
        tokenizer = Tokenizer(text["context_length"], text.get("vocabulary")) if captions else None
        self.view = TrainingView(self.training, self._training_transform(), seed, tokenizer)
        self.scale = scale_of(name, self.image_size)
        self.attribution = drawing(EMBEDDED_TASKS[name]).ATTRIBUTION if name in EMBEDDED_TASKS else None

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.preprocess.size

    def _training_transform(self) -> Transform:
        if self.augment:
            return train_transform(self.image_size, self._crop, self._flip)
        return eval_transform(self.preprocess)

    @property
    def root(self) -> str | None:
        """The folder of the catalogue's sets."""
        return self._place.root

    @property
    def class_names(self) -> list[str]:
        """The C names, in the order of the labels."""
        return self.training.class_names

    @property
    def templates(self) -> Sequence[Template]:
        """The data set's prompts, see ``common.zeroshot.Template``."""
        return self.training.templates

    @property
    def class_prompts(self) -> list[str]:
        """One prompt a class, by the data set's first template: what validation classifies by."""
        return [fill(self.templates[0], name) for name in self.class_names]

    @cached_property
    def val_pictures(self) -> ClassificationSet:
        """What validates: the held-out pictures or the set's val split, read when it is first asked for."""
        return self._held or labelled_set(self.name, "val", self._place)

    @cached_property
    def test_pictures(self) -> ClassificationSet:
        """The set's test split, read when it is first asked for."""
        return labelled_set(self.name, "test", self._place)

    def dataloader(self, split: str, *, train: bool | None = None) -> EpochLoader | DataLoader:
        """The loader of any split, for training (shuffled, by the training view) or evaluation (each picture once
        over all processes).

        train: which of the two; by default training for the split "train" alone, for which it is possible.
        ValueError: no such split, or fewer training pictures than a batch.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has the splits {list(self.splits)}, not {split!r}")
        if split == "train" and train is not False:
            return self._training_loader()
        pictures = self.training if split == "train" else getattr(self, f"{split}_pictures")
        return loader(pictures, self.preprocess, self.eval_batch_size, self.num_workers, self._share(pictures))

    def _share(self, pictures: ClassificationSet) -> Sampler | None:
        """This process's part of the pictures: Lightning's own sampler would repeat some to make the parts equal."""
        if self.trainer is None or self.trainer.world_size == 1:
            return None
        return UnrepeatedDistributedSampler(pictures, self.trainer.world_size, self.trainer.global_rank, shuffle=False)

    def _training_loader(self) -> EpochLoader:
        """The same number of batches on every rank; without a trainer always the first epoch."""
        self.view.transform, trainer = self._training_transform(), self.trainer
        settings = (self.view, self.preprocess, self.batch_size, self.num_workers)
        if trainer is None:
            return EpochLoader(*settings, lambda: (0, 0))
        return EpochLoader(*settings, partial(position, trainer), trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> EpochLoader:
        """Shuffled batches of the training view."""
        return self.dataloader("train")

    def val_dataloader(self) -> DataLoader | list:
        """Each validation picture with its label; nothing where there are none."""
        return self.dataloader("val") if "val" in self.splits else []

    def test_dataloader(self) -> DataLoader:
        """Each test picture with its label."""
        return self.dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test split, for embeddings."""
        return self.test_dataloader()


def _split(pictures: ClassificationSet, held_out: int, seed: str) -> tuple[ClassificationSet, ClassificationSet]:
    """(the other pictures, ``held_out`` random ones). ValueError: one of the two parts would be empty."""
    if not 0 < held_out < len(pictures):
        raise ValueError(f"held_out {held_out} of {len(pictures)} training pictures leaves none on one side")
    order = list(range(len(pictures)))
    Random(seed).shuffle(order)
    rest, held = (pictures.subset(sorted(part)) for part in (order[held_out:], order[:held_out]))
    return rest, held
