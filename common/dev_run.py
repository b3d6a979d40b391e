"""Recipes as dry runs: `--trainer.fast_dev_run true` and `--trainer.overfit_batches N`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class DevRun(Callback):
    """Shortens the parts of a dry run's schedule that would last beyond its end, such as the warm-up, and says so.

    These are the training's numbers of steps: its attributes whose names end in ``_steps``.

    always: every run is a dry one, as common/smoke.yaml says.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimiser is configured."""
        dry = self.always or trainer.fast_dev_run or trainer.overfit_batches > 0
        parts = {name: value for name, value in vars(pl_module).items() if name.endswith("_steps") and value}
        if stage != "fit" or not dry or not parts:
            return
        steps = trainer.estimated_stepping_batches
        for name, value in parts.items():
            if value >= steps:
                setattr(pl_module, name, max(int(steps) - 1, 0))
                rank_zero_info(f"dry run of {steps} steps: {name} {getattr(pl_module, name)} instead of {value}")


def fit_validation(trainer: dict[str, Any]) -> None:
    """Let a dry run on N batches validate after each pass over them, where the recipe's interval is longer."""
    interval = trainer.get("val_check_interval")
    if trainer.get("overfit_batches") and isinstance(interval, int) and trainer.get("check_val_every_n_epoch"):
        trainer["val_check_interval"] = None
        rank_zero_info(f"dry run: validation after each epoch instead of every {interval} steps")
