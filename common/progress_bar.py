"""The progress bar of a training: optimiser steps of the whole run, and the time that is left for all of them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from common.throughput import Throughput, memory


class RunProgress(RichProgressBar):
    """Counts optimiser steps from the first to the last of the run, where Lightning counts batches of an epoch.

    Beside the metrics it shows images per second, the share of time that waits for data, and memory.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar at the step where the run begins or goes on; later epochs go on with it."""
        if not self.is_disabled and self.progress is not None and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    def _initialize_train_progress_bar_id(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        self.train_progress_bar_id = self._add_task(steps, "Training  ")
        self._update(self.train_progress_bar_id, self.trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stand where the optimiser stands."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, and how fast it goes."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        speed = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        if speed is not None and speed.images_per_second:
            metrics["images/s"] = f"{speed.images_per_second:,.0f}"
            metrics["data wait"] = f"{speed.waiting:.0%}"
            metrics["memory"] = memory()
        return metrics
