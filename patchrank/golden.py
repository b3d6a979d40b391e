"""The golden ranking of a picture's tokens: what its embedding loses when a block of them is removed.

Shapes: B images, N patch tokens, W blocks, V variants (an image without one block), K tokens of a variant (class token
included), D width, H heads, E joint dim, C classes.

The paper runs the tower once for every variant. The same numbers cost less here, since variants share much:
* the blocks before the prune layer, which see all tokens, run once for an image;
* so do the queries, keys and values of the first block after it: a token's own do not depend on the others;
* of the last block only the class token is read, and its keys and values need not be formed (``class_step``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.reduction import class_logits
from common.tower import Block, ImageTower, fused_attention, linear
from patchrank.scores import Score, check_score, grid_blocks, removal_costs, token_scores


class GoldenRanking(NamedTuple):
    """order: long [B,N], patches by their place in the flattened grid, most important first.

    scores: [B,N], by place, high = keep; a token's score is of the last round that it was there for, and compares
    with those of the same round.
    """

    order: Tensor
    scores: Tensor


@torch.no_grad()
def golden_ranking(
    tower: ImageTower,
    images: Tensor,
    score: Score = "feature",
    *,
    prune_layer: int = 3,
    block: int = 2,
    stride: int = 1,
    rounds: int = 1,
    removed_per_round: int | None = None,
    class_embeddings: Tensor | None = None,
    logit_scale: Tensor | float | None = None,
    labels: Tensor | None = None,
    memory: int | None = None,
) -> GoldenRanking:
    """Rank the patch tokens of images [B,3,S,S] by what their removal before block ``prune_layer`` costs.

    score: see ``patchrank.scores``; "confidence" needs class_embeddings [C,E] (of length one) and logit_scale (the
        multiplier), "label" labels (long [B]) too.
    block, stride: tokens are removed by windows of block x block patches, ``stride`` apart; a token's score is the
        mean over the windows that hold it. The class token always stays.
    rounds, removed_per_round: greedy search: after every round but the last the tokens that cost least are removed,
        and the rest are scored anew, a window being what is left of it. The reference stays the whole picture.
    memory: bytes that variants computed together may take; by default 16 MiB on a CPU, to stay in its caches, and
        1 GiB elsewhere. It changes the results by rounding at most.
    Of equal scores the patch that comes first in the grid counts as the more important.
    ValueError: settings that do not fit the tower or each other.
    """
    classes = {"class_embeddings": class_embeddings, "logit_scale": logit_scale}
    check_score(score, {**classes, "labels": labels})
    member = grid_blocks(tower.grid, block, stride).to(images.device)
    tokens, layers = member.shape[1], len(tower.transformer.resblocks)
    if not 0 <= prune_layer < layers:
        raise ValueError(f"prune_layer {prune_layer} is not one of this tower's blocks, 0 to {layers - 1}")
    _check_rounds(rounds, removed_per_round, tokens)
    if memory is None:
        memory = 2**24 if images.device.type == "cpu" else 2**30
    together = _variants_in(memory, tower, tokens + 1, images.element_size())
    of_parts = repeat(None) if labels is None else labels.to(images.device).split(together)
    found = []
    for part, of_part in zip(images.split(together), of_parts, strict=False):  # repeat has no end
        variants = Variants(tower, part, prune_layer, memory)
        costs = partial(removal_costs, score, variants.full(), labels=of_part, **classes)
        found.append(_rank(variants, member, costs, rounds, removed_per_round))
    return GoldenRanking(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _check_rounds(rounds: int, removed_per_round: int | None, tokens: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    if rounds == 1:
        if removed_per_round is not None:
            said = f"removed_per_round {removed_per_round} changes nothing in one round, which ranks all tokens"
            warnings.warn(said, stacklevel=4)
        return
    if removed_per_round is None or removed_per_round < 1:
        raise ValueError(
            f"{rounds} rounds need removed_per_round, not {removed_per_round}: how many tokens each removes"
        )
    if (rounds - 1) * removed_per_round >= tokens:
        raise ValueError(
            f"{rounds} rounds of {removed_per_round} tokens leave nothing of {tokens} to rank; "
            f"use at most {(tokens - 1) // removed_per_round + 1} rounds"
        )


def _variants_in(memory: int, tower: ImageTower, tokens: int, itemsize: int) -> int:
    """How many variants of K tokens a budget in bytes holds, one at least.

    Alive at once in the widest place of a block: its input, a norm of it, and either queries, keys, values, what
    attention mixes and its product, or the hidden layer and its product.
    """
    width, hidden = tower.proj.shape[0], tower.transformer.resblocks[0].mlp.c_fc.out_features
    return max(1, memory // (tokens * itemsize * max(7 * width, 3 * width + hidden)))


def _rank(
    variants: Variants,
    member: Tensor,
    costs: Callable[[Tensor], Tensor],
    rounds: int,
    removed_per_round: int | None,
) -> GoldenRanking:
    """Greedy rounds over the windows member [W,N]; costs: pruned embeddings [B,W,E] -> [B,W]."""
    batch, tokens = len(variants.x), member.shape[1]
    remaining = member.new_ones(batch, tokens)
    tail = torch.empty(batch, 0, dtype=torch.long, device=member.device)  # removed tokens, the earliest last
    scores = torch.zeros((), device=member.device)
    for round_number in range(1, rounds + 1):
        removed = member & remaining[:, None]
        found = token_scores(costs(variants.without(removed, remaining)), removed)
        scores = torch.where(remaining, found, scores)
        order = scores.masked_fill(~remaining, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : tokens - tail.shape[1]]
        if round_number < rounds:
            order, last = order.tensor_split([order.shape[1] - removed_per_round], dim=1)
            tail = torch.cat([last, tail], dim=1)
            gone = member.new_zeros(last.shape)  # a tensor, since the counter's tracer cannot record a bool
            remaining = remaining.scatter(1, last, gone)
    return GoldenRanking(torch.cat([order, tail], dim=1), scores)


class Variants:
    """Embeddings of images [B,3,S,S] without some of their tokens, computed from what all these have in common.

    x: [B,1+N,D], what enters block ``layer``, where the tokens go.
    """

    def __init__(self, tower: ImageTower, images: Tensor, layer: int, memory: int) -> None:
        self.tower, self.layer, self.memory = tower, layer, memory
        self.x = tower.run_blocks(tower.embed(images), stop=layer)
        first = tower.transformer.resblocks[layer]
        self.is_last = layer == len(tower.transformer.resblocks) - 1
        if not self.is_last:
            self.qkv = linear(first.ln_1(self.x), first.attn.in_proj_weight, first.attn.in_proj_bias)

    def full(self) -> Tensor:
        """z [B,E] of the images with all their tokens."""
        batch, tokens = self.x.shape[:2]
        places = torch.arange(tokens, device=self.x.device).expand(batch, -1)
        return self.embed(torch.arange(batch, device=self.x.device), places)

    def without(self, removed: Tensor, remaining: Tensor) -> Tensor:
        """z [B,W,E] of the images without the patches removed, bool [B,W,N], of those remaining, bool [B,N].

        Windows that remove the same tokens are computed once, those that remove none not at all (their z is 0).
        """
        batch, windows = removed.shape[:2]
        alike = _first_alike(removed)
        sought = removed.any(-1) & (alike == torch.arange(windows, device=removed.device))
        image, kept = sought.nonzero()[:, 0], (remaining[:, None] & ~removed)[sought]
        counts = kept.sum(1)
        z = self.x.new_empty(len(image), self.tower.proj.shape[1])
        for count in counts.unique().tolist():  # variants of one length run together, as dense batches
            rows = (counts == count).nonzero().squeeze(1)
            patches = kept[rows].nonzero()[:, 1].view(len(rows), count)
            size = _variants_in(self.memory, self.tower, count + 1, self.x.element_size())
            for some, chosen in zip(rows.split(size), patches.split(size), strict=True):
                z[some] = self.embed(image[some], F.pad(chosen + 1, (1, 0)))
        out = z.new_zeros(batch, windows, z.shape[1])
        out[sought] = z
        return out.gather(1, alike[..., None].expand_as(out))

    def embed(self, image: Tensor, tokens: Tensor) -> Tensor:
        """z [V,E] of images (long [V]) with only some of their tokens (long [V,K], class token first)."""
        flat = (image[:, None] * self.x.shape[1] + tokens).flatten()
        x = self.x.flatten(0, 1).index_select(0, flat).unflatten(0, tokens.shape)
        blocks = self.tower.transformer.resblocks
        if not self.is_last:
            first = blocks[self.layer]
            qkv = self.qkv.flatten(0, 1).index_select(0, flat).unflatten(0, tokens.shape)
            query, key, value = qkv.unflatten(-1, (3, first.attn.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = fused_attention(query, key, value).transpose(1, 2).flatten(2)
            x = first.feed_forward(x + first.attn.out_proj(mixed))
            x = self.tower.run_blocks(x, self.layer + 1, len(blocks) - 1)
        return self.tower.pool(class_step(blocks[-1], x))


def golden_macs(
    tower: ImageTower,
    prune_layer: int = 3,
    block: int = 2,
    stride: int = 1,
    rounds: int = 1,
    removed_per_round: int | None = None,
    *,
    attention: bool = True,
) -> int:
    """Multiply-adds of ranking one picture, as ``gmacs`` of ``common.flops``; without attention as ``gmacs_paper``.

    Exact for one round. What later rounds cost depends on the picture, since their windows may be alike or have lost
    tokens; here each takes away a single token, which is the most that it can cost.
    """
    width, layers = tower.proj.shape[0], len(tower.transformer.resblocks)
    perceptron = 2 * width * tower.transformer.resblocks[0].mlp.c_fc.out_features
    heads, patches = tower.transformer.resblocks[0].attn.heads, tower.grid**2
    windows = len(grid_blocks(tower.grid, block, stride))

    def norm(tokens: int) -> int:
        return 5 * width * tokens

    def whole(tokens: int) -> int:
        products = 2 * width * tokens**2 if attention else 0
        return (4 * width**2 + perceptron) * tokens + products + 2 * norm(tokens)

    def project(tokens: int) -> int:
        return 3 * width**2 * tokens + norm(tokens)

    def last(tokens: int) -> int:  # class step and pooling; no fused attention
        folded = 4 * width**2 + 2 * heads * width * tokens
        return norm(tokens) + folded + perceptron + 2 * norm(1) + tower.proj.numel()

    def variant(tokens: int) -> int:
        between = layers - prune_layer - 1  # blocks that are not the last
        return last(tokens) + (between * whole(tokens) - project(tokens) if between else 0)

    embed = tower.conv1.weight.numel() * patches + norm(patches + 1)
    once = embed + prune_layer * whole(patches + 1) + (project(patches + 1) if prune_layer < layers - 1 else 0)
    left = [patches - number * (removed_per_round or 0) for number in range(1, rounds)]
    variants = windows * sum(map(variant, [patches + 1 - block**2, *left]))
    comparisons = rounds * windows**2 * patches  # of the windows with each other
    return once + variant(patches + 1) + variants + comparisons


def _first_alike(sets: Tensor) -> Tensor:
    """long [B,W]: for every one of an image's sets, bool [B,W,N], the first that holds the same."""
    members = sets.float()
    shared, sizes = members @ members.transpose(1, 2), members.sum(-1)
    same = (shared == sizes[:, :, None]) & (shared == sizes[:, None])
    return same.int().argmax(-1)


def class_step(block: Block, x: Tensor) -> Tensor:
    """The class token [V,1,D] that ``block`` makes of x [V,K,D]; the other tokens are only attended to.

    As in ``class_logits`` for keys, values are not formed: Σ a (Wx) is computed as W (Σ a x), so K·D·H multiply-adds
    take the place of K·D² for either.
    """
    attention, normed = block.attn, block.ln_1(x)
    width, heads = x.shape[-1], attention.heads
    logits = class_logits(attention, normed)
    weights = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).to(normed.dtype)
    mixed = (weights @ normed).transpose(0, 1)  # [H,V,D]
    values = attention.in_proj_weight[2 * width :].unflatten(0, (heads, -1))
    out = (mixed @ values.transpose(1, 2)).transpose(0, 1).flatten(1) + attention.in_proj_bias[2 * width :]
    return block.feed_forward(x[:, :1] + attention.out_proj(out[:, None]))
