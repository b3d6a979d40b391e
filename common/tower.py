"""Image and text towers of CLIP's ViT family.

Shapes: B images or texts, N tokens, M cached tokens, D width, H heads, E joint dim, T text tokens, g patches a side.

Parameter names are open_clip's, so that its state dicts load unchanged. Every tower has three public steps,
``embed -> run_blocks -> pool``; a method replaces one of them and keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import Attention, KVCache, Mask, class_logits


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP weights, computed as silu(1.702 x) / 1.702."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


def feed_forward_network(width: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> nn.Sequential:
    """A block's two linear maps, D -> ratio·D -> D, with the activation between them, under open_clip's names."""
    network, hidden = nn.Sequential(), int(width * mlp_ratio)
    network.add_module("c_fc", nn.Linear(width, hidden))
    network.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
    network.add_module("c_proj", nn.Linear(hidden, width))
    return network


class Block(nn.Module):
    """Pre-norm transformer block of two public half steps, each with its residual connection.

    No half step writes into what a part has returned, so a forward hook may keep it.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = feed_forward_network(width, mlp_ratio, quick_gelu)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``, for this block of any model. NotImplementedError: always."""
        raise NotImplementedError(
            "TorchScript cannot express these blocks; use torch.export.export, or torch.jit.trace on example inputs"
        )

    def attend(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B,N,D] + attention(ln_1(x)); see ``Attention.forward`` for mask and cache."""
        return x + self.attn(self.ln_1(x), mask, cache, layer)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [B,N,D] + mlp(ln_2(x))."""
        return x + self.mlp(self.ln_2(x))

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Both half steps, x [B,N,D] -> [B,N,D]."""
        return self.feed_forward(self.attend(x, mask, cache, layer))


