"""Stop a training at its first loss or gradient that is not finite, before the optimiser spoils the weights."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class StopOnNonFinite(Callback):
    """Raises on all processes at the first step whose loss or gradient norm is NaN or infinite.

    The weights are then those of the step before, and a checkpoint of the stop is one of finite weights. Under a
    loss scaler (precision 16-mixed) only the loss is looked at: the scaler skips steps whose gradients overflow.

    Raises:
        ValueError: with the step, the loss, the norm and the learning rate.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss; of several that one step accumulates, the sum, which is finite if all are."""
        loss = loss.detach().float().sum()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at loss and gradients, which are complete and not yet clipped."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(gradients) if gradients else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded over processes
        loss, self._loss = self._loss, None
        here = loss is None or bool(torch.isfinite(loss))
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            here = here and bool(torch.isfinite(norm))
        everywhere = trainer.strategy.reduce_boolean_decision(here, all=True) if trainer.world_size > 1 else here
        if everywhere:
            return
        value = "unknown" if loss is None else f"{float(loss):.4g}"
        what = f"the loss is {value} and the gradient norm {float(norm):.4g}"
        rates = ", ".join(sorted({f"{group['lr']:.3g}" for group in optimizer.param_groups}))
        raise ValueError(
            f"step {trainer.global_step + 1}: {'another process stopped' if here else what} at learning rate {rates}; "
            "the weights before this step are kept, and --ckpt_path last goes on from them, best with a lower learning "
            "rate or a longer warm-up"
        )
