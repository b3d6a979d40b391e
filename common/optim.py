"""Parameter groups, optimisers and the per-step learning-rate schedule of all trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.muon import MuonAdamW
from common.tower import Block

OptimizerName = Literal["adamw", "muon"]
"""adamw: all parameters by AdamW. muon: the matrices of the towers' blocks by Muon, all else by AdamW."""


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """The learning rate's factor: linear from 1/warmup_steps to 1, then a half cosine to final at total_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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
    optimizer: OptimizerName = "adamw",
) -> list[dict]:
    """The trainable parameters in groups for ``configure``.

    Weight decay applies to parameters of two dimensions or more, not to gains, biases and vectors. A stack of vectors
    looks like a matrix; a module names its own in ``vectors``, a tuple of parameters' names. Class and position tokens
    of timm's towers, [1,1,W] and [1,N,W], decay, as in open_clip's training.
    Frozen parameters are left out: what is unfrozen later goes to the optimiser's ``add_param_group``.
    new: parameters without pretrained values; their learning rate is ``new_factor`` times the others'.
    optimizer: with muon, each group's "muon" says whether it holds matrices of blocks: the 2-D parameters of every
        ``Block``, and of modules that say ``is_block``.
    ValueError: no optimiser has that name.
    """
    if optimizer not in get_args(OptimizerName):
        raise ValueError(f"optimizer {optimizer!r} is none of {', '.join(get_args(OptimizerName))}")
    fresh = {id(p) for p in new}
    parts = list(module.modules())
    vectors = {id(getattr(part, name)) for part in parts for name in getattr(part, "vectors", ())}
    blocks = [part for part in parts if isinstance(part, Block) or getattr(part, "is_block", False)]
    inner = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2 and optimizer == "muon"}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in vectors
            kind = decays, id(parameter) in fresh, id(parameter) in inner
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (new_factor if is_new else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        | ({"muon": muon} if optimizer == "muon" else {})
        for (decays, is_new, muon), parameters in groups.items()
    ]


def configure(
    groups: list[dict],
    warmup_steps: int,
    total_steps: int,
    betas: tuple[float, float] = (0.9, 0.98),
    final: float = 0.0,
) -> dict:
    """The optimiser of the groups with the schedule of ``scheduled``, as ``configure_optimizers`` returns it.

    betas: AdamW's.  final: see ``scheduled``.
    The optimiser's ``load_state_dict`` raises ValueError for a checkpoint that the other of both optimisers made.
    """
    if _name(groups) == "muon":
        optimizer: Optimizer = MuonAdamW(groups, betas=betas, eps=1e-6)
    else:  # not fused: under mixed precision, Lightning refuses to clip gradients for a fused optimiser
        optimizer = AdamW(groups, betas=betas, eps=1e-6, foreach=True)
    optimizer.register_load_state_dict_pre_hook(lambda own, state: refuse_another(state, _name(own.param_groups)))
    return scheduled(optimizer, warmup_steps, total_steps, final)


def _name(groups: list[dict]) -> OptimizerName:
    """Whose groups these are."""
    return "muon" if any("muon" in group for group in groups) else "adamw"


def refuse_another(state: dict, ours: OptimizerName) -> None:
    """ValueError: an optimiser's state is of the other one, whose momenta mean something else."""
    theirs = _name(state["param_groups"])
    if theirs != ours:
        raise ValueError(
            f"the checkpoint was made with optimizer {theirs}, this training has optimizer {ours}; set optimizer to "
            f"{theirs} to go on, or begin a new training with {ours}"
        )


def scheduled(optimizer: Optimizer, warmup_steps: int, total_steps: int, final: float = 0.0) -> dict:
    """An optimiser with linear warm-up and cosine decay, stepped per batch, in Lightning's format.

    final: the last rate's share of the peak rate.
    ValueError: the run's length is unknown, or not above the warm-up.
    """
    if total_steps <= 0 or math.isinf(total_steps):
        raise ValueError("the schedule needs the run's length: set trainer.max_steps or trainer.max_epochs")
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} is not below the run's {total_steps} steps; shorten the warm-up")
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps, final))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
