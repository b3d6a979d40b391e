"""MLIP's Guide, a light pretrained ViT on the small picture, and the cross-attention that reads it (section 3.4).

Shapes: B images, S image size, G = 1 + patches tokens of the Guide (17), W their width, N tokens of the tower, D its
width, H heads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import MEAN, STD, load_state, read_record, read_state_dict, save_model
from common.tower import Linear, fused_attention, residual


class Guide(nn.Module):
    """A masked autoencoder's encoder on the picture at low resolution; its defaults are the paper's DeiT-Tiny.

    Twelve heads rather than DeiT's three, as in the light MAE encoder that the paper cites. 64 px in patches of 16
    make 17 tokens with the class token.

    Args:
        image_size: S of the small picture, in pixels.
        patch_size: side of its patches, in pixels.
        width: W, channels of a token.
        depth: number of blocks.
        heads: attention heads in each.
        weights: a local file of an MAE encoder in timm's names; a decoder in it is left aside, positions of another
            grid are resized. null: random, which is enough for counting only.
        train: whether the Guide learns with the tower; frozen otherwise. The paper does not say.
    """

    def __init__(
        self,
        image_size: int = 64,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 12,
        weights: str | None = None,
        train: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        self.image_size, self.width, self.learns = image_size, width, train
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool="",
        )
        # Towers see pictures in CLIP's normalisation, MAE encoders learned on ImageNet's.
        ours, theirs = torch.tensor([MEAN, STD]), torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
        self.register_buffer("scale", (ours[1] / theirs[1])[:, None, None], persistent=False)
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1])[:, None, None], persistent=False)
        if weights is not None:
            self.load_weights(weights)
        self.requires_grad_(train)
        self.train()

    @classmethod
    def from_weights(cls, path: str, train: bool = False) -> Guide:
        """The Guide of a weights file: with the sizes that the file records (see ``save``), else DeiT-Tiny's."""
        return cls(**read_record(path).get("guide", {}), weights=path, train=train)

    def load_weights(self, path: str) -> None:
        """Load an encoder. ValueError: no file, one that would run code, or keys and shapes that do not fit."""
        state = read_state_dict(path)
        state = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
        if "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], self.vit.patch_embed.grid_size)
        load_state(self.vit, state, f"{path}, read as a Guide of {self.sizes},")

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the encoder with its sizes as one safetensors file."""
        save_model(self.vit, path, {"guide": self.sizes}, dtype)

    def train(self, mode: bool = True) -> Guide:
        """The usual switch, which a frozen Guide does not follow."""
        return super().train(mode and self.learns)

    def shrink(self, images: Tensor) -> Tensor:
        """images [B,3,·,·] in CLIP's normalisation -> [B,3,S,S] in ImageNet's, each pixel the mean of its area."""
        return F.interpolate(images, size=(self.image_size, self.image_size), mode="area") * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,·,·] in CLIP's normalisation -> tokens [B,G,W] after the last norm, class token first."""
        return self.vit.forward_features(self.shrink(images))


class GuideAttention(nn.Module):
    """x + cross-attention(norm(x), Guide): every token of the picture asks, the Guide's tokens answer.

    Norm, residual, number of heads and the projections from W to D are not in the paper. The last projection starts
    at zero, so that at first a block is what it would be without a Guide.
    """

    def __init__(self, width: int, heads: int, guide_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln = nn.LayerNorm(width)
        self.query = Linear(width, width)
        self.key_value = Linear(guide_width, 2 * width)
        self.out_proj = Linear(width, width)
        for parameter in self.out_proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x [B,N,D], guide [B,G,W] -> [B,N,D]. With G = 1 all tokens receive the same vector."""
        query = self.query(self.ln(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(guide).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return residual(x, self.out_proj(fused_attention(query, key, value).transpose(1, 2).flatten(2)))
