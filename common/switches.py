"""Callbacks that change how the blocks of a model train: with less memory, or compiled."""

from __future__ import annotations

from types import MethodType

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.attention import KVCache, Mask


class CheckpointBlocks(Callback):
    """Keeps the input of each block, and makes its activations again in the backward pass.

    The gradient is the same, for one more forward pass. A block is a module with the parts ``ln_1`` and ``mlp``,
    open_clip's names: those of the transformers and MLIP's Fourier blocks. Parameters and their names stay as they are.
    A block that a reducer interrupts (MLIP's merging) or that fills a cache of keys runs as before.
    Usage: ``--trainer.callbacks+ common.switches.CheckpointBlocks``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the blocks, after every callback's setup has seen the plain ones."""
        for block in _blocks(pl_module):
            block.forward = MethodType(_checkpointed, block)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the blocks their class's forward pass back."""
        for block in _blocks(pl_module):
            vars(block).pop("forward", None)


class CompileBlocks(Callback):
    """Compiles every block with ``torch.compile`` for the fit; losses and gradients differ by rounding alone.

    Blocks are alike, so the graphs of one serve all: one for each kind of block, mask and mode. Parameters, their
    names and checkpoints stay as they are. A block that a reducer interrupts (MLIP's merging) runs as before.
    backend: of ``torch.compile``; "inductor" needs a C++ compiler on a CPU.
    Usage: ``--trainer.callbacks+ common.switches.CompileBlocks``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile the blocks; each graph is made at its first use."""
        for block in _blocks(pl_module):
            block.compile(backend=self.backend)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the blocks their plain call back."""
        for block in _blocks(pl_module):
            block._compiled_call_impl = None


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "ln_1") and hasattr(part, "mlp")]


def _checkpointed(
    block: nn.Module, x: Tensor, mask: Mask = None, cache: KVCache | None = None, layer: int = 0
) -> Tensor:
    """The block's own forward pass, checkpointed unless it fills a cache: a second pass would add the keys again."""
    forward = type(block).forward
    if cache is not None:
        return forward(block, x, mask, cache, layer)
    inputs = (block, x) if mask is None else (block, x, mask)
    return checkpoint(forward, *inputs, use_reentrant=False)
