"""MLIP's Fourier block: tokens are mixed by a learned filter on their two-dimensional spectrum (section 3.2).

Shapes: B images, N = G² patch tokens on a G×G grid, D width, K pieces of the filter, V = G/2 + 1 columns of the
half spectrum.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from common.tower import feed_forward_network

Spectrum = Literal["power", "linear"]
"""What the Lego-Filter multiplies: |Y|², as equation 10 has it, or Y itself."""


def cosine_weights(pieces: int) -> Tensor:
    """cos((2j-1)π/2K) for j = 1..K, the weights [K] of the pieces in equation 10.

    They sum to 0 for every K, and the middle one of an odd K is 0.
    """
    return torch.cos((2 * torch.arange(1, pieces + 1) - 1) * math.pi / (2 * pieces))


class LegoFilter(nn.Module):
    """Equations 5 to 11: FFT over the grid, Ŷ = 2 Σ_j S ⊙ x_j cos((2j-1)π/2K), inverse FFT.

    spectrum="power" takes S = |Y|²/hw, the printed formula. The input's phases are lost: token (p,q) of the result
        is an autocorrelation of the grid at lag (p,q), the result does not change when the grid is shifted
        circularly, it is even in (p,q) where the pieces are real, and it grows with the square of the input.
    spectrum="linear" takes S = Y, as global filter networks do: a circular convolution with a learned kernel, which
        keeps the layout.

    The normalisation is the printed one: none forward (5), 1/hw in the power spectrum (10), 1/hw in the inverse (7).
    A forward transform with 1/√(hw) gives |Y|² its 1/hw. An orthonormal inverse would be G times the printed one; at
    ViT-L/14's eight blocks such tokens are nearly one direction before training begins. The half spectrum has
    columns 0 to G/2, one more than printed: without the last the inverse would not be exact, and odd grids (7×7 in
    ViT-B/32) have no half. Columns 0 and G/2 hold (u,v) and (-u,v), of which a real result has one: the filter there
    is the Hermitian mean of both.

    The paper leaves open what a piece is: here K independent complex tensors [G,V,D], normal with deviation 0.02.
    The transform runs in fp32 at least, since half-precision FFTs want powers of two.
    ValueError: a single piece or an odd number, whose weights of 0 would train a dead piece.
    """

    vectors = ("pieces",)
    """Gains of single channels and frequencies: as other gains, without weight decay."""

    def __init__(self, grid: int, width: int, pieces: int = 2, spectrum: Spectrum = "power") -> None:
        super().__init__()
        if pieces < 2 or pieces % 2:
            raise ValueError(
                f"pieces {pieces}: the middle piece of an odd number has the weight cos(π/2) = 0 and never learns; "
                "use an even number"
            )
        if spectrum not in ("power", "linear"):
            raise ValueError(f"spectrum {spectrum!r} is neither 'power' nor 'linear'")
        self.grid, self.spectrum = grid, spectrum
        self.pieces = nn.Parameter(0.02 * torch.randn(pieces, grid, grid // 2 + 1, width, 2))  # real, imaginary
        self.register_buffer("weights", cosine_weights(pieces), persistent=False)

    def gain(self) -> Tensor:
        """2 Σ_j x_j cos((2j-1)π/2K), complex [G,V,D]: S is common to all pieces, so they act as this one filter."""
        # Equation 10's sum over the pieces.
        pieces = self.pieces.to(torch.promote_types(self.pieces.dtype, torch.float32))
        gain = 2 * (torch.view_as_complex(pieces) * self.weights[:, None, None, None]).sum(0)
        # The mean of (u,v) and the conjugate of (-u,v): row 0 is its own opposite, row u faces row G - u.
        opposite = torch.cat([gain[:1], gain[1:].flip(0)]).conj()
        mean = (gain + opposite) / 2
        # Columns 0 and G/2 (which odd grids lack) take the mean. A half spectrum that is not Hermitian there is
        # read differently by the transforms of different devices.
        last = (self.grid + 1) // 2
        return torch.cat([mean[:, :1], gain[:, 1:last], mean[:, last:]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x [B,N,D] of the grid, row by row -> [B,N,D]."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (self.grid, self.grid))
            spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho")
            if self.spectrum == "power":
                spectrum = (spectrum.real.square() + spectrum.imag.square()) / self.grid  # the inverse's other 1/√(hw)
            mixed = torch.fft.irfft2(spectrum * self.gain(), s=(self.grid, self.grid), dim=(1, 2), norm="ortho")
        return mixed.flatten(1, 2).to(x.dtype)


class FourierBlock(nn.Module):
    """A transformer block with a ``LegoFilter`` in the place of attention.

    Norms before both half steps, a residual around each and an MLP are our reading; the paper names none of them.
    The residual matters most: what the power spectrum makes of the tokens has lost their layout.
    """

    is_block = True
    """Muon steps its matrices, see ``common.optim``; the filter's pieces are none."""

    def __init__(
        self,
        grid: int,
        width: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        pieces: int = 2,
        spectrum: Spectrum = "power",
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.filter = LegoFilter(grid, width, pieces, spectrum)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = feed_forward_network(width, mlp_ratio, quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> [B,N,D]."""
        x = x + self.filter(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
