"""Phase I, the golden ranking: tokens ranked by what the image's embedding loses without them.

Shapes: B images, N patch tokens, W blocks, V variants (an image without one block), K tokens of a variant (class token
included), D width, H heads, E joint dim, C classes.

The paper runs the tower once for every variant. The variants share much, so the same numbers cost less here:
* the blocks before the prune layer see all tokens and run once for an image;
* the queries, keys and values of the first block after it are computed once too, since they do not mix tokens;
* only the class token of the last block is read, so its keys and values need not be formed (``class_step``).

A tower of another library (``common.adapters``) is ranked the same way. Its last block computes all its keys and
values, and all its tokens where the embedding is pooled from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.adapters import AdaptedBlock, AdaptedTower
from common.attention import class_logits, fused_attention
from common.tower import Block, ImageTower
from patchrank.scores import Score, check_score, grid_blocks, removal_costs, token_scores


class GoldenRanking(NamedTuple):
    """A ranking of the patch tokens.

    order: long [B,N], places in the flattened grid, most important first.
    scores: [B,N], by place, high = keep. A token's score comes from the last round in which it was present, and
        compares with the scores of that round alone.
    """

    order: Tensor
    scores: Tensor


@torch.no_grad()
def golden_ranking(
    tower: ImageTower | AdaptedTower,
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
        multiplier), "label" needs labels (long [B]) too.
    block, stride: windows of block x block patches, ``stride`` apart, are removed one at a time. A token's score is
        the mean over the windows that hold it. The class token always stays.
    rounds, removed_per_round: greedy search. Each round but the last removes the tokens that cost least; the next
        one scores the rest, with windows of what remains in them. The reference is always the whole image.
    memory: bytes that variants computed together may take; by default 16 MiB on a CPU, to stay in its caches, and
        1 GiB elsewhere. It changes the results by rounding at most.
    Of equal scores the earlier patch of the grid is the more important.
    ValueError: settings that do not fit the tower or each other.
    """
    classes = {"class_embeddings": class_embeddings, "logit_scale": logit_scale}
    check_score(score, {**classes, "labels": labels})
    member = grid_blocks(tower.grid, block, stride).to(images.device)
    tokens, layers = member.shape[1], len(tower.transformer.resblocks)
    if not 0 <= prune_layer < layers:
        raise ValueError(f"prune_layer {prune_layer} is not one of this tower's blocks, 0 to {layers - 1}")
    _check_rounds(rounds, removed_per_round, tokens)
    memory = memory or default_memory(images.device)
    size = _variants_in(memory, tower, tokens + tower.leading, images.element_size())
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(images)} pictures; give one a picture")
    parts = images.split(size)
    label_parts = [None] * len(parts) if labels is None else labels.to(images.device).split(size)
    rankings = []
    for part, part_labels in zip(parts, label_parts, strict=True):
        variants = Variants(tower, part, prune_layer, memory)
        costs = partial(removal_costs, score, variants.full(), labels=part_labels, **classes)
        rankings.append(_greedy_search(variants, member, costs, rounds, removed_per_round))
    return GoldenRanking(*(torch.cat(parts) for parts in zip(*rankings, strict=True)))


def default_memory(device: torch.device) -> int:
    """Bytes that variants computed together may take."""
    return 2**24 if device.type == "cpu" else 2**30


