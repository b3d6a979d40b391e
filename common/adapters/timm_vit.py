"""timm's vision transformers, alone or as open_clip's ``TimmModel``: SigLIP, MobileCLIP-B, ViTamin, EVA, PE, ...

Shapes: see ``common.adapters.tower``.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters.tower import AdaptedBlock, AdaptedTower, MeanPooled, PatchMap, Reader, mean_of
from common.attention import Mask


class TimmBlock(AdaptedBlock):
    """A pre-norm block of ``VisionTransformer``."""

    def project(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.source.attn
        qkv = attention.qkv(self.source.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return attention.q_norm(query), attention.k_norm(key), value

    def output(self, mixed: Tensor) -> Tensor:
        attention = self.source.attn
        mixed = getattr(attention, "norm", nn.Identity())(mixed)
        return self.source.drop_path1(self.source.ls1(attention.proj_drop(attention.proj(mixed))))

    def feed_forward(self, x: Tensor) -> Tensor:
        source = self.source
        return x + source.drop_path2(source.ls2(source.mlp(source.norm2(x))))


class RelativeBlock(TimmBlock):
    """A block whose attention adds a learned bias for the offset between two patches.

    shared: the tower's bias for all blocks; None: the block has its own.
    """

    positional = True

    def __init__(self, source: RelPosBlock, reader: Reader | None, leading: int, shared: nn.Module | None) -> None:
        super().__init__(source, reader)
        self.leading, self.relative = leading, shared if source.attn.rel_pos is None else source.attn.rel_pos

    def bias(self, places: Tensor | None, tokens: int) -> Tensor:
        """The bias [B or 1,H,N,N] of N tokens; 0 for trailing ones."""
        bias = self.relative.get_bias()  # [1,H,P+g²,P+g²]
        if places is not None:
            first = torch.arange(self.leading, device=places.device).expand(places.shape[0], -1)
            index = torch.cat([first, self.leading + places], dim=1)
            bias = bias[0][:, index[:, :, None], index[:, None]].transpose(0, 1)
        more = tokens - bias.shape[-1]
        return F.pad(bias, (0, more, 0, more)) if more else bias

    def mix(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask = None,
        places: Tensor | None = None,
    ) -> Tensor:
        bias = self.bias(places, key.shape[2])[:, :, : query.shape[2]].to(query.dtype)
        if mask is not None:
            assert isinstance(mask, Tensor), (
                "relative positions are a mask already, to which only a tensor can be added"
            )
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        return super().mix(x, query, key, value, bias)

    def attention_logits(self, query: Tensor, key: Tensor, places: Tensor | None = None) -> Tensor:
        return super().attention_logits(query, key, places) + self.bias(places, key.shape[2])

    def class_logits(
        self, x: Tensor, keys: Tensor | None = None, past: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        logits = super().class_logits(x, keys, past, places)
        return logits if self.reader is not None else logits + self.bias(places, x.shape[1])[:, :, 0]


class EvaStyleBlock(AdaptedBlock):
    """A block of EVA, EVA02 or PE, with rotary positions or without.

    rope: the tower's rotary embedding; None: there is none. Leading tokens are not rotated.
    """

    def __init__(
        self, source: EvaBlock | EvaBlockPostNorm, reader: Reader | None, leading: int, rope: nn.Module | None
    ) -> None:
        super().__init__(source, reader)
        self.leading, self.rope, self.positional = leading, rope, rope is not None
        self.post_norm = isinstance(source, EvaBlockPostNorm)

    def project(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.source.attn
        normed = x if self.post_norm else self.source.norm1(x)
        if attention.qkv is None:
            parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
            query, key, value = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        else:
            bias = attention.qkv.bias
            if getattr(attention, "q_bias", None) is not None:
                bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            qkv = F.linear(normed, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        if self.rope is None:
            return query, key, value
        return self._rotated(query, places), self._rotated(key, places), value

    def _rotated(self, heads: Tensor, places: Tensor | None) -> Tensor:
        """Queries or keys [B,H,N,d] with those of patches rotated by their places."""
        table = self.rope.get_embed()  # [g²,2d]
        if places is not None:
            table = table[places][:, None]  # [B,1,K,2d]
        first, patches, last = heads.tensor_split((self.leading, self.leading + table.shape[-2]), dim=2)
        patches = apply_rot_embed_cat(patches, table, half=getattr(self.source.attn, "rotate_half", False))
        return torch.cat([first, patches.to(heads.dtype), last], dim=2)

    def output(self, mixed: Tensor) -> Tensor:
        attention, source = self.source.attn, self.source
        change = attention.proj_drop(attention.proj(attention.norm(mixed)))
        return source.drop_path1(source.norm1(change) if self.post_norm else _scaled(change, source.gamma_1))

    def feed_forward(self, x: Tensor) -> Tensor:
        source = self.source
        if self.post_norm:
            return x + source.drop_path2(source.norm2(source.mlp(x)))
        return x + source.drop_path2(_scaled(source.mlp(source.norm2(x)), source.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class TimmTower(AdaptedTower):
    """A timm trunk, and the projection that open_clip's ``TimmModel`` puts on it.

    trunk: see ``KINDS``.  head: the projection; None: the trunk alone.
    ValueError: a part that the adapters do not know, by its name.
    """

    stem = ("patch_embed", "cls_token", "reg_token", "pos_embed")

    def __init__(self, trunk: nn.Module, head: nn.Module | None = None) -> None:
        _check(trunk)
        leading, map_head = trunk.num_prefix_tokens, getattr(trunk, "attn_pool", None)
        reader: Reader | None = None
        if trunk.cls_token is None:
            name = type(trunk).__name__
            reader = MeanPooled(name) if map_head is None else partial(_query_logits, map_head, trunk.norm)
        if isinstance(trunk, Eva):
            blocks = [EvaStyleBlock(block, reader, leading, trunk.rope) for block in trunk.blocks]
        elif isinstance(trunk, VisionTransformerRelPos):
            blocks = [RelativeBlock(block, reader, leading, trunk.shared_rel_pos) for block in trunk.blocks]
        else:
            blocks = [TimmBlock(block, reader) for block in trunk.blocks]
        super().__init__(
            blocks,
            trunk.patch_embed.img_size,
            trunk.patch_embed.grid_size,
            width=trunk.embed_dim,
            embed_dim=_features(trunk, head),
            leading=leading,
            reads_class=map_head is None and trunk.global_pool == "token",
        )
        self.source, self.head = trunk, head or nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        self.check_size(images)
        trunk, patches = self.source, self.source.patch_embed(images)
        if isinstance(trunk, VisionTransformerRelPos):
            if trunk.cls_token is None:
                return patches
            return torch.cat([trunk.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)
        x = trunk._pos_embed(patches)
        return trunk.norm_pre(x[0] if isinstance(trunk, Eva) else x)

    @property
    def ln_pre(self) -> nn.Module:
        return getattr(self.source, "norm_pre", nn.Identity())

    def patch_map(self) -> PatchMap:
        stem, positions = self.source.patch_embed, getattr(self.source, "pos_embed", None)
        if self.positional or positions is None:
            raise ValueError("rotary and relative positions know no token that covers several patches")
        if not isinstance(stem, PatchEmbed) or not isinstance(stem.norm, nn.Identity):
            raise ValueError(f"its patches come from {type(stem).__name__}, which is not one linear map")
        if self.leading > (self.source.cls_token is not None):
            raise ValueError(f"it has registers, {self.leading} tokens before its patches")
        class_token, positions = self.source.cls_token, positions[0]
        if class_token is not None:
            class_token = class_token[0, 0]
            if not self.source.no_embed_class:
                class_token, positions = class_token + positions[0], positions[1:]
        if stem.proj.bias is not None:
            positions = positions + stem.proj.bias
        return PatchMap(stem.proj.weight, positions, class_token)

    def pool(self, x: Tensor, sizes: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        trunk, x = self.source, self.source.norm(x)
        first = 0 if isinstance(trunk, Eva) else self.leading  # Eva's pooling head reads leading tokens too
        if getattr(trunk, "attn_pool", None) is not None:
            pooled = trunk.attn_pool(x[:, first:], *([] if bias is None else [bias[..., first:]]))
        elif trunk.global_pool == "token":
            pooled = x[:, 0]
        else:
            pooled = mean_of(x[:, self.leading :], sizes)
        return self.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled))))


KINDS = {VisionTransformer: (Block,), Eva: (EvaBlock, EvaBlockPostNorm), VisionTransformerRelPos: (RelPosBlock,)}
"""The trunks that are adapted, each with its blocks."""


def _check(trunk: nn.Module) -> None:
    """ValueError names a part of the trunk that the adapters do not know."""
    name, kinds = type(trunk).__name__, next(kinds for kind, kinds in KINDS.items() if isinstance(trunk, kind))
    for block in trunk.blocks:
        attention = block.attn if isinstance(block, kinds) else None
        if attention is None:
            raise ValueError(f"{name} with blocks of type {type(block).__name__} is not adapted")
        if getattr(attention, "gate", None) is not None or getattr(attention, "num_kv_groups", 1) > 1:
            raise ValueError(f"{name} with gated or grouped-query attention is not adapted")
        if attention.attn_drop.p:
            raise ValueError(f"{name}: attn_drop_rate {attention.attn_drop.p} is not adapted; build it with 0")
    if trunk.global_pool not in ("token", "avg", "map") or getattr(trunk, "pool_include_prefix", False):
        raise ValueError(f"{name}: global_pool {trunk.global_pool!r} is not adapted; token, avg and map are")
    pool, rope = getattr(trunk, "attn_pool", None), getattr(trunk, "rope", None)
    if pool is not None and not (isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None):
        raise ValueError(f"{name}: an attention pool of type {type(pool).__name__} or with positions is not adapted")
    if rope is not None and (getattr(trunk, "rope_mixed", False) or not hasattr(rope, "feat_shape")):
        raise ValueError(f"{name}: rotary positions of type {type(rope).__name__} are not adapted")
    if getattr(trunk, "dynamic_img_size", False):
        raise ValueError(f"{name}: build it with dynamic_img_size false; the adapters need one grid")
    if isinstance(trunk, Eva) and trunk.patch_drop is not None:
        raise ValueError(f"{name}: build it with patch_drop_rate 0; a reducer must know which patches are there")


def _features(trunk: nn.Module, head: nn.Module | None) -> int:
    """E: the outputs of the last linear map after pooling."""
    maps = [part for part in (trunk.head, head) if part is not None]
    linear = [part for top in maps for part in top.modules() if isinstance(part, nn.Linear)]
    return linear[-1].out_features if linear else trunk.num_features


def _query_logits(pool: AttentionPoolLatent, norm: nn.Module, x: Tensor) -> Tensor:
    """Attention logits [B,H,N] of a pooling head's query to x [B,N,D].

    They are those that the head would give if x left the last block. q·(Wx + b) is computed as (Wᵀq)·x + q·b, which
    forms no keys.
    """
    if not isinstance(pool.k_norm, nn.Identity):
        raise ValueError("the pooling head normalises its keys, so its query gives no class attention before it")
    query = pool.q_norm(pool.q(pool.latent[0, :1]).unflatten(-1, (pool.num_heads, 1, -1)))[0]  # [H,1,d]
    weight = pool.kv.weight[: pool.kv.in_features].unflatten(0, (pool.num_heads, -1))  # [H,d,D]
    logits = (query @ weight).squeeze(1) @ norm(x).transpose(1, 2)
    if pool.kv.bias is not None:
        bias = pool.kv.bias[: pool.kv.in_features].unflatten(0, (pool.num_heads, -1))  # [H,d]
        logits = logits + (query[:, 0] * bias).sum(-1, keepdim=True)
    return logits * pool.scale
