"""Wavelet tokenizer (WAVECLIP, section 3.1): an image becomes groups of tokens, coarse to fine.

Shapes: B images, S image size, P patch size, D width, L levels, g = S / (2^l P) grid of level l, n tokens a step.

Step 0 holds one token per P x P patch of LL_L. Step s > 0 holds the tokens of the H, V and D bands of level L-s+1,
one per location and band: one linear map merges the colour channels of a location.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters import AdaptedTower, PatchMap
from common.tower import ImageTower
from waveclip.wavelet import Transform, analysis_kernel, check_transform, dwt2, wavedec2

Start = Literal["teacher", "random"]

# ITU-R BT.601, the JPEG matrix, without its constant offsets. Rows: Y, Cb, Cr; columns: R, G, B.
YCBCR = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
)


def check_size(image_size: int, patch_size: int, levels: int) -> None:
    """ValueError, with the nearest valid sizes, unless every level's grid is whole."""
    if levels < 1:
        raise ValueError(f"levels {levels}: a wavelet tokenizer decomposes at least once")
    unit = patch_size * 2**levels
    if image_size % unit:
        below = image_size // unit * unit
        valid = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"image_size {image_size} with patch_size {patch_size} and levels {levels} needs a multiple of {unit}; "
            f"use {valid} pixels, or fewer levels; image_size= builds a CLIP for other pixels"
        )


def patch_map(tower: ImageTower | AdaptedTower) -> PatchMap:
    """How a tower embeds patches. ValueError: not by one linear map and a position for each patch."""
    if isinstance(tower, AdaptedTower):
        try:
            return tower.patch_map()
        except ValueError as error:
            raise ValueError(f"no wavelet tokens for this {type(tower.source).__name__}: {error}") from None
    first, positions = tower.positional_embedding.tensor_split([1])
    return PatchMap(tower.conv1.weight, positions, tower.class_embedding + first[0])