def _check_rounds(rounds: int, removed_per_round: int | None, tokens: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds {rounds} must be at least 1")
    if rounds == 1:
        if removed_per_round is not None:
            message = f"removed_per_round {removed_per_round} changes nothing in one round, which ranks all tokens"
            warnings.warn(message, stacklevel=4)
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


def _variants_in(memory: int, tower: ImageTower | AdaptedTower, tokens: int, itemsize: int) -> int:
    """How many variants of K tokens fit into ``memory`` bytes, at least one.

    The widest place of a block holds its input, the norm of it, and one of two: queries, keys, values, the mixed
    values and their projection (7 D in all), or the hidden layer and its projection (3 D and the hidden width).
    """
    return max(1, memory // (tokens * itemsize * max(7 * tower.width, 3 * tower.width + tower.hidden)))


def _greedy_search(
    variants: Variants,
    member: Tensor,
    costs: Callable[[Tensor], Tensor],
    rounds: int,
    removed_per_round: int | None,
) -> GoldenRanking:
    """Rank in rounds over the windows member [W,N]; costs: pruned embeddings [B,W,E] -> [B,W]."""
    batch, tokens = len(variants.x), member.shape[1]
    remaining = member.new_ones(batch, tokens)
    tail = torch.empty(batch, 0, dtype=torch.long, device=member.device)  # removed tokens, the earliest last
    scores = torch.zeros((), device=member.device)
    for round_number in range(1, rounds + 1):
        # 1. Score the remaining tokens by what their windows cost.
        removed = member & remaining[:, None]  # [B,W,N]
        round_scores = token_scores(costs(variants.without(removed, remaining)), removed)
        scores = torch.where(remaining, round_scores, scores)
        # 2. Order them, most important first.
        order = scores.masked_fill(~remaining, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : tokens - tail.shape[1]]
        # 3. Move the least important ones to the tail, before those that earlier rounds removed.
        if round_number < rounds:
            order, lowest = order.tensor_split([order.shape[1] - removed_per_round], dim=1)
            tail = torch.cat([lowest, tail], dim=1)
            gone = member.new_zeros(lowest.shape)  # a tensor, since the counter's tracer cannot record a bool
            remaining = remaining.scatter(1, lowest, gone)
    return GoldenRanking(torch.cat([order, tail], dim=1), scores)


class Variants:
    """Embeddings of images [B,3,S,S] without some of their tokens; what the variants share is computed once.

    x: [B,P+N,D], the tokens that enter block ``layer``, where some are removed; P leading ones, as the class token.
    """

    def __init__(self, tower: ImageTower | AdaptedTower, images: Tensor, layer: int, memory: int) -> None:
        self.tower, self.layer, self.memory = tower, layer, memory
        self.x = tower.run_blocks(tower.embed(images), stop=layer)
        self.is_last = layer == len(tower.transformer.resblocks) - 1
        if not self.is_last:
            self.qkv = _project(tower.transformer.resblocks[layer], self.x)

    def full(self) -> Tensor:
        """z [B,E] of the images with all their tokens."""
        batch, tokens = self.x.shape[:2]
        places = torch.arange(tokens, device=self.x.device).expand(batch, -1)
        return self.embed(torch.arange(batch, device=self.x.device), places)

    def without(self, removed: Tensor, remaining: Tensor) -> Tensor:
        """z [B,W,E] of the remaining patches, bool [B,N], without the removed ones, bool [B,W,N].

        Windows that remove the same tokens are computed once. Windows that remove none are not computed; their z is 0.
        """
        batch, windows = removed.shape[:2]
        # The V variants to compute: the first of equal windows stands for all of them.
        first_equal = _first_equal(removed)
        computed = removed.any(-1) & (first_equal == torch.arange(windows, device=removed.device))  # [B,W]
        image, kept = computed.nonzero()[:, 0], (remaining[:, None] & ~removed)[computed]  # [V], [V,N]
        # Variants of one length run together, as dense batches.
        counts = kept.sum(1)
        z = self.x.new_empty(len(image), self.tower.embed_dim)  # [V,E]
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().squeeze(1)
            patches = kept[rows].nonzero()[:, 1].view(len(rows), count)
            size = _variants_in(self.memory, self.tower, count + self.tower.leading, self.x.element_size())
            for batch_rows, batch_patches in zip(rows.split(size), patches.split(size), strict=True):
                z[batch_rows] = self.embed(image[batch_rows], self._with_leading(batch_patches))
        # Back to [B,W,E], every window with the embedding of its first equal.
        out = z.new_zeros(batch, windows, z.shape[1])
        out[computed] = z
        return out.gather(1, first_equal[..., None].expand_as(out))

    def _with_leading(self, patches: Tensor) -> Tensor:
        """Indices of tokens [V,P+K] from those of patches [V,K]."""
        first = torch.arange(self.tower.leading, device=patches.device).expand(len(patches), -1)
        return torch.cat([first, patches + self.tower.leading], dim=1)

    def embed(self, image: Tensor, tokens: Tensor) -> Tensor:
        """z [V,E] of ``image`` (long [V], rows of x) with only ``tokens`` (long [V,P+K], leading ones first)."""
        flat = (image[:, None] * self.x.shape[1] + tokens).flatten()
        x = self.x.flatten(0, 1).index_select(0, flat).unflatten(0, tokens.shape)
        blocks = self.tower.transformer.resblocks
        where = {}
        if isinstance(self.tower, AdaptedTower) and self.tower.positional:
            where = {"places": tokens[:, self.tower.leading :] - self.tower.leading}
        if not self.is_last:
            qkv = self.qkv.flatten(0, 1).index_select(0, flat).unflatten(0, tokens.shape)
            x = _after_projection(blocks[self.layer], x, qkv, **where)
            x = self.tower.run_blocks(x, self.layer + 1, len(blocks) - 1, **where)
        return self.tower.pool(self._last(blocks[-1], x, **where))

    def _last(self, block: Block | AdaptedBlock, x: Tensor, places: Tensor | None = None) -> Tensor:
        """What pooling reads of x [V,P+K,D] after the last block: its first tokens where that is the class token."""
        if not isinstance(block, AdaptedBlock):
            return class_step(block, x)
        if not self.tower.reads_class:
            return block(x, places=places)
        query, key, value = block.project(x, places)
        return block.feed_forward(block.mix(x[:, :1], query[:, :, :1], key, value, places=places))


def _project(block: Block | AdaptedBlock, x: Tensor) -> Tensor:
    """Queries, keys and values [B,N,3,H,d] of x [B,N,D]."""
    if isinstance(block, AdaptedBlock):
        return torch.stack(block.project(x)).permute(1, 3, 0, 2, 4)
    qkv = block.attn.project(block.ln_1(x))
    return qkv.unflatten(-1, (3, block.attn.heads, -1))


def _after_projection(block: Block | AdaptedBlock, x: Tensor, qkv: Tensor, places: Tensor | None = None) -> Tensor:
    """The rest of a block on x [V,N,D] with its queries, keys and values [V,N,3,H,d]."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if isinstance(block, AdaptedBlock):
        return block.feed_forward(block.mix(x, query, key, value, places=places))
    mixed = fused_attention(query, key, value).transpose(1, 2).flatten(2)
    return block.feed_forward(x + block.attn.out_proj(mixed))


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
    """Multiply-adds of ranking one image, as ``gmacs`` of ``common.flops``; without attention as ``gmacs_paper``.

    Exact for one round. The cost of later rounds depends on the image, since windows may be equal or have lost
    tokens. They count here with windows that each remove a single token, which is an upper bound.
    ValueError: a tower of another library, whose blocks have other parts.
    """
    if not isinstance(tower, ImageTower):
        raise ValueError(f"{type(tower).__name__} has other parts than CLIP's ViT; count its ranking by running it")
    width, layers = tower.width, len(tower.transformer.resblocks)
    perceptron = 2 * width * tower.hidden
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


def _first_equal(sets: Tensor) -> Tensor:
    """sets: bool [B,W,N] -> long [B,W], for each set of an image the first set that is equal to it."""
    members = sets.float()
    shared, sizes = members @ members.transpose(1, 2), members.sum(-1)
    same = (shared == sizes[:, :, None]) & (shared == sizes[:, None])
    return same.int().argmax(-1)


def class_step(block: Block, x: Tensor) -> Tensor:
    """The class token [V,1,D] after ``block`` on x [V,K,D]; the other tokens are only attended to.

    Neither keys (see ``class_logits``) nor values are formed: Σ a (Wx) is computed as W (Σ a x). Each costs K·D·H
    multiply-adds this way, not K·D².
    """
    attention, normed = block.attn, block.ln_1(x)
    width, heads = x.shape[-1], attention.heads
    logits = class_logits(attention, normed)
    weights = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).to(normed.dtype)
    mixed = (weights @ normed).transpose(0, 1)  # [H,V,D]
    values = attention.in_proj_weight[2 * width :].unflatten(0, (heads, -1))
    out = (mixed @ values.transpose(1, 2)).transpose(0, 1).flatten(1) + attention.in_proj_bias[2 * width :]
    return block.feed_forward(x[:, :1] + attention.out_proj(out[:, None]))
