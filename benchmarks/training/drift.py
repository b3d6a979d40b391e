"""Recomputes a recipe's first losses, to notice when code drifts.

Model, seeds, optimiser and schedule are the recipe's. The images are those of a small split in the training view,
because packing ``train`` takes longer than the check, or other data that is quickly made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

from benchmarks import ROOT, read_recipe
from benchmarks.training.export import training_class
from common.data.embedded.module import EmbeddedDataModule
from common.inference import BF16_PRODUCTS

STEPS = 3


SMALL = {1: "val", 2: "retrieval", 3: "val"}
"""A split with the seen names that is soon packed, by revision."""


class _SmallAsTrain(EmbeddedDataModule):
    """The embedded data, trained on a small split instead of ``train``."""

    def prepare_data(self) -> None:
        """Nothing: a split is packed when its loader is made."""

    def train_dataloader(self):
        """Shuffled, augmented batches of the small split."""
        return self.dataloader(SMALL[self.revision], train=True)


class _Losses(Callback):
    """Records the first losses, then ends the run."""

    def __init__(self, steps: int) -> None:
        self.steps, self.values = steps, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Record one loss."""
        self.values.append(float(outputs["loss"]))
        trainer.should_stop = len(self.values) >= self.steps


def first_losses(
    recipe: str,
    steps: int = STEPS,
    data: LightningDataModule | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    emulated: bool = False,
) -> list[float]:
    """The losses of the first steps of a recipe, a YAML file's path from the checkout's root.

    data: takes the place of the recipe's; None: the embedded small split.  settings: see ``built``.
    emulated: keep the recipe's precision on every processor; else as ``precision_here`` says.
    """
    config = read_recipe(recipe)
    seed_everything(config["seed_everything"])
    module, data_arguments = built(recipe, settings)
    data = data or _SmallAsTrain(**data_arguments | {"num_workers": 0})
    losses = _Losses(steps)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=config["trainer"]["max_steps"],
        precision=config["trainer"].get("precision") if emulated else precision_here(config["trainer"]),
        gradient_clip_val=config["trainer"].get("gradient_clip_val"),
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return losses.values


def precision_here(trainer: Mapping[str, Any]) -> str | None:
    """The precision of a recipe's trainer, but float32 in place of a bfloat16 that this processor would emulate.

    Losses agree within the tolerance of the check, and a step takes a tenth of the time or less.
    """
    precision = trainer.get("precision")
    return "32-true" if precision == "bf16-mixed" and not BF16_PRODUCTS else precision


def built(
    recipe: str, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[LightningModule, dict[str, Any]]:
    """A recipe's module, and its data's arguments.

    settings: changes of the recipe's arguments, {"model": {NAME: VALUE}, "data": {NAME: VALUE}}.
    """
    config = read_recipe(recipe)
    for section, changes in (settings or {}).items():
        config[section]["init_args"].update(changes)
    return training_class(config)(**_rooted(config["model"]["init_args"])), config["data"]["init_args"]


def _rooted(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with absolute paths for files of the checkout, so that the check runs in any folder."""
    return {
        name: str(ROOT / value) if isinstance(value, str) and (ROOT / value).is_file() else value
        for name, value in arguments.items()
    }
