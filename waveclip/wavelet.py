"""Two-dimensional discrete wavelet transform of exact half sizes, and its inverse.

Shapes: B images, C channels, S height and width, h = S / 2^level, L filter length.

Sub-bands are named as in PyWavelets: LL, then horizontal, vertical and diagonal detail (cA, cH, cV, cD). The
boundary is periodic ("periodization"), since then S halves exactly for every filter and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import ptwt
import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

Transform = Literal["conv", "ptwt"]
"""One strided convolution, or ptwt's own call (haar only: other filters change ptwt's sizes)."""


def filters(wavelet: str) -> Tensor:
    """The four analysis filters of an orthogonal wavelet as correlation kernels [4,L,L]: LL, H, V, D, on the CPU.

    ValueError: an unknown wavelet, or one that is not orthogonal.
    """
    return torch.from_numpy(_filters(wavelet).copy())


@lru_cache
def _filters(wavelet: str) -> np.ndarray:
    # In numpy: a cached tensor would belong to the first caller's mode (inference, a tracer, a device).
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"unknown wavelet {wavelet!r}; use one of PyWavelets' discrete ones, such as haar or db2")
    filter_bank = pywt.Wavelet(wavelet)
    if not filter_bank.orthogonal or wavelet == "dmey":  # cut short, it is orthogonal to two digits only
        raise ValueError(f"wavelet {wavelet!r} is not orthogonal; use haar, dbN, symN or coifN")
    low, high = np.array(filter_bank.dec_lo)[::-1], np.array(filter_bank.dec_hi)[::-1]
    return np.stack([np.outer(*pair) for pair in ((low, low), (high, low), (low, high), (high, high))])


def check_transform(wavelet: str, transform: Transform) -> None:
    """ValueError: an unfit wavelet (see ``filters``), no such transform, or ptwt with another filter than haar."""
    filters(wavelet)
    if transform not in ("conv", "ptwt"):
        raise ValueError(f"transform {transform!r} is neither conv nor ptwt")
    if transform == "ptwt" and wavelet not in ("haar", "db1"):
        raise ValueError(f"ptwt's {wavelet!r} transform does not halve sizes exactly; use transform: conv")


def analysis_kernel(wavelet: str, mixing: np.ndarray) -> Tensor:
    """The analysis as one convolution kernel [4C,K,L,L] of float64, on the CPU.

    mixing: the linear map [C,K] of K channels to C which is applied to each pixel before; the identity for none.

    On pixels whose channels are adjacent it is faster than a grouped convolution, which does fewer products but
    none of them in vectors. So channels that do not mix have zeros between them, which are counted. Sums and
    differences of neighbouring pixels are no faster at one picture of 224 px, so haar has no form of its own.
    """
    # In numpy, which no default device of torch moves.
    return torch.from_numpy(np.einsum("bij,cd->bcdij", _filters(wavelet), mixing)).flatten(0, 1)


def dwt2(
    x: Tensor, wavelet: str = "haar", transform: Transform = "conv", kernel: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One level of analysis: x [B,C,S,S] -> LL [B,C,S/2,S/2] and details [B,3,C,S/2,S/2] (H, V, D).

    kernel: ``analysis_kernel``'s, on x's device; None makes it anew. Arguments are checked where it is made, since a
        compiler cannot follow PyWavelets.
    ValueError: odd S, a filter longer than S, ptwt asked for a half precision; see also ``check_transform``.
    """
    if kernel is None:
        check_transform(wavelet, transform)
        kernel = analysis_kernel(wavelet, np.eye(x.shape[1]))
    size = min(x.shape[-2:])
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"a picture of {tuple(x.shape[-2:])} pixels cannot be halved; use even sizes")
    if transform == "ptwt":
        if x.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"ptwt does not take {x.dtype}; use transform: conv, or full precision")
        coarse, details = ptwt.wavedec2(x, wavelet, level=1, mode="zero")
        return coarse, torch.stack(tuple(details), dim=1)
    channels = x.shape[1]
    pad = kernel.shape[-1] // 2 - 1
    if pad > size:
        raise ValueError(f"wavelet {wavelet!r} is longer than a picture of {size} pixels; use a shorter one")
    if pad:
        x = F.pad(x, (pad, pad, pad, pad), mode="circular")
    # Adjacent channels ("channels last"), said in a form that torch.func.vmap knows.
    x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    bands = F.conv2d(x, kernel.to(x), stride=2).unflatten(1, (4, channels))
    return bands[:, 0], bands[:, 1:]


def idwt2(coarse: Tensor, details: Tensor, wavelet: str = "haar", transform: Transform = "conv") -> Tensor:
    """The inverse of ``dwt2``: LL [B,C,h,h], details [B,3,C,h,h] -> x [B,C,2h,2h].

    The filters are orthogonal, so synthesis is the transposed analysis, wrapped around the periodic border.
    """
    check_transform(wavelet, transform)
    if transform == "ptwt":
        return ptwt.waverec2((coarse, ptwt.WaveletDetailTuple2d(*details.unbind(1))), wavelet)
    kernel, channels = filters(wavelet).to(coarse), coarse.shape[1]
    pad = kernel.shape[-1] // 2 - 1
    bands = torch.cat([coarse.unsqueeze(1), details], dim=1).transpose(1, 2).flatten(1, 2)
    x = F.conv_transpose2d(bands, kernel.unsqueeze(1).repeat(channels, 1, 1, 1), stride=2, groups=channels)
    for dim in (-1, -2):
        x = _wrap(x, pad, dim)
    return x


def wavedec2(
    x: Tensor, levels: int, wavelet: str = "haar", transform: Transform = "conv", kernel: Tensor | None = None
) -> list[Tensor]:
    """Multi-level analysis, coarsest first: [LL_L [B,C,h,h], details_L [B,3,C,h,h], ..., details_1]."""
    bands: list[Tensor] = []
    for _ in range(levels):
        x, details = dwt2(x, wavelet, transform, kernel)
        bands.insert(0, details)
    return [x, *bands]


def waverec2(bands: Sequence[Tensor], wavelet: str = "haar", transform: Transform = "conv") -> Tensor:
    """The inverse of ``wavedec2``: the picture [B,C,S,S]."""
    x, *rest = bands
    for details in rest:
        x = idwt2(x, details, wavelet, transform)
    return x


def _wrap(x: Tensor, pad: int, dim: int) -> Tensor:
    """Add the ``pad`` entries beyond each end of an axis to the other end, and cut them off."""
    if not pad:
        return x
    size = x.shape[dim] - 2 * pad
    index = (torch.arange(x.shape[dim], device=x.device) - pad) % size
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_add_(dim if dim >= 0 else x.ndim + dim, index, x)
