"""Pretraining a Guide as a masked autoencoder (He et al., CVPR 2022; for light encoders Wang et al., ICML 2023).

Shapes: B images, S size of the Guide's small image, P patches, V of them visible, M masked, L = 3p² values of a patch,
W encoder width, D decoder width.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from common import optim
from common.ranks import of_this_rank
from mlip.guide import Guide
from mlip.merging import take


class GuideMAE(LightningModule):
    """Hide most patches of the small image and rebuild them from the rest; the encoder is the Guide.

    The targets are each patch's pixels, normalised by the patch's mean and deviation. At paper scale the Guide comes
    from a published checkpoint. This training makes the Guide of the embedded benchmark, and its defaults are that
    one's: 32 px in 16 patches of 8 give 17 tokens, as at paper scale, where the tower (48 px) has 37.

    Args:
        image_size: side of the small image in pixels.
        patch_size: side of its patches, in pixels.
        width: channels of the encoder.
        depth: blocks of the encoder.
        heads: attention heads of the encoder.
        decoder_width: channels of the decoder, which is one block with heads of 32 channels.
        mask_ratio: share of the patches that the encoder does not see.
        learning_rate: peak rate of AdamW.
        weight_decay: of matrices.
        warmup_steps: steps of linear warm-up before the cosine.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        decoder_width: int = 64,
        mask_ratio: float = 0.75,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
    ) -> None:
        super().__init__()
        optim.check_settings(learning_rate, weight_decay, warmup_steps)
        self.save_hyperparameters()
        self.guide = Guide(image_size, patch_size, width, depth, heads, train=True)
        self.patch_size, self.patches = patch_size, self.guide.vit.patch_embed.num_patches
        self.visible = self.patches - round(mask_ratio * self.patches)
        if not 0 < self.visible < self.patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} shows {self.visible} of {self.patches} patches; show some and hide some"
            )
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_width))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(1 + self.patches, decoder_width))
        self.decoder = Block(decoder_width, num_heads=max(decoder_width // 32, 1), qkv_bias=True)
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.to_pixels = nn.Linear(decoder_width, 3 * patch_size**2)
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps

    def setup(self, stage: str) -> None:
        """Take pictures as the data shows them."""
        data = self.trainer.datamodule
        if hasattr(data, "preprocess"):
            self.guide.see_as(data.preprocess)

    def targets(self, small: Tensor) -> Tensor:
        """small [B,3,S,S] -> each patch's pixels [B,P,L], minus their mean and divided by their deviation."""
        patches = F.unfold(small, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    def encode(self, small: Tensor, visible: Tensor) -> Tensor:
        """small [B,3,S,S], the patches visible [B,V] -> tokens [B,1+V,W].

        With all patches visible, in their order, these are the tokens of ``Guide.forward``.
        """
        vit = self.guide.vit
        x = take(vit.patch_embed(small) + vit.pos_embed[:, 1:], visible)
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first.to(x.dtype), x], dim=1)))

    def decode(self, x: Tensor, visible: Tensor) -> Tensor:
        """Tokens x [B,1+V,W] of the patches visible [B,V] -> predicted pixels of all patches [B,P,L]."""
        x = self.decoder_embed(x)
        patches = self.mask_token.to(x.dtype).expand(len(x), self.patches, -1)
        patches = patches.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions
        return self.to_pixels(self.decoder_norm(self.decoder(x))[:, 1:])

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images [B,3,·,·] -> mean squared error over the masked patches, about 1 for predicting each patch's mean.

        generator: draws the masks, on the CPU; None: torch's default generator.
        """
        small = self.guide.shrink(images)
        order = of_this_rank(lambda rows: torch.rand(rows, self.patches, generator=generator), len(images))
        order = order.argsort(1).to(images.device)
        visible, masked = order[:, : self.visible], order[:, self.visible :]
        predicted = self.decode(self.encode(small, visible), visible)
        return F.mse_loss(take(predicted, masked).float(), take(self.targets(small), masked))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = self.loss(batch["image"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The same loss, with the same masks at every validation."""
        loss = self.loss(batch["image"], torch.Generator().manual_seed(batch_idx))
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["image"]))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """As validation, on the test split."""
        self.validation_step(batch, batch_idx)

    def deployable(self) -> tuple[Guide, None]:
        """The trained encoder; no CLIP goes with it."""
        return self.guide, None

    def configure_optimizers(self) -> dict:
        """AdamW as masked autoencoders take it, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches, betas=(0.9, 0.95))
