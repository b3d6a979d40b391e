"""The vision towers of transformers' CLIP and SigLIP; the library itself is not imported.

Shapes: see ``common.adapters.tower``.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from common.adapters.tower import AdaptedBlock, AdaptedTower, PatchMap

KINDS = ("CLIPVisionModel", "CLIPVisionTransformer", "SiglipVisionModel", "SiglipVisionTransformer")
"""The types that are adapted; which of them holds the blocks depends on the release."""


class TransformersBlock(AdaptedBlock):
    """An encoder layer of CLIP or SigLIP."""

    def project(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed = self.source.self_attn, self.source.layer_norm1(x)
        parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        query, key, value = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def output(self, mixed: Tensor) -> Tensor:
        return self.source.self_attn.out_proj(mixed)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.source.mlp(self.source.layer_norm2(x))


class TransformersTower(AdaptedTower):
    """CLIP's tower with its class token, or SigLIP's with its pooling head.

    projection: that of the CLIP which holds the tower; None: the embedding is not projected.
    ValueError: a SigLIP tower without its head, or attention dropout.
    """

    stem = ("embeddings",)

    def __init__(self, source: nn.Module, projection: nn.Module | None = None) -> None:
        config, head = source.config, getattr(source, "head", None)
        has_class = hasattr(source.embeddings, "class_embedding")
        if head is None and not has_class:
            raise ValueError(f"{type(source).__name__} without vision_use_head gives no embedding to pool")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout {config.attention_dropout} is not adapted; configure 0")
        grid = config.image_size // config.patch_size
        reader = None if has_class else partial(_query_logits, head, source.post_layernorm)
        super().__init__(
            [TransformersBlock(layer, reader) for layer in source.encoder.layers],
            (config.image_size, config.image_size),
            (grid, grid),
            width=config.hidden_size,
            embed_dim=config.hidden_size if projection is None else projection.out_features,
            leading=int(has_class),
            reads_class=has_class,
        )
        self.source, self.projection = source, projection or nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return self.ln_pre(self.source.embeddings(images))

    @property
    def ln_pre(self) -> nn.Module:
        return getattr(self.source, "pre_layrnorm", nn.Identity())  # the library's spelling

    def patch_map(self) -> PatchMap:
        embeddings = self.source.embeddings
        positions, bias = embeddings.position_embedding.weight, embeddings.patch_embedding.bias
        class_token = None
        if self.leading:
            class_token, positions = embeddings.class_embedding + positions[0], positions[1:]
        return PatchMap(embeddings.patch_embedding.weight, positions if bias is None else positions + bias, class_token)

    def pool(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if self.leading:
            return self.projection(self.source.post_layernorm(x[:, 0]))
        head, x = self.source.head, self.source.post_layernorm(x)
        if bias is None:
            return self.projection(head(x))
        probe = head.probe.expand(x.shape[0], -1, -1)
        mask = bias.expand(-1, head.attention.num_heads, -1, -1).flatten(0, 1)
        pooled = head.attention(probe, x, x, need_weights=False, attn_mask=mask)[0]
        return self.projection((pooled + head.mlp(head.layernorm(pooled)))[:, 0])


def _query_logits(head: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Attention logits [B,H,N] of the head's query to x [B,N,D], up to one constant per head, without forming keys."""
    attention, width = head.attention, x.shape[-1]
    heads = attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = (weight[:width] @ head.probe[0, 0] + bias[:width]).unflatten(0, (heads, 1, -1))  # [H,1,d]
    keys = weight[width : 2 * width].unflatten(0, (heads, -1))  # [H,d,D]
    return (query @ keys).squeeze(1) @ norm(x).transpose(1, 2) * (width // heads) ** -0.5
