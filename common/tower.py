"""Image and text towers of CLIP's ViT family, on the fused attention kernel.

Shapes: B images or texts, N tokens, M cached tokens, D width, H heads, E joint dim, T text tokens, g patches a side.

Parameter names are open_clip's, so that its state dicts load unchanged. Every tower has three public steps,
``embed -> run_blocks -> pool``; a method replaces one of them and keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BF16_PRODUCTS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether this processor multiplies in bf16. Where it does not, oneDNN's call is an error, and torch's emulation takes
ten times as long as fp32."""


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


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V by the fused kernel; query [B,H,N,d], key and value [B,H,M,d] -> [B,H,N,d].

    mask: boolean or additive, broadcastable to [B,H,N,M].

    On a CPU with gradients it runs in fp32 under any autocast, since the backward pass of PyTorch's fused CPU kernel
    is slower in bf16: twice as slow at 197 tokens and six times at 39, as measured.
    """
    if query.device.type == "cpu" and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            dtype, wide = query.dtype, (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
            if mask is not None and mask.is_floating_point():
                mask = mask.to(torch.promote_types(dtype, torch.float32))
            return F.scaled_dot_product_attention(*wide, attn_mask=mask).to(dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: x [...,D], weight [K,D], bias [K] -> [...,K].

    Inference in bf16 on a CPU calls oneDNN's linear map directly, since ``F.linear`` first writes the bias into every
    row of its result. Tracers and compilers cannot record that call and get ``F.linear``.
    """
    narrow = x.device.type == "cpu" and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if narrow and BF16_PRODUCTS and not (torch.is_grad_enabled() or traced):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` computed by the function ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...,D] -> [...,K]."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``, computed by the fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B,N,D] -> [B,N,D]. With a cache, the N tokens also attend to its M tokens, and are added to it.

        mask: boolean (True = may attend) or additive, broadcastable to [B,H,N,M+N].
        """
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out = fused_attention(query, key, value, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    """x Φ(x). Without gradients it overwrites its input, which is always a fresh product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP weights. Overwrites its input as ``GELU`` does.

    Computed as silu(1.702 x) / 1.702, which takes one fused kernel instead of three.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.silu(1.702 * x) / 1.702
        return F.silu(x.mul_(1.702), inplace=True).div_(1.702)


def residual(x: Tensor, change: Tensor) -> Tensor:
    """x + change, written into ``change`` if no gradient is recorded and autocast has not changed its dtype."""
    in_place = not torch.is_grad_enabled() and change.dtype == x.dtype
    return change.add_(x) if in_place else x + change


def feed_forward_network(width: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> nn.Sequential:
    """A block's two linear maps, D -> ratio·D -> D, with the activation between them, under open_clip's names."""
    network, hidden = nn.Sequential(), int(width * mlp_ratio)
    network.add_module("c_fc", Linear(width, hidden))
    network.add_module("gelu", QuickGELU() if quick_gelu else GELU())
    network.add_module("c_proj", Linear(hidden, width))
    return network


class Block(nn.Module):
    """Pre-norm transformer block of two public half steps, each with its residual connection."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = feed_forward_network(width, mlp_ratio, quick_gelu)

    def attend(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B,N,D] + attention(ln_1(x)); see ``Attention.forward`` for mask and cache."""
        return residual(x, self.attn(self.ln_1(x), mask, cache, layer))

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [B,N,D] + mlp(ln_2(x))."""
        return residual(x, self.mlp(self.ln_2(x)))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
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


class BlockTower(nn.Module):
    """The base of every tower: a stack of blocks, run in part or whole."""

    transformer: Transformer

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run x [B,N,D] through blocks ``start`` to ``stop`` (exclusive; None: the end) -> [B,N,D].

        mask and cache: see ``Attention.forward``; each block has its own entry in the cache.
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

    def pool(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> joint embedding [B,E] of the class token. All tokens are normalised, as in published counts."""
        return self.ln_post(x)[:, 0] @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.pool(self.run_blocks(self.embed(images)))


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
        causal = torch.ones(context_length, context_length, dtype=torch.bool).tril()
        self.register_buffer("causal_mask", causal, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B,T], T <= context_length -> tokens [B,T,D]. ValueError for longer rows."""
        length = ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} text tokens given to a tower of context_length {self.context_length}")
        return self.token_embedding(ids) + self.positional_embedding[:length]

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B,T,D] -> joint embedding [B,E] of each row's end-of-text token."""
        return self.ln_final(x)[torch.arange(len(x), device=x.device), ids.argmax(-1)] @ self.text_projection

    def forward(self, ids: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """ids [B,T] -> z [B,E]; with ``return_tokens`` also every token [B,T,E] after the last norm and projection.

        The mask is causal, so cutting all rows to the batch's longest text does not change z.
        """
        length = ids.shape[1]
        x = self.run_blocks(self.embed(ids), mask=self.causal_mask[:length, :length])
        z = self.pool(x, ids)
        return (z, self.ln_final(x) @ self.text_projection) if return_tokens else z
