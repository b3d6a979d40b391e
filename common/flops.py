"""Multiply-add counts, in the two conventions that the papers' tables mix.

Shapes: B inputs, L queries, M keys, D width, V value width, N points of a Fourier transform.

One fused multiply-add is one MAC; what the papers call GFLOPs are GMACs.

* ``gmacs_paper``: fvcore's default count, which most of the tables print: linear layers, convolutions, explicit
  matrix products, normalisations (5 per value), poolings and resizing, without the two products inside the fused
  attention kernel. The ViT-B/16 image tower has 16.87.
* ``gmacs``: the same plus attention and Fourier transforms. The ViT-B/16 image tower has 17.58.

Elementwise operations, reductions, look-ups and copies are free in both. Any other operation is an error, so no
expensive operation is silently left out.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

with warnings.catch_warnings():
    # fvcore scripts losses of its own while it is imported, which every command would show.
    warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, get_shape

# Matrix products: operator -> index of the input whose last dimension is contracted.
_PRODUCTS = {
    "linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "mv": 0, "dot": 0,
    "addmm": 1, "_addmm_activation": 1, "addmv": 1,
}  # fmt: skip

# Free operations beside fvcore's own list: elementwise, reductions, sorting, look-ups, copies.
_FREE = set(
    """
    abs acos add addcdiv addcmul adaptive_max_pool2d alias all amax amin any argmax argmin argsort
    as_strided avg_pool2d avg_pool1d bernoulli bitwise_and bitwise_or broadcast_tensors broadcast_to
    ceil clamp_max clamp_min clone complex concat conj _conj cos cumsum diagonal diagonal_copy diff div
    elu embedding empty_like erf exp expand_as expm1 eye exponential fill fft_fftshift fft_ifftshift
    flip frobenius_norm gelu hardsigmoid hardswish hardtanh imag index_add index_copy index_fill
    index_put index_select isfinite isinf isnan item le leaky_relu lerp lift_fresh linspace
    linalg_vector_norm log log1p log2 log_sigmoid log_softmax logical_and logical_not logical_or
    logical_xor logsumexp lt masked_scatter masked_select max_pool2d maximum mean min minimum movedim
    mul multiply nan_to_num ne neg new_ones norm normal numel numpy_T ones_like pad pixel_shuffle
    pixel_unshuffle pow prelu prod rand rand_like randn randn_like real reciprocal relu6 repeat
    repeat_interleave resolve_conj resolve_neg round rsqrt rsub scalar_tensor scatter scatter_add
    scatter_reduce sigmoid sign silu sin softmax softplus sort sqrt square std sub subtract sum
    swapaxes take_along_dim tan tanh tensor tensor_split tile topk tril triu true_divide unflatten
    unfold uniform _unique2 unique_consecutive unsafe_chunk unsafe_split var var_mean view_as
    view_as_complex view_as_real where zero mT
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Macs:
    """The cost of one forward pass over a whole batch.

    gmacs: 1e9 multiply-adds, including attention and Fourier transforms.
    gmacs_paper: the same without those two, as fvcore counts by default.
    gmacs_fft: the Fourier transforms' part of ``gmacs``.
    by_module: ``gmacs`` of every submodule by name ("" is the whole model); a parent includes its children.
    params: number of parameters.
    """

    gmacs: float
    gmacs_paper: float
    gmacs_fft: float
    by_module: dict[str, float]
    params: int


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> Macs:
    """The cost of ``module(*inputs)`` without gradients, in evaluation mode (the module's mode is restored).

    The count is for the whole batch: two images cost twice as much as one. The module really runs, so meta tensors
    do not work.
    ValueError: an operation of unknown cost that is not listed as free.
    """
    analysis = FlopCountAnalysis(_Traced(module), inputs)
    analysis.set_op_handle(**_HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with _inference(module):
        counts = analysis.by_module_and_operator()
    unknown = {op for op in analysis.unsupported_ops() if op.removeprefix("aten::").rstrip("_") not in _FREE}
    if unknown:
        raise ValueError(f"no cost is known for {', '.join(sorted(unknown))}; give it a handle or list it as free here")
    total = counts[""]
    return Macs(
        gmacs=sum(total.values()) / 1e9,
        gmacs_paper=(sum(total.values()) - total["attention"] - total["fft"]) / 1e9,
        gmacs_fft=total["fft"] / 1e9,
        by_module={
            name.removeprefix("module").removeprefix("."): sum(operators.values()) / 1e9
            for name, operators in counts.items()
            if name
        },
        params=sum(parameter.numel() for parameter in module.parameters()),
    )


def expected_macs(paths: Sequence[Macs], fractions: Sequence[float]) -> Macs:
    """The mean cost of a model whose inputs take different paths: a share ``fractions[i]`` takes ``paths[i]``.

    ``params`` is that of the largest path. ValueError: lengths differ, a negative fraction, or a sum other than 1.
    """
    if len(paths) != len(fractions) or not paths:
        raise ValueError(f"{len(paths)} paths and {len(fractions)} fractions; give one fraction for each path")
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions {list(fractions)} must be at least 0 and sum to 1")
    pairs = list(zip(paths, fractions, strict=True))
    names = {name for path in paths for name in path.by_module}
    return Macs(
        gmacs=sum(path.gmacs * share for path, share in pairs),
        gmacs_paper=sum(path.gmacs_paper * share for path, share in pairs),
        gmacs_fft=sum(path.gmacs_fft * share for path, share in pairs),
        by_module={name: sum(path.by_module.get(name, 0.0) * share for path, share in pairs) for name in names},
        params=max(path.params for path in paths),
    )


class _Traced(nn.Module):
    """A module that returns every tensor in the results of all submodules.

    The tracer drops operations that lead to no output, but a discarded result costs as much as any other.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept: list[torch.Tensor] = []
        hooks = [
            part.register_forward_hook(lambda part, given, result: kept.extend(_tensors(result)))
            for part in self.module.modules()
        ]
        try:
            self.module(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(kept)


def _tensors(result) -> Iterator[torch.Tensor]:
    """Every tensor in a result: in its sequences, mappings and objects' attributes, modules aside."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple | dict):
        for part in result.values() if isinstance(result, dict) else result:
            yield from _tensors(part)
    elif not isinstance(result, nn.Module):  # a reducer's context names its block, which is no result
        for part in getattr(result, "__dict__", {}).values():
            yield from _tensors(part)


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without torch's fast path for attention, which hides its layers."""
    modes = {part: part.training for part in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, training in modes.items():
            part.training = training


def _product(contracted: int):
    """A product of matrices or vectors: number of result values times the contracted dimension."""
    return lambda inputs, outputs: math.prod(get_shape(outputs[0])) * get_shape(inputs[contracted])[-1]


def _attention(inputs, outputs) -> Counter:
    """Query-key and attention-value products, masked or not: L M (D + V) per head."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return Counter(attention=math.prod(get_shape(outputs[0])[:-1]) * key[-2] * (query[-1] + value[-1]))


def _masked_product(inputs, outputs) -> Counter:
    """``baddbmm``, by which unfused attention adds its mask; fvcore skips it, so ``gmacs_paper`` does too."""
    return Counter(attention=_product(1)(inputs, outputs))


def _convolution(inputs, outputs) -> Counter:
    """A convolution; a grouped one counts its smaller filters."""
    image, kernel = (get_shape(tensor) for tensor in inputs[:2])
    transposed = inputs[3 if len(inputs) < 9 else 6].toIValue()
    return Counter(conv=conv_flop_count(image, kernel, get_shape(outputs[0]), transposed=bool(transposed)))


def _padded_convolution(inputs, outputs) -> Counter:
    """A convolution whose padding is a word, such as "valid"."""
    image, kernel = (get_shape(tensor) for tensor in inputs[:2])
    return Counter(conv=conv_flop_count(image, kernel, get_shape(outputs[0])))


def _einsum(inputs, outputs) -> int:
    """An einsum of two operands: the exact product of all index sizes (fvcore rounds to four digits)."""
    equation = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [get_shape(operand) for operand in inputs[1].node().inputs()]
    if len(equation) != 2 or "." in "".join(equation):
        raise ValueError(f"einsum {','.join(equation)!r}: only two operands without '...' are counted; use matmul")
    sizes = {
        label: size
        for term, shape in zip(equation, shapes, strict=True)
        for label, size in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values())


def _resized(taps: int):
    """Antialiased resizing, one axis after the other: ``taps`` times the ratio of the sides for each value."""

    def handle(inputs, outputs) -> Counter:
        (*channels, height, width), (*_, rows, columns) = get_shape(inputs[0]), get_shape(outputs[0])
        across = height * columns * max(width / columns, 1)
        down = rows * columns * max(height / rows, 1)
        return Counter(resize=round(taps * math.prod(channels) * (across + down)))

    return handle


def _integers(value) -> list[int] | None:
    """A traced constant as a list of integers; None when the argument was omitted."""
    if value.node().kind() == "prim::ListConstruct":
        return [item.toIValue() for item in value.node().inputs()]
    constant = value.toIValue()
    return [constant] if isinstance(constant, int) else constant


def _fourier(name: str):
    """A transform of N points: 2.5 N log2 N multiply-adds; half of that if its input or output is real."""
    real = name.startswith(("rfft", "irfft"))
    axes = {"2": [-2, -1], "n": None}.get(name[-1], [-1])

    def handle(inputs, outputs) -> Counter:
        # The signal's shape is the output's, except in a forward real transform, whose output is shorter.
        shape = list(get_shape(inputs[0] if name.startswith("rfft") else outputs[0]))
        sizes, dims = _integers(inputs[1]), _integers(inputs[2]) or axes or list(range(len(shape)))
        for dim, size in zip(dims, sizes or [], strict=False):
            shape[dim] = size
        points = math.prod(shape[dim] for dim in dims)
        return Counter(fft=round((1.25 if real else 2.5) * math.prod(shape) * math.log2(points)))

    return handle


_HANDLES = {
    **{f"aten::{name}": _product(contracted) for name, contracted in _PRODUCTS.items()},
    **{
        f"aten::fft_{kind}{axes}": _fourier(kind + axes)
        for kind in ("fft", "ifft", "rfft", "irfft")
        for axes in ("", "2", "n")
    },
    "aten::scaled_dot_product_attention": _attention,
    "aten::baddbmm": _masked_product,
    "aten::_convolution": _convolution,
    "aten::_convolution_mode": _padded_convolution,
    "aten::einsum": _einsum,
    "aten::_upsample_bilinear2d_aa": _resized(2),
    "aten::_upsample_bicubic2d_aa": _resized(4),
}
_HANDLES |= {f"{name}_": handle for name, handle in _HANDLES.items()}  # the in-place forms
