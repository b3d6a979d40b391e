"""Recipes as dry runs: `--trainer.fast_dev_run true` and `--trainer.overfit_batches N`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class DevRun(Callback):
    """Shortens the warm-up of a dry run that would be over before it, and says so."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the optimiser is configured."""
        dry = trainer.fast_dev_run or trainer.overfit_batches > 0
        warmup = getattr(pl_module, "warmup_steps", 0)
        if stage != "fit" or not dry or not warmup:
            return
        steps = trainer.estimated_stepping_batches
        if warmup >= steps:
            pl_module.warmup_steps = max(int(steps) - 1, 0)
            rank_zero_info(f"dry run of {steps} steps: warm-up {pl_module.warmup_steps} instead of {warmup} steps")


def fit_validation(trainer: dict[str, Any]) -> None:
    """Let a dry run on N batches validate after each pass over them, where the recipe's interval is longer."""
    interval = trainer.get("val_check_interval")
    if trainer.get("overfit_batches") and isinstance(interval, int) and trainer.get("check_val_every_n_epoch"):
        trainer["val_check_interval"] = None
        rank_zero_info(f"dry run: validation after each epoch instead of every {interval} steps")
