"""A LightningDataModule over labelled pictures with few shots, or all of them, for training.

Shapes: B pictures of a batch, S picture size, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from common.clip import load_architecture
from common.data.lookup import Place, labelled_set, splits_of
from common.data.pictures import loader, shuffled_loader
from common.data.sources import few_shot
from common.data.transforms import eval_transform, train_transform
from common.zeroshot import Template, fill


class FewShotDataModule(LightningDataModule):
    """Labelled pictures of one data set: shots of each class to train on, its val and test splits whole.

    Args:
        name: a set of the catalogue, best by CoOp's protocol (oxford_pets@coop), or an embedded task
            (embedded-sketch).
        architecture: open_clip model name or ``.json`` file, for the picture size.
        root: folder of the catalogue's sets; default: $EFFCLIP_DATA.
        shots: training pictures of each class; null: all there are.
        seed: of the draw; the 2 shots of a seed contain its 1 shot, the 4 its 2, and so on.
        batch_size: training pictures per batch on each device.
        eval_batch_size: pictures per batch of val and test.
        num_workers: worker processes per device; 0 reads in the training process.
        augment: whether training pictures are random crops; False shows them as evaluation does, shuffled.
        scale: a random crop's share of the picture, least and greatest.
        flip: whether random crops are mirrored by chance.

    A batch is {"image": normalised float [B,3,S,S], "label": long [B], "key": list[str]}; ``training`` are the
    training pictures themselves. ValueError, at once: no such data, or what is missing and where to get it.
    """

    def __init__(
        self,
        name: str,
        architecture: str = "ViT-B-16-quickgelu",
        root: str | None = None,
        shots: int | None = 16,
        seed: int = 0,
        batch_size: int = 4,
        eval_batch_size: int = 64,
        num_workers: int = 4,
        augment: bool = True,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = load_architecture(architecture)["vision_cfg"]["image_size"]
        self.splits = (*splits_of(name, "training"), "test")
        self.name, self.place = name, Place(root or os.environ.get("EFFCLIP_DATA"))
        self.augment = augment
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.transform = eval_transform(self.image_size)
        if augment:
            self.transform = train_transform(self.image_size, tuple(scale), flip)
        whole = labelled_set(name, "train", self.place)
        self.training = whole if shots is None else whole.subset(few_shot(whole.labels, shots, seed))

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
        """One prompt a class, by the data set's first template."""
        return [fill(self.templates[0], name) for name in self.class_names]

    def dataloader(self, split: str, *, train: bool | None = None) -> DataLoader:
        """The loader of any split, for training (shuffled, by the training view) or evaluation (each picture once).

        train: which of the two; by default training for the split "train" alone, which means the shots.
        ValueError: no such split, or fewer training pictures than a batch.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has the splits {list(self.splits)}, not {split!r}")
        pictures = self.training if split == "train" else labelled_set(self.name, split, self.place)
        if not (split == "train" if train is None else train):
            return loader(pictures, self.image_size, self.eval_batch_size, self.num_workers)
        if len(pictures) < self.batch_size:
            raise ValueError(f"{len(pictures)} training pictures do not fill a batch of {self.batch_size}")
        return shuffled_loader(pictures, self.transform, self.batch_size, self.num_workers)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the shots."""
        return self.dataloader("train")

    def val_dataloader(self) -> DataLoader | list:
        """The val split; nothing where the data set has none."""
        return self.dataloader("val") if "val" in self.splits else []

    def test_dataloader(self) -> DataLoader:
        """The test split."""
        return self.dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test split, for embeddings."""
        return self.test_dataloader()
