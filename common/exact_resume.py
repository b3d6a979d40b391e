"""A run that goes on ends as one that was never stopped: random numbers, and the optimiser's settings."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR


def random_state() -> dict[str, Any]:
    """The state of every generator that a training may draw from, in plain values and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  what others draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator where ``random_state`` found it, that of the current GPU too where there is one."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class ExactResume(Callback):
    """Keeps the random state of the last finished step in each checkpoint, and takes it up where a run goes on.

    A validation between two steps draws nothing from the training's generators. Of several processes the first
    one's state is kept, its GPU's for every other's GPU; Lightning seeds all of them alike.

    Also lets learning rate, weight decay and schedule be what the configuration says now, where Lightning would
    restore those of the checkpoint. Where nothing was changed, nothing changes.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._restore = False
        self._settings: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the configuration says of the optimisers, before Lightning restores their state."""
        self._settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the configuration's settings of the optimisers win over the restored ones."""
        if trainer.ckpt_path is None or trainer.global_step == 0:
            return
        schedules = {id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs}
        changed: set[str] = set()
        for optimizer, groups in zip(trainer.optimizers, self._settings, strict=True):
            schedule = schedules.get(id(optimizer))
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                for name in configured.keys() - ({"lr"} if schedule else set()):
                    if group.get(name) != configured[name]:
                        label = "learning rate" if name in ("lr", "initial_lr") else name
                        changed.add(f"{label} was {group.get(name)}, is {configured[name]}")
                        if name == "initial_lr" and group[name]:
                            group["lr"] *= configured[name] / group[name]
                        group[name] = configured[name]
            if isinstance(schedule, LambdaLR):
                _reschedule(schedule)
        if changed:
            rank_zero_info(f"from the configuration, not the checkpoint: {'; '.join(sorted(changed))}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take up the checkpoint's random state, once data and workers have drawn what they need."""
        if self._restore and self._state is not None:
            set_random_state(self._state)
        self._restore = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state that the next step begins with."""
        self._state = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what a validation between two steps drew."""
        if self._state is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            set_random_state(self._state)

    def state_dict(self) -> dict[str, Any]:
        """The random state after the last finished step."""
        return self._state or random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first batch."""
        self._state, self._restore = state_dict, True


def _reschedule(schedule: LambdaLR) -> None:
    """Let a schedule start from the groups' ``initial_lr``: the rates of the next step are base x factor(step)."""
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]
