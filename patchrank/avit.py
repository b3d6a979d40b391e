"""A-ViT (Yin et al., CVPR 2022), a baseline: tokens halt at different depths, in each picture its own.

Shapes: B images, N tokens (class token first), L blocks, D width, E joint dim, S image size.

After block l a token's halting score is h_l = σ(scale · x₀ + shift), where x₀ is its first channel; after the last
block it is 1. The token halts at the block n where h_1 + ... + h_n reaches 1 - ε. Its halting probabilities are
p_l = h_l before n, the remainder r = 1 - h_1 - ... - h_(n-1) at n, and 0 beyond; they sum to one. The output is the
class token's mean over the blocks by its p. A token that has halted is seen by no other.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP, load_state, read_record, read_state_dict, save_model
from common.tower import ImageTower


class Halting(NamedTuple):
    """What a pass over B images gives.

    z: [B,E], not normalised.  active: bool [L,B,N], which tokens each block computed.
    probability: [L,B,N], p.  ponder: [B,N], n + r.
    """

    z: Tensor
    active: Tensor
    probability: Tensor
    ponder: Tensor

    @property
    def depth(self) -> Tensor:
        """Mean number of blocks [B] that a picture's tokens went through."""
        return self.active.sum(0).float().mean(1)


class AViTTower(nn.Module):
    """A copy of an image tower whose tokens halt; with a shift of -inf none does, and it equals the tower.

    Halted tokens are masked here and would be left out by a kernel for ragged batches: the cost to state is that of
    the tokens that were active (``saved_macs``), the mean over pictures. When the class token halts, nothing
    can change the output any more, so all its picture's tokens halt with it.

    scale, shift: of the halting score; the paper's 5 and -10.  epsilon: ε.
    """

    def __init__(self, tower: ImageTower, scale: float = 5.0, shift: float = -10.0, epsilon: float = 0.01) -> None:
        super().__init__()
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon {epsilon} is not in (0, 1)")
        self.tower = copy.deepcopy(tower)
        self.scale, self.shift, self.epsilon = scale, shift, epsilon

    def run(self, images: Tensor) -> Halting:
        """images [B,3,S,S] -> embeddings, and who halted where."""
        x = self.tower.embed(images)
        blocks = self.tower.transformer.resblocks
        active = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        is_class = torch.arange(x.shape[1], device=x.device) == 0
        left = torch.ones(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        ponder, output, actives, probabilities = torch.zeros_like(left), 0.0, [], []
        for number, block in enumerate(blocks, 1):
            # The class token stays visible, lest a finished picture's rows attend to nothing.
            mask = active.logical_or(is_class)[:, None, None]
            x = torch.where(active[..., None], block(x, mask), x)
            score = torch.sigmoid(self.scale * x[..., 0].to(left.dtype) + self.shift)
            reached = left - score <= self.epsilon if number < len(blocks) else active
            halts = active & reached.logical_or(reached[:, :1])
            probability = torch.where(halts, left, score) * active
            output = output + probability[:, 0, None] * x[:, 0]
            ponder = ponder + active + halts * left
            actives.append(active)
            probabilities.append(probability)
            left, active = left - score * active, active & ~halts
        z = self.tower.pool(output.to(x.dtype)[:, None])
        return Halting(z, torch.stack(actives), torch.stack(probabilities), ponder)

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.run(images).z

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> z [B,E], of length one unless ``normalize`` is off."""
        z = self(images)
        return F.normalize(z, dim=-1) if normalize else z

    def saved_macs(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """What halting saves each picture of active [L,B,N]: multiply-adds [B], all and without attention's products.

        To be taken from ``count_macs`` of this tower, which masks and so computes everything.
        """
        block = self.tower.transformer.resblocks[0]
        width, hidden = block.mlp.c_proj.out_features, block.mlp.c_fc.out_features
        tokens, whole = active.sum(2).double(), float(active.shape[2])
        linear = (4 * width**2 + 2 * width * hidden + 2 * 5 * width) * (whole - tokens)
        attention = 2 * width * (whole**2 - tokens**2)
        return (linear + attention).sum(0), linear.sum(0)

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write a self-describing safetensors file. architecture: that of the CLIP whose image tower this copies."""
        halting = {"scale": self.scale, "shift": self.shift, "epsilon": self.epsilon}
        save_model(self, path, {"architecture": architecture, "avit": halting}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> AViTTower:
        """Read a file that ``save`` wrote. ValueError for any other."""
        record = read_record(path)
        if not {"architecture", "avit"} <= record.keys():
            raise ValueError(f"{path} does not describe an AViTTower; convert its training checkpoint first")
        model = cls(CLIP(record["architecture"]).image_tower, **record["avit"])
        load_state(model, read_state_dict(str(path)), str(path))
        return model


def ponder_loss(halting: Halting) -> Tensor:
    """The paper's ponder loss: the mean over tokens of n + r, blocks run and remainder."""
    return halting.ponder.mean()


def distribution_loss(halting: Halting, depth: float) -> Tensor:
    """KL(H || Gaussian around ``depth``, of deviation 1), both over the blocks 1 to L.

    H is the mean over tokens of the halting probabilities p, which sum to one. (The paper takes the scores h, which
    need not, and does not say how they are normalised.)
    """
    found = halting.probability.mean((1, 2))
    blocks = torch.arange(1, len(found) + 1, device=found.device, dtype=found.dtype)
    target = (-0.5 * (blocks - depth) ** 2).log_softmax(0)
    return (found * (found.clamp(min=1e-8).log() - target)).sum()
