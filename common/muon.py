"""Muon for matrices and AdamW for all else, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from common.inference import BF16_PRODUCTS


class _FP32(TorchFunctionMode):
    """What would become bf16 on a CPU becomes fp32."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].to(torch.float32, copy=True)
        return function(*args, **(options or {}))


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) steps the groups marked ``"muon": True``, AdamW the others.

    Muon replaces the momentum of a matrix by the nearest matrix with orthonormal rows or columns. Its step is scaled
    to the root mean square of AdamW's (Liu et al., 2025), so that both take the same rates. Lightning's automatic
    optimisation, with its clipping and its schedules, asks for a single optimiser.

    torch iterates towards that matrix in bf16. A CPU without such products emulates them, which took two thirds of a
    small tower's training step. There the iteration is in fp32.

    Args:
        groups: parameter groups with "lr", "weight_decay" and "muon"; a group with Muon holds 2-D parameters alone.
        betas, eps: AdamW's.
    ValueError: one of both has nothing to step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        matrices, others = ([group for group in groups if group["muon"] is muon] for muon in (True, False))
        if not matrices or not others:
            lacking = "matrices of transformer blocks" if others else "parameters beside the blocks' matrices"
            raise ValueError(f"optimizer muon finds no {lacking} to train here; take adamw")
        super().__init__(groups, {})
        self._muon = Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, betas=betas, eps=eps, foreach=True)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step further parameters too, such as those of a part that is unfrozen; by Muon if "muon" says so."""
        param_group.setdefault("muon", False)
        super().add_param_group(param_group)
        if hasattr(self, "_muon"):  # the constructor hands its groups to the parts itself
            (self._muon if param_group["muon"] else self._adamw).add_param_group(param_group)

    def _share(self) -> None:
        """Let both parts work on this optimiser's groups and state, which checkpoints and schedules know."""
        for part in (self._muon, self._adamw):
            part.param_groups = [group for group in self.param_groups if group["muon"] is (part is self._muon)]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict``, as other optimisers do."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts; returns what ``closure`` returns."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with nullcontext() if BF16_PRODUCTS else _FP32():
            self._muon.step()
        self._adamw.step()
        return loss
