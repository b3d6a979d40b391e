"""A-ViT (Yin et al., CVPR 2022), a baseline: tokens halt at different depths, which differ from image to image.

Shapes: B images, N tokens (class token first), L blocks, D width, E joint dim, S image size.

After block l a token's halting score is h_l = σ(scale · x₀ + shift), where x₀ is its first channel; after the last
block it is 1. The token halts at the block n where h_1 + ... + h_n reaches 1 - ε. Its halting probabilities are
p_l = h_l before n, the remainder r = 1 - h_1 - ... - h_(n-1) at n, and 0 beyond; they sum to one. The output is the
class token's mean over the blocks, weighted by its p. Every token halts by itself, as released, also after the class
token has; no other token attends to one that has halted.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP
from common.tower import ImageTower
from common.weights import load_saved, save_model


class Halting(NamedTuple):
    """The result of a pass over B images.

    z: [B,E], not normalised.  active: bool [L,B,N], the tokens that each block computed.
    probability: [L,B,N], p.  ponder: [B,N], n + r.  score: [L,B,N], h of each block, 0 for tokens that had halted.
    """

    z: Tensor
    active: Tensor
    probability: Tensor
    ponder: Tensor
    score: Tensor

    @property
    def depth(self) -> Tensor:
        """Mean number of blocks [B] that an image's tokens go through."""
        return self.active.sum(0).float().mean(1)


class AViTTower(nn.Module):
    """A copy of an image tower whose tokens halt. With a shift of -inf none halts, and it equals the tower.

    Halted tokens are only masked here; a kernel for ragged batches would skip them. The cost to report is therefore
    that of the active tokens (``saved_macs``), averaged over images.

    scale, shift: of the halting score. The released gates are 10 and -30 for the tiny model, 10 and -75 for the small
        one; the paper has 5 and -10.  epsilon: ε.
    """

    def __init__(self, tower: ImageTower, scale: float = 10.0, shift: float = -30.0, epsilon: float = 0.01) -> None:
        super().__init__()
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon {epsilon} is not in (0, 1)")
        if not isinstance(tower, ImageTower):
            raise ValueError(f"A-ViT trains this suite's ImageTower; {type(tower).__name__} is another library's")
        self.tower = copy.deepcopy(tower)
        self.scale, self.shift, self.epsilon = scale, shift, epsilon

    def run(self, images: Tensor) -> Halting:
        """images [B,3,S,S] -> embeddings, and where each token halted."""
        x = self.tower.embed(images)
        blocks = self.tower.transformer.resblocks
        active = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        left = torch.ones(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        ponder, output = torch.zeros_like(left), 0.0
        actives, probabilities, scores = [], [], []
        for number, block in enumerate(blocks, 1):
            # 1. Run the block on the active tokens. Where all have halted, all are visible: no row attends to nothing.
            mask = active.logical_or(~active.any(1, keepdim=True))[:, None, None]
            x = torch.where(active[..., None], block(x, mask), x)
            # 2. Which tokens halt here: those out of probability.
            score = torch.sigmoid(self.scale * x[..., 0].to(left.dtype) + self.shift)
            halts = active & (left - score <= self.epsilon) if number < len(blocks) else active
            # 3. A halting token takes the remainder, the others their score; the output is the weighted mean.
            probability = torch.where(halts, left, score) * active
            output = output + probability[:, 0, None] * x[:, 0]
            ponder = ponder + active + halts * left
            actives.append(active)
            probabilities.append(probability)
            scores.append(score * active)
            left, active = left - score * active, active & ~halts
        z = self.tower.pool(output.to(x.dtype)[:, None])
        return Halting(z, torch.stack(actives), torch.stack(probabilities), ponder, torch.stack(scores))

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.run(images).z

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> z [B,E], of length one unless ``normalize`` is off."""
        z = self(images)
        return F.normalize(z, dim=-1) if normalize else z

    def saved_macs(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply-adds [B] that halting saves each image of active [L,B,N]: all, and without attention's products.

        Subtract them from ``count_macs`` of this tower, which masks halted tokens and so computes everything.
        """
        block = self.tower.transformer.resblocks[0]
        width, hidden = block.mlp.c_proj.out_features, block.mlp.c_fc.out_features
        tokens, all_tokens = active.sum(2).double(), float(active.shape[2])
        linear = (4 * width**2 + 2 * width * hidden + 2 * 5 * width) * (all_tokens - tokens)
        attention = 2 * width * (all_tokens**2 - tokens**2)
        return (linear + attention).sum(0), linear.sum(0)

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write a self-describing safetensors file. architecture: that of the CLIP whose image tower this copies."""
        halting = {"scale": self.scale, "shift": self.shift, "epsilon": self.epsilon}
        save_model(self, path, {"architecture": architecture, "avit": halting}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> AViTTower:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> AViTTower:
            return cls(CLIP(record["architecture"]).image_tower, **record["avit"])

        problem = "does not describe an AViTTower; convert its training checkpoint first"
        return load_saved(path, {"architecture", "avit"}, problem, build)


def ponder_loss(halting: Halting) -> Tensor:
    """The paper's ponder loss: the mean over tokens of n + r, blocks run and remainder."""
    return halting.ponder.mean()


BUFFER = 0.02
"""The released target gives the blocks before its mean all but this share."""


def distribution_target(blocks: int, depth: float) -> Tensor:
    """The released target [L] for the halting distribution, which does not sum to one.

    The density of a Gaussian of mean ``depth`` and deviation 1 at 0, 1, ..., L - 1, scaled so that the values before
    ``depth`` sum to 0.98. So its peak stands at the block after the first ``depth``.
    """
    place = torch.arange(blocks, dtype=torch.float64)
    density = (-0.5 * (place - depth) ** 2).exp()
    return (1 - BUFFER) * density / density[place < depth].sum()


def distribution_loss(halting: Halting, depth: float) -> Tensor:
    """KL(target || H) / L over the L blocks, as released; see ``distribution_target``.

    H_l is the mean over all tokens of the halting scores h_l, divided by their sum over the blocks and clamped to
    [0.01, 0.99]. The score of a halted token is 0; the released code scores what a block makes of zeros, which its
    gates turn to nearly 0. It also leaves the first picture of the batch out, by a slip of an index; here all count.
    Below 0, which a target of less than 1 allows, the loss teaches nothing, as released.
    """
    mean = halting.score.mean((1, 2))  # [L]
    mean = (mean / mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(0.01, 0.99)
    target = distribution_target(len(mean), depth)
    entropy = torch.xlogy(target, target).to(mean)  # in fp64: far from its mean the density is 0 in fp32
    return (entropy - target.to(mean) * mean.log()).mean().clamp(min=0)
