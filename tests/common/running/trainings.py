"""A tiny training that draws random numbers, and callbacks that strike it at one of its steps."""

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Callback

from common.pretraining import CLIPPretraining


class NoisyPretraining(CLIPPretraining):
    """CLIP whose loss depends on torch's random numbers, so that a run resumes exactly only with their state."""

    def loss(self, batch):
        return super().loss(batch) * (1 + 0.1 * torch.rand(()))


class Spoiled(NoisyPretraining):
    """One whose loss is NaN from step 4 on."""

    def loss(self, batch):
        return super().loss(batch) * (float("nan") if self.global_step >= 4 else 1)


class Strike(Callback):
    """Sends this process a signal in the midst of one of its steps, between forward and backward pass."""

    def __init__(self, at: int, number: str) -> None:
        self.at, self.number = at, number

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), getattr(signal, self.number))


class FillDisk(Callback):
    """Fills the disk of a folder at one step, and makes room again at another (-1: never).

    On a disk that others use too, a limit on the size of this process's files stands for the fullness.
    """

    def __init__(self, folder: str, full: int, room: int) -> None:
        self.folder, self.full, self.room = Path(folder), full, room

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        disk_of_its_own = os.path.ismount(self.folder)
        if trainer.global_step == self.full:
            _fill(self.folder / "filling") if disk_of_its_own else _limit(100)
        if trainer.global_step == self.room:
            (self.folder / "filling").unlink() if disk_of_its_own else _limit(resource.RLIM_INFINITY)


def _fill(path):
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def _limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
