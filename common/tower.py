"""Image and text towers of CLIP's ViT family, on the fused attention kernel.

Shapes: B images or texts, N tokens, M cached tokens, D width, H heads, E joint dim, T text tokens, g patches a side.

Parameter names are open_clip's, so that its state dicts load unchanged. Every tower has three public steps,
``embed -> run_blocks -> pool``; a method replaces one of them and keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KVCache:
    """Keys and values of every block, for tokens to which later tokens attend.

    No tensor is written in place: ``append`` concatenates and ``select`` gathers, so an older cache stays valid.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``key`` and ``value`` [B,H,N,D/H] of one block; returns all M+N keys and values, oldest first."""
        if layer in self._layers:
            past_key, past_value = self._layers[layer]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self._layers[layer] = (key, value)
        return key, value

    def select(self, rows: Tensor | None = None) -> KVCache:
        """A cache of the batch rows ``rows`` (long [K]); None: a shallow copy that grows independently."""
        chosen = KVCache()
        for layer, (key, value) in self._layers.items():
            chosen._layers[layer] = (key, value) if rows is None else (key[rows], value[rows])
        return chosen

    def keys(self, layer: int) -> Tensor:
        """The keys [B,H,M,D/H] of one block. KeyError: the block has none."""
        return self._layers[layer][0]

    def flat(self) -> tuple[Tensor, ...]:
        """Key and value [B,H,M,D/H] of every block in turn, the form in which an exported graph passes the cache on."""
        return tuple(tensor for layer in sorted(self._layers) for tensor in self._layers[layer])

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> KVCache:
        """The inverse of ``flat``."""
        cache = cls()
        cache._layers = dict(enumerate(zip(tensors[::2], tensors[1::2], strict=True)))
        return cache

    @property
    def tokens(self) -> int:
        """M, the number of cached tokens (0 when empty)."""
        return next(iter(self._layers.values()))[0].shape[2] if self._layers else 0


Mask = Tensor | Literal["causal"] | None
"""Who may attend to whom: boolean (True = may attend) or additive, broadcastable to [B,H,N,M+N]; "causal" = to itself
and to what stands before, without cached tokens, for which the fused kernel needs no tensor; None = all to all."""


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V by the fused kernel; query [B,H,N,d], key and value [B,H,M,d] -> [B,H,N,d].

    mask: see ``Mask``; "causal" needs M = N.

    On a CPU with gradients it runs in fp32 under any autocast, since the backward pass of PyTorch's fused CPU kernel
    is slower in bf16: twice as slow at 197 tokens and six times at 39, as measured.
    """
    causal = isinstance(mask, str)
    mask = None if causal else mask
    if query.device.type == "cpu" and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            dtype, wide = query.dtype, (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
            if mask is not None and mask.is_floating_point():
                mask = mask.to(torch.promote_types(dtype, torch.float32))
            return F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=causal).to(dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``, computed by the fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> queries, keys and values of all heads, [B,N,3D]."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B,N,D] -> [B,N,D]. With a cache, the N tokens also attend to its M tokens, and are added to it."""
        assert cache is None or not isinstance(mask, str), "causal attention over a cache needs a tensor"
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out = fused_attention(query, key, value, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def class_logits(attention: Attention, x: Tensor, past: Tensor | None = None) -> Tensor:
    """Attention logits [B,H,M+N] of the class token.

    x: [B,N,D] after ``ln_1``, class token first.
    past: keys [B,H,M,D/H] of cached tokens, which come before x; None: there are none.

    q·(Wx + b) is computed as (Wᵀq)·x + q·b. That takes N·D·H + 2·D² multiply-adds (and M·D with a cache), where the
    keys alone would take N·D², and the other rows keep the fused kernel. The keys' bias adds one constant to all logits
    of a head, which the softmax ignores; cached keys include it, and a reader of logits wants it.
    """
    width, heads = x.shape[-1], attention.heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(x[:, 0], weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(0, 1)  # [H,B,D/H]
    folded = query @ weight[width : 2 * width].unflatten(0, (heads, -1))  # [H,B,D]
    key_bias = (query * bias[width : 2 * width].unflatten(0, (heads, 1, -1))).sum(-1)  # [H,B]
    logits = folded.transpose(0, 1) @ x.transpose(1, 2) + key_bias.T[..., None]
    if past is not None:
        logits = torch.cat([(past @ query.transpose(0, 1)[..., None]).squeeze(-1), logits], dim=-1)
    return logits * (width // heads) ** -0.5


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

    def __prepare_scriptable__(self) -> Block:
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

    patches: [B,N-1,D], the patch tokens that the block returns, in the order of the grid's rows.
    class_token: [B,D], the class token that it returns.
    class_attention: [B,H,M+N], the attention of the class token to all tokens that it sees, in this block; the
        weights of a head sum to 1. M cached tokens come first, then the class token itself, then the patches.
    """

    patches: Tensor
    class_token: Tensor
    class_attention: Tensor


class BlockTower(nn.Module):
    """The base of every tower: a stack of blocks, run in part or whole."""

    transformer: Transformer

    def observed_blocks(self, x: Tensor, layers: Sequence[int], cache: KVCache | None = None) -> list[BlockOutput]:
        """Run x [B,N,D], class token first, through the blocks -> what each of ``layers`` returns, in their order.

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
                logits = class_logits(block.attn, block.ln_1(entered), past)
                attention = logits.softmax(-1, torch.promote_types(x.dtype, torch.float32))
                outputs[layer] = BlockOutput(x[:, 1:], x[:, 0], attention)
        return [outputs[layer] for layer in wanted]

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

    leading = 1  # the class token

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
