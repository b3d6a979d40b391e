"""Parameter groups and the per-step learning-rate schedule of all trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """The learning rate's factor: linear from 1/warmup_steps to 1, then a half cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def check_settings(learning_rate: float, weight_decay: float, warmup_steps: int) -> None:
    """ValueError: a setting of the optimiser with which nothing can be trained."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate {learning_rate} must be positive and finite")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay {weight_decay} must not be negative; 0 leaves it out")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps {warmup_steps} must not be negative; 0 leaves it out")


def parameter_groups(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    new: Iterable[nn.Parameter] = (),
    new_factor: float = 1.0,
) -> list[dict]:
    """AdamW groups of the trainable parameters. Weight decay applies to matrices, not to gains, biases and vectors.

    A stack of vectors looks like a matrix; a module names its own in ``vectors``, a tuple of parameters' names.
    new: parameters without pretrained values; their learning rate is ``new_factor`` times the others'.
    """
    fresh = {id(p) for p in new}
    vectors = {id(getattr(part, name)) for part in module.modules() for name in getattr(part, "vectors", ())}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in vectors
            groups.setdefault((decays, id(parameter) in fresh), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (new_factor if is_new else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (decays, is_new), parameters in groups.items()
    ]


def configure(
    groups: list[dict], warmup_steps: int, total_steps: int, betas: tuple[float, float] = (0.9, 0.98)
) -> dict:
    """AdamW with the schedule of ``scheduled``, as ``configure_optimizers`` returns it to Lightning."""
    # Not fused: under mixed precision, Lightning refuses to clip gradients for a fused optimiser.
    return scheduled(AdamW(groups, betas=betas, eps=1e-6, foreach=True), warmup_steps, total_steps)


def scheduled(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> dict:
    """An optimiser with linear warm-up and cosine decay, stepped per batch, in Lightning's format.

    ValueError: the run's length is unknown, or not above the warm-up.
    """
    if total_steps <= 0 or math.isinf(total_steps):
        raise ValueError("the schedule needs the run's length: set trainer.max_steps or trainer.max_epochs")
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} is not below the run's {total_steps} steps; shorten the warm-up")
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
