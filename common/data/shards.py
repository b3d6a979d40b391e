"""The LightningDataModule over WebDataset shards, which every pretraining of the suite uses.

Shapes: B samples, T tokens, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from common.clip import load_architecture
from common.data.augmentations import Augmentation, rewrite
from common.data.augmentations import augmentation as augmentation_of
from common.data.catalogue import Entry, entry
from common.data.complete import compare_sizes, compare_with_headers
from common.data.loader import ShardLoader, position
from common.data.reader import Decoder, ShardDataset, count_samples, entry_of, expand, manifests
from common.data.tar import Shard
from common.data.transforms import Transform, eval_transform
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer
from common.zeroshot import fill


class ShardDataModule(LightningDataModule):
    """Image-text pairs from WebDataset shards (a picture, a ``.txt`` caption, perhaps ``.json`` or ``.cls``).

    Args:
        train_shards: Paths or URLs of the training shards, with ``{000..059}`` braces and ``${VARIABLES}``.
        val_shards: The same for validation.
        test_shards: The same for testing.
        architecture: open_clip model name or ``.json`` file, for picture size, context length and vocabulary.
        image_size: Picture size, where it is not the architecture's.
        batch_size: Pairs per batch on each device; 256 where neither this nor global_batch_size is given.
        global_batch_size: Pairs per batch over all devices, divided evenly among however many there are.
        num_workers: Worker processes per device; 0 reads in the training process.
        train_num_samples: Training pairs that the recipe expects in all shards. Must be what ``manifest.json``
            says where one stands beside them, and is taken as given where none does.
        train_fraction: Part of the training shards that is read, the first ones, rounded up.
        variant: Which of several data sets of one name is meant; must be what the manifest says.
        seed: Start of all randomness, together with epoch, rank, worker and key.
        shuffle_buffer: Undecoded samples per worker among which the next one is drawn.
        max_damaged: Fraction of damaged, incomplete or uncaptioned samples above which the run fails.
        allow_pipe: Whether ``pipe:`` URLs may run their shell command.
        captions: Whether samples have captions; False reads pictures and labels alone.
        augment: Whether training pictures are drawn at random; False shows them as evaluation does, shuffled.
        augmentation: How they are drawn: clip, slip, mocov2 or aclip, see ``common.data.augmentations``.
        scale: Least and greatest share of the area that a crop has, where it is not the augmentation's.
        flip: Whether pictures are mirrored with probability 1/2, where it is not the augmentation's choice.
        image_views: Names of augmentations; each draws a training picture once more.
        text_view: eda writes each training caption once more, with words exchanged or left out.
        classes: A set of the catalogue (imagenet) whose labelled pictures validation and test show; then they need no
            captions, and are classified among its names.

    A batch is {"image": normalised float [B,3,H,W], "text": long [B,T], "caption_id": long [B], "key":
    list[str]} and "label": long [B] where the shards carry labels. Further views of training pairs are "image_views",
    a list of float [B,3,H,W], and "text_view", long [B,T']. ValueError, at once: missing shards, or not
    those that the recipe is about; with the first loader: fewer shards than readers, an unknown number of
    training samples, or less than one batch for a reader.
    """

    def __init__(
        self,
        train_shards: str | None = None,
        val_shards: str | None = None,
        test_shards: str | None = None,
        *,
        architecture: str,
        image_size: int | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        num_workers: int = 4,
        train_num_samples: int | None = None,
        train_fraction: float = 1.0,
        variant: str | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_damaged: float = 0.01,
        allow_pipe: bool = False,
        captions: bool = True,
        augment: bool = True,
        augmentation: str = "clip",
        scale: tuple[float, float] | None = None,
        flip: bool | None = None,
        image_views: Sequence[str] = (),
        text_view: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(batch_size, global_batch_size, num_workers)
        if not 0 <= max_damaged < 1:
            raise ValueError(f"max_damaged {max_damaged} must be a fraction in [0, 1)")
        if not 0 < train_fraction <= 1:
            raise ValueError(f"train_fraction {train_fraction} is not in (0, 1]")
        self.architecture = load_architecture(architecture)
        self.preprocess = Preprocess.of(self.architecture)
        if image_size is not None:
            self.preprocess = replace(self.preprocess, size=image_size)
        text = self.architecture["text_cfg"]
        self.tokenizer = Tokenizer(text["context_length"], text.get("vocabulary"))
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        if batch_size is None and global_batch_size is None:
            self.batch_size = 256
        self.num_workers = num_workers
        self.train_num_samples, self.train_fraction = train_num_samples, train_fraction
        self.seed, self.shuffle_buffer, self.max_damaged = seed, max(1, shuffle_buffer), max_damaged
        self.captions, self.variant, self.augment = captions, variant, augment
        self._drawn = augmentation_of(augmentation, scale, flip)
        self._views = [augmentation_of(name) for name in image_views]
        self._text_view = None if text_view is None else rewrite(text_view)
        self._set = None if classes is None else _named(classes)
        patterns = {"train": train_shards, "val": val_shards, "test": test_shards}
        self._urls = self._find({split: pattern for split, pattern in patterns.items() if pattern}, allow_pipe)
        self._compare_with_manifest(self._urls.get("train", []))
        self._loaders: dict[str, ShardLoader] = {}

    def _find(self, patterns: dict[str, str], allow_pipe: bool) -> dict[str, list[str]]:
        urls, missing = {}, []
        for split, pattern in patterns.items():
            try:
                urls[split] = expand(pattern, allow_pipe)
            except ValueError as error:
                missing.append(f"  {split}_shards: {error}")
        if missing:
            about = [f"variant {self.variant!r}"] if self.variant else []
            about += [f"{self.train_num_samples:,} training samples"] if self.train_num_samples else []
            raise ValueError(
                f"the data of this recipe ({', '.join(about) or 'WebDataset shards'}) cannot be read:\n"
                + "\n".join(missing)
                + "\ndocs/data.md says how to get the usual sets and how to pack your own"
            )
        return urls

    def _compare_with_manifest(self, urls: list[str]) -> None:
        known = manifests(urls)
        wrong = {str(folder): about.get("variant") for folder, about in known.items()}
        wrong = {folder: variant for folder, variant in wrong.items() if self.variant not in (None, variant)}
        if wrong:
            raise ValueError(
                f"the recipe is about variant {self.variant!r}, but the manifests say {wrong}; give the right shards, "
                "or --data.variant if their results shall stand under that name"
            )
        entries = [entry_of(url, known) for url in urls]
        if not entries or None in entries:
            compare_with_headers(urls, self.train_num_samples)
            if self.variant is not None and urls:
                rank_zero_warn(
                    f"no manifest.json names all training shards, so that they are variant {self.variant!r} and hold "
                    f"{self.train_num_samples} samples is not verified; python -m common.data.write_shards writes one"
                )
            return
        samples = sum(entry["samples"] for entry in entries)
        if self.train_num_samples not in (None, samples):
            raise ValueError(
                f"the recipe expects {self.train_num_samples} training samples, the shards hold {samples}; complete "
                f"them, or say that you train on these: --data.train_num_samples {samples}"
            )

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.preprocess.size

    @property
    def splits(self) -> list[str]:
        """The splits that have shards."""
        return list(self._urls)

    def shard_urls(self, split: str) -> list[str]:
        """Paths or URLs of a split's shards that are read. ValueError: there is no such split."""
        if split not in self._urls:
            raise ValueError(f"no shards for split {split!r}; give {split}_shards (there are {sorted(self._urls)})")
        return self.part(split, self._urls[split])

    def part(self, split: str, shards: Sequence[str]) -> list[str]:
        """The first ``train_fraction`` of the training shards, rounded up; all shards of another split."""
        return list(shards[: math.ceil(self.train_fraction * len(shards))] if split == "train" else shards)

    @property
    def class_names(self) -> list[str] | None:
        """The names in the order of the labels; None where the pairs have no classes."""
        return self._set and list(self._set.class_names)

    @property
    def templates(self) -> Sequence[str]:
        """The prompts of the set whose classes these are."""
        return self._set.templates if self._set else ()

    @property
    def class_prompts(self) -> list[str] | None:
        """One prompt a class by the set's first template, in the order of the labels; None without classes."""
        return self._set and [fill(self.templates[0], name) for name in self.class_names]

    @property
    def train_class_prompts(self) -> list[str] | None:
        """The classes that training batches are labelled with: none for ``classes``, which validation and test alone
        show; those of a module that has ``class_prompts`` of its own.
        """
        return None if self._set else self.class_prompts

    def picture_transform(self, train: bool) -> Transform:
        """(PIL image, Random) -> uint8 [H,W,3]: the augmentation, or open_clip's evaluation transform."""
        return self._drawn.transform(self.image_size) if train else eval_transform(self.preprocess)

    def view_transform(self, view: Augmentation) -> Transform:
        """(PIL image, Random) -> uint8 [H,W,3]: a further view of a training picture."""
        return view.transform(self.image_size)

    def dataloader(self, split: str, *, train: bool | None = None) -> ShardLoader:
        """The loader of any split, for training (shuffled, augmented) or evaluation (each sample once).

        train: which of the two; by default training for the split "train" alone.
        """
        train = split == "train" if train is None else train
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        workers = max(1, self.num_workers)
        urls = self.shard_urls(split)
        compare_sizes(urls)
        if train and len(urls) < world * workers:
            mend = f"use at most {len(urls) // world} workers" if len(urls) >= world else "write more, smaller shards"
            raise ValueError(
                f"{len(urls)} shards of {split!r} cannot feed {world} processes x {workers} workers; {mend}"
            )
        batch_size = self.device_batch_size(world)
        shards = self._shards(urls, train)
        dataset = ShardDataset(
            shards,
            self.decoder(split, train),
            batch_size,
            batches=self._train_batches(shards, batch_size, world * workers) if train else None,
            rank=rank,
            world=world,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            max_damaged=self.max_damaged,
        )
        length = dataset.batches * workers if train else dataset.evaluation_batches(workers)
        loader = ShardLoader(dataset, self.num_workers, length, self._progress if train and trainer else None)
        self._loaders[split] = loader
        return loader

    def _shards(self, urls: Sequence[str], train: bool) -> list[Shard]:
        """The shards with their numbers of samples; a stated total stands in for headers where no manifest does."""
        known = manifests(urls)
        if not train or self.train_num_samples is None or None not in (entry_of(url, known) for url in urls):
            return count_samples(urls)
        return [Shard(url, None, round(self._stated_samples() / len(urls))) for url in urls]

    def _stated_samples(self) -> int | None:
        """Of ``train_num_samples``, those in the shards that are read, taken as equally large."""
        if self.train_num_samples is None or self.train_fraction == 1:
            return self.train_num_samples
        return self.train_num_samples * len(self.shard_urls("train")) // len(self._urls["train"])

    def state_dict(self) -> dict[str, Any]:
        """The account of every split that was read, which Lightning saves in the checkpoint."""
        return {"accounts": {split: loader.account.to_dict() for split, loader in self._loaders.items()}}

    def teardown(self, stage: str) -> None:
        """End the workers, and print the account of every split that was read."""
        for split, loader in self._loaders.items():
            loader.stop()
            if loader.account.read:
                rank_zero_info(f"{split} {loader.account}")

    def decoder(self, split: str, train: bool = False) -> Decoder:
        """The decoder of a split's samples, with training or evaluation transforms."""
        transform = self.picture_transform(train and self.augment)
        if self._set is not None and split != "train":
            return Decoder(transform, self.preprocess, self.tokenizer, False, len(self._set.class_names))
        views = tuple(self.view_transform(view) for view in self._views) if train else ()
        text_view = self._text_view if train else None
        return Decoder(
            transform, self.preprocess, self.tokenizer, self.captions, image_views=views, text_view=text_view
        )

    def device_batch_size(self, devices: int) -> int:
        """Pairs per batch on each of so many devices. ValueError: global_batch_size cannot be divided among them."""
        if self.global_batch_size is None:
            return self.batch_size
        size, rest = divmod(self.global_batch_size, devices)
        if rest:
            near = max(size, 1) * devices
            raise ValueError(
                f"global_batch_size {self.global_batch_size} cannot be divided among {devices} devices; use {near} or "
                f"{near + devices}, or another number of devices"
            )
        return size

    def _progress(self) -> tuple[int, int]:
        return position(self.trainer)

    def _train_batches(self, shards: list[Shard], batch_size: int, readers: int) -> int:
        """Full batches of one reader in one epoch: its share of the padded shards, at their mean size."""
        samples = self._stated_samples()
        if samples is None:
            if any(shard.samples is None for shard in shards):
                raise ValueError("the number of training samples is unknown; give train_num_samples")
            samples = sum(shard.samples for shard in shards)
        share = samples * -(-len(shards) // readers) // len(shards)
        if share < batch_size:
            raise ValueError(
                f"{samples} samples give each of {readers} readers {share}, below batch_size {batch_size}; "
                "lower it or num_workers"
            )
        return share // batch_size

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


def _check_sizes(batch_size: int | None, global_batch_size: int | None, num_workers: int) -> None:
    """ValueError: a size is too small, or both kinds of batch size are given."""
    sizes = {"batch_size": batch_size, "global_batch_size": global_batch_size}
    for name, value, least in (*((name, size, 1) for name, size in sizes.items()), ("num_workers", num_workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    if None not in sizes.values():
        raise ValueError(
            f"batch_size {batch_size} (on each device) and global_batch_size {global_batch_size} (over all) are "
            "both given; set one of them to null"
        )


def _named(name: str) -> Entry:
    """A set of the catalogue with known class names. ValueError: no such set, or its names are in its files."""
    result = entry(name)
    if result.class_names is None:
        raise ValueError(f"classes {name!r}: that set has its class names in its files; imagenet's are known without")
    return result