class Transformer(nn.Module):
    """A stack of blocks under open_clip's name ``resblocks``, with CLIP's initial scales."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, quick_gelu) for _ in range(layers))
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)


class BlockOutput(NamedTuple):
    """What ``intermediates`` gives of one block, without any later norm.

    patches: [B,g²,D], the patch tokens that the block returns, in the order of the grid's rows.
    class_token: [B,D], the class token that it returns; None: the tower has none.
    class_attention: [B,H,M+N], the attention of the class token to all tokens that it sees, in this block; the
        weights of a head sum to 1. M cached tokens come first, then the class token itself, then the patches.
    """

    patches: Tensor
    class_token: Tensor | None
    class_attention: Tensor | None


class BlockTower(nn.Module):
    """The base of every tower: a stack of blocks, run in part or whole.

    leading: how many tokens stand before the patches; the first is the class token where ``has_class_token``.
    """

    transformer: Transformer
    leading = 1
    has_class_token = True

    def observed_blocks(self, x: Tensor, layers: Sequence[int], cache: KVCache | None = None) -> list[BlockOutput]:
        """Run x [B,N,D], leading tokens first, through the blocks -> what each of ``layers`` returns, in their order.

        layers: numbers of blocks from 0, or from the end as -1, -2, ...  cache: see ``Attention.forward``.
        ValueError: a block that the tower does not have.
        """
        blocks = self.transformer.resblocks
        for layer in layers:
            if not -len(blocks) <= layer < len(blocks):
                raise ValueError(f"block {layer} of a tower of {len(blocks)}; take {-len(blocks)} to {len(blocks) - 1}")
        wanted = [layer % len(blocks) for layer in layers]
        outputs, cached = {}, cache is not None and cache.tokens > 0
        for layer, block in enumerate(blocks):
            entered, past = x, cache.keys(layer) if cached else None
            x = block(x, None, cache, layer)
            if layer in wanted:
                logits = self.class_logits(block, entered, past)
                wide = torch.promote_types(x.dtype, torch.float32)
                attention = None if logits is None else logits.softmax(-1, wide)
                class_token = x[:, 0] if self.has_class_token else None
                outputs[layer] = BlockOutput(x[:, self.leading :], class_token, attention)
        return [outputs[layer] for layer in wanted]

    def class_logits(self, block: nn.Module, x: Tensor, past: Tensor | None) -> Tensor | None:
        """Attention logits [B,H,M+N] of the class token in a block that x [B,N,D] enters; None: there are none.

        past: keys [B,H,M,D/H] of cached tokens.
        """
        return class_logits(block.attn, block.ln_1(x), past)

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run x [B,N,D] through blocks ``start`` to ``stop`` (exclusive; None: the end) -> [B,N,D].

        mask and cache: see ``Mask`` and ``Attention.forward``; each block has its own entry in the cache.
        """
        blocks = self.transformer.resblocks
        for layer in range(len(blocks))[start:stop]:
            x = blocks[layer](x, mask, cache, layer)
        return x


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Interpolate positional embeddings [1+g²,D], class token first, to another grid: [1+grid²,D].

    Bicubic with antialiasing, as in open_clip. ValueError: g is not an integer.
    """
    side = math.isqrt(len(positions) - 1)
    if side**2 != len(positions) - 1:
        raise ValueError(f"{len(positions)} positions are not those of a class token and a square of patches")
    if side == grid:
        return positions
    cells = positions[1:].T.unflatten(1, (side, side)).unsqueeze(0)  # [1,D,g,g]
    cells = F.interpolate(cells, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1], cells[0].flatten(1).T])


class ImageTower(BlockTower):
    """CLIP's vision transformer: patches and a class token -> blocks -> joint embedding of the class token."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            near = max(image_size // patch_size, 1) * patch_size
            raise ValueError(
                f"image_size {image_size} is not divisible by patch_size {patch_size}; "
                f"use {near} or {near + patch_size}"
            )
        self.image_size, self.patch_size, self.grid = image_size, patch_size, image_size // patch_size
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp_ratio, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    @property
    def width(self) -> int:
        """D."""
        return self.proj.shape[0]

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.proj.shape[1]

    @property
    def hidden(self) -> int:
        """The width of a block's hidden layer."""
        return self.transformer.resblocks[0].mlp.c_fc.out_features

    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> tokens [B,1+g²,D], class token first, after positional embeddings and ``ln_pre``.

        ValueError: the images are not S×S.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels given to a tower for {self.image_size}; resize them"
            )
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        # Not len(): a plain number would become a constant of an exported graph.
        class_token = self.class_embedding.expand(images.shape[0], 1, -1).to(patches.dtype)
        return self.ln_pre(torch.cat([class_token, patches], dim=1) + self.positional_embedding)

    def class_feature(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> the class token [B,D] before projection. All tokens are normalised, as in published counts."""
        return self.ln_post(x)[:, 0]

    def pool(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> joint embedding [B,E] of the class token."""
        return self.class_feature(x) @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.pool(self.run_blocks(self.embed(images)))

    def intermediates(self, images: Tensor, layers: Sequence[int]) -> list[BlockOutput]:
        """images [B,3,S,S] -> patch tokens [B,g²,D], class token [B,D] and class attention [B,H,1+g²] of ``layers``.

        layers: numbers of blocks, -1 the last; see ``observed_blocks``. ``ln_post`` normalises tokens of the last one
        as ``pool`` does.
        """
        return self.observed_blocks(self.embed(images), layers)


class TextTower(BlockTower):
    """CLIP's causal text transformer; the embedding is that of the end-of-text token, the highest id of each row."""

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, heads, mlp_ratio, quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B,T], T <= context_length -> tokens [B,T,D]. ValueError for longer rows."""
        length = ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} text tokens given to a tower of context_length {self.context_length}")
        return self.token_embedding(ids) + self.positional_embedding[:length]

    def normalised_tokens(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> every token [B,T,D] after the last norm, before projection."""
        return self.ln_final(self.run_blocks(self.embed(ids), mask="causal"))

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B,T,D] -> joint embedding [B,E] of each row's end-of-text token."""
        return self.ln_final(x)[torch.arange(x.shape[0], device=x.device), ids.argmax(-1)] @ self.text_projection

    def forward(self, ids: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """ids [B,T] -> z [B,E]; with ``return_tokens`` also every token [B,T,E] after the last norm and projection.

        Attention is causal, so cutting all rows to the batch's longest text does not change z.
        """
        x = self.run_blocks(self.embed(ids), mask="causal")
        return (self.pool(x, ids), self.ln_final(x) @ self.text_projection) if return_tokens else self.pool(x, ids)
