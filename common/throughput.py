"""How fast a training goes, and how much of its time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor


class Throughput(Callback):
    """Measures images per second and the share of time between steps, which is the wait for data.

    Says once, after ``settled`` steps or at the end, how long the first batch took and what was measured since.
    Validation does not count. Each process measures itself; images are those of all of them.
    """

    def __init__(self, settled: int = 50) -> None:
        self.settled = settled
        self.first_batch: float | None = None
        self._steps = self._images = 0
        self._waiting = self._working = 0.0
        self._mark: float | None = None
        self._told = False

    @property
    def images_per_second(self) -> float:
        """Since the first step, over all processes."""
        return self._images / max(self._waiting + self._working, 1e-9)

    @property
    def waiting(self) -> float:
        """The share of the time since the first step that went by between steps, in [0, 1]."""
        return self._waiting / max(self._waiting + self._working, 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the first batch."""
        self.__init__(self.settled)
        self._mark = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The wait is over."""
        now = time.monotonic()
        if self.first_batch is None:
            self.first_batch = now - self._mark
        elif self._mark is not None:
            self._waiting += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is over. The first one, which warms up, is left out."""
        now = time.monotonic()
        if self._steps:
            self._working += now - self._mark
            self._images += images_of(batch) * trainer.world_size
        self._steps, self._mark = self._steps + 1, now
        if self._steps == self.settled:
            self._tell()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out."""
        self._mark = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it now, where the run was short."""
        self._tell()

    def _tell(self) -> None:
        if not self._told and self._images:
            self._told = True
            rank_zero_info(
                f"first batch after {self.first_batch:.1f} s; since then {self.images_per_second:,.0f} images/s, and "
                f"{self.waiting:.0%} of the time waits for data"
            )


def images_of(batch: Any) -> int:
    """How many images a batch has: the rows of "image", else of its first tensor; 0 where there is none."""
    if isinstance(batch, Mapping):
        batch = [batch["image"]] if "image" in batch else list(batch.values())
    parts = [batch] if isinstance(batch, Tensor) else batch if isinstance(batch, list | tuple) else []
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 0)


def memory() -> str:
    """The most memory that this process has held: the GPU's, else the machine's; "" where the system keeps none."""
    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
