"""The LightningDataModule over WebDataset shards that every pretraining of the suite uses.

Shapes: B samples, T tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from common.clip import load_architecture
from common.data.reader import Decoder, Shard, ShardDataset, count_samples, expand
from common.data.transforms import Transform, eval_transform, train_transform
from common.tokenizer import Tokenizer


class ShardLoader:
    """Iterates over a ShardDataset in worker processes and knows its length.

    epoch: gives the number of the epoch that an iteration belongs to; without it iterations are counted.
    length: batches of one iteration over all workers; None (remote shards of unknown size): ``len`` fails.

    It wraps a DataLoader instead of being one, because Lightning may take a DataLoader apart and rebuild it.
    Its dataset is called ``source`` because Lightning doubts the length of what has an iterable ``dataset``.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        num_workers: int,
        length: int | None,
        epoch: Callable[[], int] | None = None,
    ) -> None:
        self.source, self.length = dataset, length
        self._epoch = epoch
        self._iterations = 0
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0 and dataset.batches is not None,
        )

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of samples in these shards is unknown")
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.source.set_epoch(self._iterations if self._epoch is None else self._epoch())
        self._iterations += 1
        return iter(self._loader)


class ShardDataModule(LightningDataModule):
    """Image-text pairs from WebDataset shards (a picture, a ``.txt`` caption, perhaps ``.json`` or ``.cls``).

    Args:
        train_shards: Paths or URLs of the training shards, with ``{000..059}`` braces and ``${VARIABLES}``.
        val_shards: The same for validation.
        test_shards: The same for testing.
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        batch_size: Pairs per batch on each device.
        num_workers: Worker processes per device; 0 reads in the training process.
        train_num_samples: Training pairs in all shards; needed where no ``manifest.json`` stands beside them.
        seed: Start of all randomness, together with epoch, rank, worker and key.
        shuffle_buffer: Undecoded samples per worker among which the next one is drawn.
        max_damaged: Fraction of damaged, incomplete or uncaptioned samples above which the run fails.
        allow_pipe: Whether ``pipe:`` URLs may run their shell command.
        captions: Whether samples have captions; False reads pictures and labels alone.

    A batch is {"image": normalised float [B,3,H,W], "text": long [B,T], "caption_id": long [B], "key":
    list[str]} and "label": long [B] where the shards carry labels. ValueError: missing shards, fewer shards
    than readers, an unknown number of training samples, or less than one batch for a reader.
    """

    def __init__(
        self,
        train_shards: str | None = None,
        val_shards: str | None = None,
        test_shards: str | None = None,
        *,
        architecture: str,
        batch_size: int = 256,
        num_workers: int = 4,
        train_num_samples: int | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_damaged: float = 0.01,
        allow_pipe: bool = False,
        captions: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        if not 0 <= max_damaged < 1:
            raise ValueError(f"max_damaged {max_damaged} must be a fraction in [0, 1)")
        self.architecture = load_architecture(architecture)
        text = self.architecture["text_cfg"]
        self.tokenizer = Tokenizer(text["context_length"], text.get("vocabulary"))
        self.batch_size, self.num_workers, self.train_num_samples = batch_size, num_workers, train_num_samples
        self.seed, self.shuffle_buffer, self.max_damaged = seed, max(1, shuffle_buffer), max_damaged
        self.captions = captions
        patterns = {"train": train_shards, "val": val_shards, "test": test_shards}
        self._urls = {split: expand(pattern, allow_pipe) for split, pattern in patterns.items() if pattern}

    def shard_urls(self, split: str) -> list[str]:
        """Paths or URLs of a split's shards. ValueError: there is no such split."""
        if split not in self._urls:
            raise ValueError(f"no shards for split {split!r}; give {split}_shards (there are {sorted(self._urls)})")
        return self._urls[split]

    @property
    def class_prompts(self) -> list[str] | None:
        """One prompt a class, in the order of the labels; None where the pairs have no classes."""
        return None

    def picture_transform(self, train: bool) -> Transform:
        """(PIL image, Random) -> uint8 [H,W,3]: open_clip's training or evaluation transform."""
        size = self.architecture["vision_cfg"]["image_size"]
        return train_transform(size) if train else eval_transform(size)

    def dataloader(self, split: str, *, train: bool | None = None) -> ShardLoader:
        """The loader of any split, for training (shuffled, augmented) or evaluation (each sample once).

        train: which of the two; by default training for the split "train" alone.
        """
        train = split == "train" if train is None else train
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        workers = max(1, self.num_workers)
        urls = self.shard_urls(split)
        if len(urls) < world * workers:
            mend = f"use at most {len(urls) // world} workers" if len(urls) >= world else "write more, smaller shards"
            raise ValueError(
                f"{len(urls)} shards of {split!r} cannot feed {world} processes x {workers} workers; {mend}"
            )
        known = train and self.train_num_samples is not None
        shards = [Shard(url, None) for url in urls] if known else count_samples(urls)
        dataset = ShardDataset(
            shards,
            Decoder(self.picture_transform(train), self.tokenizer, self.captions),
            self.batch_size,
            batches=self._train_batches(shards, world * workers) if train else None,
            rank=rank,
            world=world,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            max_damaged=self.max_damaged,
        )
        length = dataset.batches * workers if train else self._eval_batches(dataset, workers)
        epoch = (lambda: trainer.current_epoch) if train and trainer else None
        return ShardLoader(dataset, self.num_workers, length, epoch)

    def _train_batches(self, shards: list[Shard], readers: int) -> int:
        """Full batches of one reader in one epoch: its share of the padded shards, at their mean size."""
        samples = self.train_num_samples
        if samples is None:
            if any(shard.samples is None for shard in shards):
                raise ValueError("the number of training samples is unknown; give train_num_samples")
            samples = sum(shard.samples for shard in shards)
        share = samples * -(-len(shards) // readers) // len(shards)
        if share < self.batch_size:
            raise ValueError(
                f"{samples} samples give each of {readers} readers {share}, below batch_size "
                f"{self.batch_size}; lower batch_size or num_workers"
            )
        return share // self.batch_size

    def _eval_batches(self, dataset: ShardDataset, workers: int) -> int | None:
        if any(shard.samples is None for shard in dataset.shards):
            return None
        shares = (dataset.reader_shards(0, worker, workers) for worker in range(workers))
        return sum(-(-sum(shard.samples for shard in share) // self.batch_size) for share in shares)

    def train_dataloader(self) -> ShardLoader:
        """Shuffled, augmented batches; the same number on every rank."""
        return self.dataloader("train")

    def val_dataloader(self) -> ShardLoader:
        """Every validation pair once over all ranks."""
        return self.dataloader("val")

    def test_dataloader(self) -> ShardLoader:
        """Every test pair once over all ranks."""
        return self.dataloader("test")

    def predict_dataloader(self) -> ShardLoader:
        """The test split, for embeddings."""
        return self.test_dataloader()
