"""Short runs of the Trainer on noise: the data, the run, and the weights that it changed."""

import lightning
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from common.preprocess import Preprocess
from common.testing import TINY_CAPTIONS

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
CLASSES = TINY_CAPTIONS[:4]


class Pictures(LightningDataModule):
    """Twelve pictures of noise, three of each of four classes, the same for training and evaluation."""

    class_prompts = tuple(CLASSES)
    class_names = tuple(text.removeprefix("a ") for text in CLASSES)

    def __init__(self, augment=False):
        super().__init__()
        self.augment = augment
        self.preprocess = Preprocess(32)
        noise = torch.Generator().manual_seed(3)
        images = torch.randn(12, 3, 32, 32, generator=noise)
        self.samples = [{"image": image, "label": i % 4, "key": f"{i}"} for i, image in enumerate(images)]

    def dataloader(self, split, train=None):
        return DataLoader(self.samples, batch_size=6, shuffle=bool(train))

    def train_dataloader(self):
        return self.dataloader("train", train=True)

    def val_dataloader(self):
        return self.dataloader("val")

    test_dataloader = val_dataloader

    def images(self):
        return torch.stack([sample["image"] for sample in self.samples])


def fit(module, steps=3, data=None):
    """The trainer after a few steps, and the module's weights before them."""
    lightning.seed_everything(0, verbose=False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = lightning.Trainer(max_steps=steps, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data or Pictures())
    return trainer, before


def moved(module, before):
    """Names of the weights that a run has changed."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
