"""MLIP's Guide, a light pretrained ViT on a small copy of the image, and the cross-attention to it (section 3.4).

Shapes: B images, S size of the small image, G = 1 + patches tokens of the Guide (17), W their width, N tokens of the
tower, D its width, H heads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import fused_attention
from common.preprocess import Preprocess
from common.weights import load_state, read_record, read_state_dict, save_model


class Guide(nn.Module):
    """A masked autoencoder's encoder on the image at low resolution; its defaults are the paper's DeiT-Tiny.

    It has twelve heads, as the light MAE encoder that the paper cites, where DeiT has three. An image of 64 px in
    patches of 16 gives 17 tokens with the class token.

    Args:
        image_size: S, side of the small image in pixels.
        patch_size: side of its patches, in pixels.
        width: W, channels of a token.
        depth: number of blocks.
        heads: attention heads in each.
        weights: a local file of an MAE encoder in timm's names; a decoder in it is ignored, positions of another
            grid are resized. null: random, which is enough for counting only.
        train: whether the Guide learns with the tower, or is frozen. The paper does not say.
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
        from timm.models.vision_transformer import VisionTransformer  # with torchvision, as slow to import as torch

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
        self.see_as(Preprocess())
        if weights is not None:
            self.load_weights(weights)
        self.requires_grad_(train)
        self.train()

    @classmethod
    def from_weights(cls, path: str, train: bool = False, heads: int | None = None) -> Guide:
        """The Guide of a weights file: with the sizes that the file records (see ``save``), else DeiT-Tiny's.

        heads: needed for a file that does not record them, since weights fit any number of heads.
        ValueError: nobody says how many heads, or the file records another number; see also ``load_weights``.
        """
        sizes = read_record(path).get("guide", {})
        if heads is None and "heads" not in sizes:
            raise ValueError(
                f"{path} does not record its attention heads, and its shapes do not show them; say guide_heads 12 for "
                "the light MAE encoder of the paper, or 3 for a DeiT-Tiny"
            )
        if heads is not None and sizes.get("heads", heads) != heads:
            raise ValueError(f"{path} records {sizes['heads']} attention heads, not {heads}; leave guide_heads out")
        return cls(**{**sizes, "heads": sizes.get("heads", heads)}, weights=path, train=train)

    def see_as(self, preprocess: Preprocess) -> None:
        """Expect images that are normalised as ``preprocess`` says, the tower's."""
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        tower = torch.tensor([preprocess.mean, preprocess.std])
        imagenet = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])  # what MAE encoders learned on
        self.register_buffer("scale", (tower[1] / imagenet[1])[:, None, None], persistent=False)
        self.register_buffer("shift", ((tower[0] - imagenet[0]) / imagenet[1])[:, None, None], persistent=False)

    def load_weights(self, path: str) -> None:
        """Load an encoder. ValueError: no file, one that would run code, or keys and shapes that do not fit."""
        from timm.layers import resample_abs_pos_embed

        state = read_state_dict(path)
        state = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
        if "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], self.vit.patch_embed.grid_size)
        load_state(self.vit, state, f"{path}, read as a Guide of {self.sizes},")

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the encoder with its sizes as one safetensors file."""
        save_model(self.vit, path, {"guide": self.sizes}, dtype)

    def train(self, mode: bool = True) -> Guide:
        """Switch to training or evaluation; a frozen Guide stays in evaluation."""
        return super().train(mode and self.learns)

    def shrink(self, images: Tensor) -> Tensor:
        """images [B,3,·,·] in the tower's normalisation -> [B,3,S,S] in ImageNet's, each pixel the mean of its area."""
        return F.interpolate(images, size=(self.image_size, self.image_size), mode="area") * self.scale + self.shift

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,·,·] in the tower's normalisation -> tokens [B,G,W] after the last norm, class token first."""
        return self.vit.forward_features(self.shrink(images))


class GuideAttention(nn.Module):
    """x + cross-attention(norm(x), Guide): the tower's tokens are the queries, the Guide's the keys and values.

    The paper states neither norm, residual, number of heads nor the projections from W to D. The last projection
    starts at zero, so at first a block computes what it would compute without a Guide.
    """

    is_block = True
    """Part of an acceleration block: Muon steps its matrices, see ``common.optim``."""

    def __init__(self, width: int, heads: int, guide_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(guide_width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        for parameter in self.out_proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """x [B,N,D], guide [B,G,W] -> [B,N,D]. With G = 1 all tokens receive the same vector."""
        query = self.query(self.ln(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(guide).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out_proj(fused_attention(query, key, value).transpose(1, 2).flatten(2))
