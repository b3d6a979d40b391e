"""Callbacks that change how the blocks of every tower run in a training: compiled, or with less memory.

A block is a module with the parts ``ln_1`` and ``mlp``, open_clip's names: those of the transformers and MLIP's Fourier
blocks. Parameters and their names stay as they are, and so do checkpoints. A block that a reducer interrupts (MLIP's
merging) or that fills a cache of keys runs as before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, partial
from types import MethodType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.tower import KVCache

Forward = Callable[..., Tensor]


class ChangeBlocks(Callback):
    """Replaces the forward pass of every block by ``change`` of it, from the start of a fit to its end."""

    @abstractmethod
    def change(self, forward: Forward) -> Forward:
        """Another way to compute ``forward(block, x)`` and ``forward(block, x, mask)``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the blocks, after every callback's setup has seen the plain ones."""
        change = cache(lambda forward: _unless_cached(self.change(forward)))  # one for all blocks of a class
        for block in _blocks(pl_module):
            block.forward = MethodType(change(block.forward.__func__), block)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the blocks their class's forward pass back."""
        for block in _blocks(pl_module):
            vars(block).pop("forward", None)


class CheckpointBlocks(ChangeBlocks):
    """Keeps the input of each block instead of its activations, and makes these again in the backward pass.

    The gradient is the same, for one more forward pass.
    Usage: ``--trainer.callbacks+ common.switches.CheckpointBlocks``.
    """

    def change(self, forward: Forward) -> Forward:
        """torch.utils.checkpoint, which does nothing where no gradient is recorded."""
        return partial(checkpoint, forward, use_reentrant=False)


class CompileBlocks(ChangeBlocks):
    """Compiles the blocks at their first step: minutes on a first start, then faster steps.

    Usage: ``--trainer.callbacks+ common.switches.CompileBlocks``.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        names = torch.compiler.list_backends(exclude_tags=())
        if backend not in names:
            raise ValueError(f"backend {backend!r} is none of {', '.join(names)}")
        self.backend = backend

    def change(self, forward: Forward) -> Forward:
        """``torch.compile``, which compiles a block once for all blocks of the same sizes."""
        return torch.compile(forward, backend=self.backend)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "ln_1") and hasattr(part, "mlp")]


def _unless_cached(changed: Forward) -> Forward:
    """``changed`` under the signature of ``Block.forward``; calls with a cache go to the class's own forward.

    A second pass would add the keys again. The layer's number matters to caches alone, and as an input it would be
    compiled anew for each layer.
    """

    def forward(
        block: nn.Module, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        if cache is not None:
            return type(block).forward(block, x, mask, cache, layer)
        return changed(block, x) if mask is None else changed(block, x, mask)

    return forward
