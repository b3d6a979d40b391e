"""An explicit step before inference on a CPU: linear maps by oneDNN, on weights that are packed once.

Shapes: D inputs of a linear map, K outputs.
"""

from __future__ import annotations

import time
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from common.attention import Attention

_Model = TypeVar("_Model", bound=nn.Module)

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
"""Whether this build of PyTorch has oneDNN's linear map on packed weights."""
BF16_PRODUCTS = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this processor multiplies in bf16. Where it does not, oneDNN's call is an error, and torch's emulation takes
ten times as long as fp32."""

_DTYPES = (*[torch.float32] * ONEDNN, *[torch.bfloat16] * BF16_PRODUCTS)
_MAPS = {nn.Linear: ("forward", "weight", "bias"), Attention: ("project", "in_proj_weight", "in_proj_bias")}
"""Type of a module -> the method that is a linear map, and the names of its parameters."""
_ROUNDS = 5
_TOKENS, _INPUTS, _OUTPUTS = 197, 768, 3072  # the first linear map of ViT-B/16's MLP, for one image


def chosen_device(device: str | None) -> str:
    """A device by its name; None: a GPU where there is one. ValueError: nothing can be computed on it here."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no GPU is found here; give --device cpu")
    try:
        torch.ones(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        raise ValueError(
            f"device {device!r} computes nothing here ({str(error).splitlines()[0]}); give cpu, cuda or cuda:1"
        ) from error
    return device


def optimize_for_inference(model: _Model) -> _Model:
    """Run the model's linear maps on packed weights if that is faster here; returns the same model.

    The maps are every ``nn.Linear`` (subclasses aside) and the first projection of every ``Attention``. Results
    differ by rounding alone. Which product is faster is measured once in a process for each dtype. On a GPU, and
    where ``F.linear`` is faster, nothing changes.

    Parameters and the types of modules stay as they are: saving, copying, ``train``, ``to``, quantisation and a
    second call behave as on the plain model. Packed weights take as much memory again. A map packs its weight at its
    first use, and again if the weight has changed (a write through ``.data`` is not seen). Gradients, autocast,
    compilers, tracers, ``torch.func`` and dispatch modes get ``F.linear``.
    """
    for module in model.modules():
        if type(module) not in _MAPS:
            continue
        method, *names = _MAPS[type(module)]
        weight = getattr(module, names[0])
        if method not in vars(module) and weight.device.type == "cpu" and packed_is_faster(weight.dtype):
            setattr(module, method, PackedMap(module, *names))
    return model


@cache
def packed_is_faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN on a packed weight is faster than ``F.linear`` here, by the fastest of five alternating rounds."""
    if dtype not in _DTYPES:
        return False
    shapes = (_TOKENS, _INPUTS), (_OUTPUTS, _INPUTS), (_OUTPUTS,)
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in shapes)
    plain = partial(F.linear, weight=weight, bias=bias)
    packed = PackedMap(SimpleNamespace(weight=weight, bias=bias), "weight", "bias")
    seconds: dict[Any, list[float]] = {plain: [], packed: []}
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            for linear, times in seconds.items():
                start = time.perf_counter()
                linear(x)
                times.append(time.perf_counter() - start)
    return min(seconds[packed][1:]) < min(seconds[plain][1:])  # the first round warms up


class PackedMap:
    """x W^T + b for two tensors of a module, x [...,D] -> [...,K]. A copy packs its weight anew."""

    def __init__(self, module: nn.Module | SimpleNamespace, weight: str, bias: str) -> None:
        self._module, self._weight, self._bias = module, weight, bias
        self._state: tuple[Tensor, int, Tensor] | None = None  # what was packed, its version, and packed

    def __reduce__(self) -> tuple:
        return PackedMap, (self._module, self._weight, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self._module, self._weight), getattr(self._module, self._bias)
        if _observed() or not _multiplies(x, weight):
            return F.linear(x, weight, bias)
        version = 0 if weight.is_inference() else weight._version
        state = self._state
        if state is None or version != state[1] or not _same(weight, state[0]):
            # Holding the source keeps its memory from becoming another weight's.
            source = weight.detach()
            self._state = state = source, version, torch.ops.mkldnn._reorder_linear_weight(source)
        return torch.ops.mkldnn._linear_pointwise(x, state[2], bias, "none", [], "")


def _observed() -> bool:
    """Whether something records, transforms or watches the operations that run now."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
    )


def _multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies the two: ordinary tensors on the CPU, of one dtype that it knows."""
    ordinary = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return ordinary and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _DTYPES


def _same(weight: Tensor, source: Tensor) -> bool:
    """Whether both are one piece of memory, read in one way."""
    return weight.data_ptr() == source.data_ptr() and weight.dtype == source.dtype and weight.shape == source.shape
