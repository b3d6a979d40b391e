"""open_clip's own ``VisionTransformer``: CLIP and its variants, such as CLIPA and CoCa.

Shapes: see ``common.adapters.tower``; Q queries of an attentional pooler.
"""

from __future__ import annotations

import torch
from open_clip.transformer import (
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters.tower import AdaptedBlock, AdaptedTower, PatchMap, mean_of


class OpenClipBlock(AdaptedBlock):
    """A plain or custom block. ValueError: a block of another type, or with scaled cosine attention."""

    def __init__(self, source: ResidualAttentionBlock | CustomResidualAttentionBlock) -> None:
        super().__init__(source)
        self.custom = isinstance(source, CustomResidualAttentionBlock)
        if not self.custom and not isinstance(source, ResidualAttentionBlock):
            raise ValueError(f"{type(source).__name__} is no block that the adapters know")
        if self.custom and source.attn.scaled_cosine:
            raise ValueError("scaled_cosine_attn: its logits are no scaled dot products; such towers are not adapted")

    def project(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.source.attn
        qkv = F.linear(self.source.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.custom:
            query, key = attention.ln_q(query), attention.ln_k(key)
            if attention.head_scale is not None:  # it scales a head's output, so as well its values
                value = value * attention.head_scale
        return query, key, value

    def output(self, mixed: Tensor) -> Tensor:
        attention = self.source.attn
        if self.custom:
            return self.source.ls_1(self.source.ln_attn(attention.out_proj(attention.ln_inner(mixed))))
        return self.source.ls_1(attention.out_proj(mixed))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.source.ls_2(self.source.mlp(self.source.ln_2(x)))


class OpenClipTower(AdaptedTower):
    """CLIP's vision transformer with any of open_clip's poolings: class token, mean, or attention (CoCa).

    ValueError: a pooling without an embedding ("none"), or one of CoCa's two that open_clip calls unfinished.
    """

    stem = ("conv1", "class_embedding", "positional_embedding")

    def __init__(self, source: VisionTransformer) -> None:
        if getattr(source, "attn_pool_contrastive", None) is not None:
            raise ValueError(f"attentional_pool {source.attn_pool_type!r} is unfinished in open_clip; use true")
        if source.pool_type not in ("tok", "avg"):
            raise ValueError(f"pool_type {source.pool_type!r} gives no embedding; use tok or avg")
        super().__init__(
            [OpenClipBlock(block) for block in source.transformer.resblocks],
            source.image_size,
            source.grid_size,
            width=source.conv1.out_channels,
            embed_dim=source.output_dim,
            leading=1,
            reads_class=source.attn_pool is None and source.pool_type == "tok",
        )
        self.source = source

    def embed(self, images: Tensor) -> Tensor:
        self.check_size(images)
        source = self.source
        patches = source.conv1(images).flatten(2).transpose(1, 2)
        class_token = source.class_embedding.expand(images.shape[0], 1, -1).to(patches.dtype)
        x = torch.cat([class_token, patches], dim=1) + source.positional_embedding.to(patches.dtype)
        return source.ln_pre(x)

    @property
    def ln_pre(self) -> nn.Module:
        return self.source.ln_pre

    def patch_map(self) -> PatchMap:
        first, positions = self.source.positional_embedding.tensor_split([1])
        return PatchMap(self.source.conv1.weight, positions, self.source.class_embedding + first[0])

    def pool(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = self.source
        if source.attn_pool is not None:
            x = source.ln_post(_attended(source.attn_pool, x, bias))  # [B,Q,D]
            pooled = x[:, 0] if source.pool_type == "tok" else x[:, 1:].mean(1)
        elif source.final_ln_after_pool:
            pooled = source.ln_post(self._pooled(x, sizes))
        else:
            pooled = self._pooled(source.ln_post(x), sizes)
        return pooled if source.proj is None else pooled @ source.proj

    def _pooled(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        return x[:, 0] if self.source.pool_type == "tok" else mean_of(x[:, 1:], sizes)


def _attended(pooler: AttentionalPooler, x: Tensor, bias: Tensor | None) -> Tensor:
    """An attentional pooler's output [B,Q,E] for tokens x [B,N,D]; bias: additive mask [B,1,1,N]."""
    if bias is None:
        return pooler(x)
    queries = pooler.ln_q(pooler.query).expand(x.shape[0], -1, -1)
    tokens = pooler.ln_k(x)
    mask = bias.expand(-1, pooler.attn.num_heads, queries.shape[1], -1).flatten(0, 1)
    return pooler.attn(queries, tokens, tokens, need_weights=False, attn_mask=mask)[0]
