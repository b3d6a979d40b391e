"""Attention on the fused kernel: masks, the cache of keys and values, and the class token's logits alone.

Shapes: B images or texts, N tokens, M cached tokens, D width, H heads, d = D/H.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

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


Mask = Tensor | Literal["causal"] | tuple[int, ...] | None
"""Who may attend to whom; None = all to all.

A tensor, boolean (True = may attend) or additive, broadcastable to [B,H,N,M+N]. Or, without cached tokens and without
a tensor: "causal", a token to itself and to those before; or (n_0, n_1, ...) with sum N, block-causal: the first n_0
tokens to each other, the next n_1 to those and to each other, and so on.
"""


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V by the fused kernel; query [B,H,N,d], key and value [B,H,M,d] -> [B,H,N,d].

    mask: see ``Mask``; M = N unless it is a tensor or None. A block-causal one takes one call a block, which skips the
    products that a mask tensor would hide, and leaves the kernel free to be the one without masks.

    On a CPU with gradients it runs in fp32 under any autocast, since the backward pass of PyTorch's fused CPU kernel
    is slower in bf16: twice as slow at 197 tokens and six times at 39, as measured.
    """
    if query.device.type == "cpu" and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            dtype, wide = query.dtype, (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
            if isinstance(mask, Tensor) and mask.is_floating_point():
                mask = mask.to(torch.promote_types(dtype, torch.float32))
            return _fused(*wide, mask).to(dtype)
    return _fused(query, key, value, mask)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    if isinstance(mask, tuple):
        parts = zip(query.split(mask, dim=2), accumulate(mask), strict=True)
        mixed = (_fused(part, key[:, :, :end], value[:, :, :end], None) for part, end in parts)
        # As the kernel lays its output out: heads are inside tokens.
        return torch.cat([part.transpose(1, 2) for part in mixed], dim=1).transpose(1, 2)
    causal = isinstance(mask, str)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if causal else mask, is_causal=causal)


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
        assert cache is None or not isinstance(mask, str | tuple), "a causal mask over a cache needs a tensor"
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