class WaveletTokenizer(nn.Module):
    """RGB -> YCbCr -> DWT -> patches of every sub-band -> tokens, with positions, bands and class tokens.

    The colour map is applied after CLIP's normalisation, to the same images that every other tower takes. There it is
    linear without an offset, so its inverse folds exactly into the teacher's patch filter. (The offsets of YCbCr
    would need a bias that CLIP's patch embedding does not have.) It acts on pixels, and the first level of the wavelet
    is linear too, so both are one convolution.

    Coefficients of level l are divided by 2^l, which puts them in pixel units: the orthonormal LL_l is 2^l times
    the mean of 2^l x 2^l pixels.

    Start from the teacher: with M the colour matrix and W the teacher's filter on RGB, the filter of LL is W M^-1,
    because W M^-1 (M x) = W x, where x is the block mean of the image. So step 0 is the teacher's embedding of the
    image at resolution S / 2^L (exactly for haar; a longer low-pass filter only smooths differently). Detail bands
    start from the same filter times ``detail_scale``, since they carry less energy than LL and training ignores
    tokens that start small. Positions are the teacher's, averaged over the cells that a token covers. The bands of
    a location share its position, and a learned band embedding tells them apart.
    """

    vectors = ("class_tokens", "band_embedding")
    """Stacks of vectors, which get no weight decay; see ``common.optim.parameter_groups``."""

    def __init__(
        self,
        tower: ImageTower | AdaptedTower,
        levels: int = 1,
        wavelet: str = "haar",
        shared_class_token: bool = False,
        transform: Transform = "conv",
        start: Start = "teacher",
        detail_scale: float = 4.0,
    ) -> None:
        super().__init__()
        check_size(tower.image_size, tower.patch_size, levels)
        check_transform(wavelet, transform)
        if start not in ("teacher", "random"):
            raise ValueError(f"start {start!r} is neither teacher nor random")
        self.image_size, self.patch_size, self.levels = tower.image_size, tower.patch_size, levels
        self.wavelet, self.transform = wavelet, transform
        width = tower.width
        weight, positions, class_token = (None if part is None else part.detach() for part in patch_map(tower))
        # In fp32 beside a tower of any dtype: they are cast where they are used.
        for name, mixing in (("first_kernel", YCBCR.numpy()), ("kernel", np.eye(len(YCBCR)))):
            self.register_buffer(name, analysis_kernel(wavelet, mixing).float().to(weight.device), persistent=False)
        teacher = torch.einsum("dcij,ck->dkij", weight.double(), YCBCR.inverse().to(weight.device)).to(weight)
        spread = width**-0.5

        def projection(scale: float, bands: int) -> nn.Parameter:
            weight = torch.stack([scale * teacher] * bands)
            if start == "random":
                weight = torch.randn_like(weight) * teacher[0].numel() ** -0.5
            return nn.Parameter(weight)

        self.coarse = projection(1.0, 1)
        self.details = nn.ParameterList(projection(detail_scale, 3) for _ in range(levels))
        bands = torch.cat([torch.zeros(1, width), spread * torch.randn(3 * levels, width)])
        self.band_embedding = nn.Parameter(bands.to(weight))
        if start == "random":
            class_token = None if class_token is None else spread * torch.randn(width).to(weight)
            positions = spread * torch.randn_like(positions)
        self.class_tokens = None
        if class_token is not None:
            self.class_tokens = nn.Parameter(class_token.repeat(1 if shared_class_token else levels + 1, 1))
        self.positions = nn.Parameter(positions.clone())

    @property
    def steps(self) -> int:
        """S + 1 = L + 1, the number of token groups."""
        return self.levels + 1

    def tokens_in(self, step: int) -> int:
        """n, the tokens of one step, its class token included."""
        grid = self.image_size // (self.patch_size * 2 ** self._level(step))
        return self.leading + (3 if step else 1) * grid**2

    @property
    def leading(self) -> int:
        """The tokens of a step before its patches: its class token, or none."""
        return 0 if self.class_tokens is None else 1

    def decompose(self, images: Tensor) -> list[Tensor]:
        """images [B,3,S,S] -> the bands of each step in pixel units: [B,1,3,h,h] of LL, then [B,3,3,h,h] each."""
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: give normalised ones, as common.data.transforms.to_batch does")
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels given to a tokenizer for {self.image_size}; resize them"
            )
        if self.transform == "ptwt":
            images = F.conv2d(images, YCBCR.float().to(images)[:, :, None, None])
        x, finest = dwt2(images, self.wavelet, self.transform, self.first_kernel)
        coarse, *details = wavedec2(x, self.levels - 1, self.wavelet, self.transform, self.kernel)
        bands = [coarse.unsqueeze(1), *details, finest]
        return [band / 2 ** self._level(step) for step, band in enumerate(bands)]

    def embed(self, bands: Tensor, step: int) -> Tensor:
        """bands of one step [B,1 or 3,3,h,h] -> its tokens [B,n,D], class token first, before ``ln_pre``."""
        weight = self.details[step - 1] if step else self.coarse
        count = len(weight)
        grid = bands.shape[-1] // self.patch_size
        cells = bands.unflatten(4, (grid, -1)).unflatten(3, (grid, -1))  # [B,count,3,g,P,g,P]
        cells = cells.permute(1, 0, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [count,B g²,3P²]
        # Equal to a grouped convolution, whose gradient is slow on a CPU.
        patches = torch.bmm(cells, weight.flatten(2).transpose(1, 2))
        patches = patches.unflatten(1, (bands.shape[0], grid**2)).transpose(0, 1)  # [B,count,g²,D]
        first = 1 + 3 * (step - 1) if step else 0
        offset = self._pooled_positions(step) + self.band_embedding[first : first + count].unsqueeze(1)
        tokens = (patches + offset).flatten(1, 2)
        if self.class_tokens is None:
            return tokens
        class_token = self.class_tokens[min(step, len(self.class_tokens) - 1)]
        class_token = class_token.expand(bands.shape[0], 1, -1).to(patches.dtype)
        return torch.cat([class_token, tokens], dim=1)

    def _level(self, step: int) -> int:
        """The wavelet level of a step's bands: L for steps 0 and 1, then one finer each."""
        return self.levels - max(step - 1, 0)

    def _pooled_positions(self, step: int) -> Tensor:
        """The teacher's positions averaged over the 2^l x 2^l cells of each token: [g²,D]."""
        grid = self.image_size // self.patch_size
        cells = self.positions.T.reshape(1, -1, grid, grid)
        return F.avg_pool2d(cells, 2 ** self._level(step)).flatten(2)[0].T
