"""Muon for matrices and AdamW for all else, as one optimiser.

Shapes: N matrices of R rows and C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 by which every step raises the singular values (Jordan et al., 2024)."""
_STEPS = 5


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) steps the groups marked ``"muon": True``, AdamW the others.

    Muon replaces the Nesterov momentum of a matrix by about the nearest matrix with orthonormal rows or columns. Its
    step is scaled to the root mean square of AdamW's (Liu et al., 2025), so that both take the same rates:

        W <- (1 - lr * decay) * W - lr * 0.2 * sqrt(max(R, C)) * orthonormal(momentum)

    It is ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` with two changes for speed: matrices of one shape are
    orthonormalised together, and on a CPU in float32. torch's always takes bfloat16, in which a CPU without units for
    it multiplies matrices 30 times slower. Lightning's automatic optimisation, with its clipping and its schedules,
    asks for a single optimiser, so AdamW stands inside.

    Args:
        groups: parameter groups with "lr", "muon" and perhaps "weight_decay" (else 0); one with Muon holds 2-D
            parameters alone.
        betas, eps: AdamW's.
    ValueError: one of both has nothing to step, or a group has no "lr".
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        matrices, others = ([group for group in groups if group["muon"] is muon] for muon in (True, False))
        if not matrices or not others:
            lacking = "matrices of transformer blocks" if others else "parameters beside the blocks' matrices"
            raise ValueError(f"optimizer muon finds no {lacking} to train here; take adamw")
        super().__init__(groups, {})
        self._adamw = AdamW(others, betas=betas, eps=eps, foreach=True)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step further parameters too, such as those of a part that is unfrozen; by Muon if "muon" says so.

        ValueError: the group has no "lr".
        """
        if "lr" not in param_group:
            raise ValueError('a parameter group of optimizer muon has no learning rate of its own; give it "lr"')
        param_group.setdefault("muon", False)
        param_group.setdefault("weight_decay", 0.0)
        super().add_param_group(param_group)
        if hasattr(self, "_adamw") and not param_group["muon"]:  # the constructor hands AdamW its groups itself
            self._adamw.add_param_group(param_group)

    def _share(self) -> None:
        """Let AdamW work on this optimiser's groups and state, which checkpoints and schedules know."""
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict``, as other optimisers do."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts; returns what ``closure`` returns."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape, matrix.device, matrix.dtype].append(matrix)
        for (shape, *_), matrices in alike.items():
            gradients = [matrix.grad for matrix in matrices]
            momenta = [self._momentum(matrix) for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            updates = orthonormal(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype)), alpha=-rate)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        return state["momentum_buffer"]


def orthonormal(matrices: Tensor) -> Tensor:
    """Each matrix with all singular values near 1 (.7 to 1.2), by a Newton-Schulz iteration; fp32 or bf16 [N,R,C].

    matrices: [N,R,C].  On a CPU the iteration runs in float32, elsewhere in bfloat16, as published.
    """
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    # Frobenius norms bound the singular values, which must not exceed 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.baddbmm(x, factor, x, beta=first)
    return x.mT if tall else x
