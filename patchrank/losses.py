"""Learning to rank patch tokens (Phase II): three losses, and two measures of agreement with a golden order.

Shapes: B images, N patch tokens.

Scores [B,N] are high = keep. An order, long [B,N], lists the tokens, most important first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["keep_set", "margin", "listwise"]
"""Divergence from the golden keep set, hinge over ordered pairs, likelihood of the golden order."""


def ranking_loss(kind: Loss, scores: Tensor, order: Tensor, pruned: int) -> Tensor:
    """The loss of scores [B,N] against a golden order [B,N], the mean over the images, in fp32 at least.

    pruned: how many tokens will be dropped; only "keep_set" uses it.
    """
    ranked = scores.to(torch.promote_types(scores.dtype, torch.float32)).gather(1, order)
    if kind == "keep_set":
        return keep_set_loss(ranked, pruned)
    return margin_loss(ranked) if kind == "margin" else listwise_loss(ranked)


def keep_set_loss(ranked: Tensor, pruned: int) -> Tensor:
    """KL(target || softmax(ranked)) of scores [B,N] in golden order, with the released code's target.

    The target is the softmax of 0 for the ranks that stay and of -5 - rank/10 for the last ``pruned`` ranks (always
    50 in the code). Nearly all of its mass lies evenly on the tokens that stay, so the loss learns a set, without an
    order within it.
    """
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    stays = rank < ranked.shape[1] - pruned
    target = torch.where(stays, 0.0, -5 - 0.1 * rank).to(ranked.dtype).log_softmax(0)
    return F.kl_div(ranked.log_softmax(-1), target.expand_as(ranked), log_target=True, reduction="batchmean")


def margin_loss(ranked: Tensor, margin: float = 1.0) -> Tensor:
    """Mean hinge over all pairs of scores [B,N] in golden order: the upper one should lead by ``margin``.

    The released code samples pairs; all N(N-1)/2 pairs cost less than the sampling.
    """
    upper, lower = torch.triu_indices(ranked.shape[1], ranked.shape[1], 1, device=ranked.device)
    return (margin - ranked[:, upper] + ranked[:, lower]).relu().mean()


def listwise_loss(ranked: Tensor) -> Tensor:
    """-log P(golden order) of scores [B,N] in that order under Plackett and Luce's model (ListMLE).

    The model draws one token after another, each by the softmax over the tokens that are left.
    """
    left = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - ranked).sum(-1).mean()


def pruned_overlap(scores: Tensor, order: Tensor, pruned: int) -> Tensor:
    """Share [B] of the ``pruned`` tokens with the lowest scores [B,N] that are also the golden order's last ones.

    ValueError: nothing is pruned.
    """
    if pruned < 1:
        raise ValueError(f"pruned {pruned}: the overlap of empty sets says nothing; prune one token at least")
    lowest = scores.argsort(dim=-1, descending=True, stable=True)[:, -pruned:]
    golden = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, -pruned:], True)
    return golden.gather(1, lowest).float().mean(-1)


def kendall_tau(scores: Tensor, order: Tensor) -> Tensor:
    """Kendall's τ-b [B] between scores [B,N] and a golden order [B,N]: 1 if equal, -1 if reversed.

    It is 0 if all scores are equal.
    """
    ranked = scores.gather(1, order).float()
    upper, lower = torch.triu_indices(ranked.shape[1], ranked.shape[1], 1, device=ranked.device)
    agree = (ranked[:, upper] - ranked[:, lower]).sign()  # the golden order itself has no ties
    told_apart = agree.abs().sum(-1)
    return agree.sum(-1) / (told_apart * agree.shape[-1]).sqrt().clamp(min=1)
