"""Token losses between an image and its caption (MLIP, section 3.3): one-to-many, one-to-one, and FILIP's.

Shapes: B pairs on this rank, G pairs on all ranks, N or K image tokens, T text tokens (padding included), E joint
dim, R = real text tokens of the whole batch.

The tokens need not be normalised. Cosines are taken here, at least in fp32 whatever the precision around.
One-to-many and one-to-one reward agreement within a pair and have no negatives: on their own they are least when all
tokens are the same vector. Only the instance losses beside them prevent that.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, distributed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.contrastive import contrast, gather_rows, places_among_ranks

POOL_CELLS = 1_000_000
"""Cosines of a batch above which several threads solve the assignments (scipy releases the interpreter lock)."""
CHUNK_CELLS = 2**26
"""Most cosines that FILIP's loss holds at a time (256 MiB)."""


def caption_mask(ids: Tensor) -> Tensor:
    """Which tokens of ids [B,T] take part in token alignment -> boolean [B,T].

    All words and end-of-text, which sums the caption up. Not the padding, and not start-of-text: under the causal
    mask that token is one and the same vector in every caption, so aligning with it would pull all pictures to one
    point. (The paper says "non-padded" and no more.)
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    return (place > 0) & (place <= ids.argmax(1, keepdim=True))


def one_to_many(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """The loose alignment of equations 13 to 15 -> scalar in [-1, 1].

    image_tokens: [B,N,E].  text_tokens: [B,T,E].  text_mask: boolean [B,T], at least one token in each row.

    Every image token takes its most similar text token (equation 13), every text token its most similar image
    token. A direction's alignment is the mean of these cosines (14); the loss is minus the mean of both directions
    (15). The paper defines the index s_r by max; argmax is meant.
    """
    cosines = _cosines(text_tokens, image_tokens)  # [B,T,N]
    image_to_text = cosines.masked_fill(~text_mask[..., None], -torch.inf).amax(1).mean(1)
    text_to_image = _masked_mean(cosines.amax(2), text_mask)
    return -0.5 * (image_to_text.mean() + text_to_image.mean())


def one_to_one(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """The strict alignment of equations 16 and 17 -> scalar in [-1, 1].

    image_tokens: [B,K,E].  text_tokens: [B,T,E].  text_mask: boolean [B,T], at least one token in each row.

    The tokens of a pair are matched one to one so that the sum of their cosines is greatest. The loss is minus the
    mean cosine of the min(real text tokens, K) matches. The matching is not differentiated; gradients flow only
    through the matched cosines. ValueError: a cosine is not finite; the sample is named. Of several ranks none raises
    alone, for which the others would wait: the loss is then not finite, which stops all of them at the same step.

    The paper pads the cosines to a square with zeros. Padding stands on one side only, so every token of the shorter
    side has a real partner, and the rectangular assignment gives the same matches. Its "s >= l2 or t >= l3" would
    zero the last real token too (a strict > is meant), and its Algorithm 1 is garbled; the solver here is scipy's.
    """
    # The real text tokens of the whole batch as rows [R]; the mask moves to the CPU once, not for each result.
    mask = text_mask.cpu()
    lengths = mask.sum(1)
    sample, place = (index.to(text_mask.device) for index in mask.nonzero(as_tuple=True))
    cosines = _cosines(text_tokens, image_tokens)[sample, place]  # [R,K]
    # Match within each pair, then read the matched cosines; unmatched tokens have partner -1.
    try:
        partner, lengths = assign_tokens(cosines, lengths.tolist()).to(cosines.device), lengths.to(cosines.device)
    except ValueError:
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            raise
        return cosines.sum() * torch.nan
    matched = cosines.gather(1, partner.clamp(min=0)[:, None])[:, 0]
    # Mean over the matches of a pair, then over the pairs.
    weight = (partner >= 0).to(cosines.dtype) / lengths.clamp(max=cosines.shape[1])[sample]
    return -(matched * weight).sum() / len(lengths)


def assign_tokens(cosines: Tensor, lengths: Sequence[int]) -> Tensor:
    """The one-to-one assignment within each pair that has the greatest sum of cosines -> long [R], on the CPU.

    cosines: [R,K], the real text tokens of all captions one after another.  lengths: how many each caption has.
    The result is each text token's image token. It is -1 for the tokens that a caption of more than K leaves over.
    ValueError: a cosine is not finite; the sample is named.
    """
    cost = cosines.detach().neg().cpu().double().numpy()
    ends = np.cumsum(lengths)
    partner = np.full(len(cost), -1)

    def solve(samples: range) -> None:
        for sample in samples:
            start = ends[sample] - lengths[sample]
            try:
                rows, columns = linear_sum_assignment(cost[start : ends[sample]])
            except ValueError as error:
                raise ValueError(
                    f"the token similarities of sample {sample} of the batch are not finite; lower the learning rate "
                    "or use a wider precision"
                ) from error
            partner[start + rows] = columns

    threads = torch.get_num_threads() if cost.size > POOL_CELLS else 1
    if threads == 1:
        solve(range(len(lengths)))
    else:
        with ThreadPoolExecutor(threads) as pool:  # closed with the call: a living pool would hang a forked process
            list(pool.map(solve, (range(first, len(lengths), threads) for first in range(threads))))
    return torch.from_numpy(partner)


def late_interaction(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    logit_scale: Tensor,
    *,
    same: Tensor | None = None,
    label_smoothing: float = 0.0,
    keys: int | None = None,
    gather: bool = True,
) -> Tensor:
    """FILIP's contrastive late interaction (Yao et al., 2021) -> scalar: InfoNCE over one-to-many similarities.

    Tokens and mask as above; logit_scale (the multiplier), same, label_smoothing and gather as for ``info_nce``.
    keys: how many tokens of the other side a token may choose from, see ``key_tokens``; None: all of them.

    The similarity of an image with a caption is the mean, over the image's tokens, of each token's best cosine in
    the caption; that of a caption with an image is the mean over the caption's tokens. All B x G pairs are compared,
    ``CHUNK_CELLS`` cosines at a time, and each cosine is computed once for both similarities.
    """
    image, text = _unit(image_tokens), _unit(text_tokens)
    image_keys, text_keys = (None, text_mask) if keys is None else key_tokens(image, text, text_mask, keys)
    texts: tuple[Tensor, ...] = (text, text_mask, text_keys)
    if gather:
        texts = tuple(gather_rows(part) for part in _as_wide_as_any_rank(*texts))
    with torch.autocast(image.device.type, enabled=False):
        to_texts, from_texts = late_similarities(image, *texts, image_keys)  # [B,G] each: this rank's images
        if texts[0] is not text:  # the captions' similarities with the other ranks' images are on those ranks
            from_texts = gather_rows(from_texts)[:, places_among_ranks(text)]
        logits = logit_scale * to_texts, logit_scale * from_texts.T
    return contrast(*logits, same=same, label_smoothing=label_smoothing)


def key_tokens(image: Tensor, text: Tensor, text_mask: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The tokens that may be chosen, as Cui et al. (2022) train FILIP -> boolean [B,R] and [B,T].

    image: [B,R,E], text: [B,T,E], of length 1.  text_mask: boolean [B,T].

    They are the ``keys`` tokens of an image, and of a caption, whose cosines with all tokens of their own partner
    have the greatest sum (16 there). The other tokens choose, but are not chosen. Padding is left out here.
    """
    cosines = _cosines(text, image).detach().masked_fill(~text_mask[..., None], 0.0)
    of_image, of_text = cosines.sum(1), cosines.sum(2).masked_fill(~text_mask, -torch.inf)

    def top(sums: Tensor) -> Tensor:
        chosen = torch.zeros_like(sums, dtype=torch.bool)
        return chosen.scatter(1, sums.topk(min(keys, sums.shape[1]), dim=1).indices, True)

    return top(of_image), top(of_text) & text_mask


def late_similarities(
    image: Tensor, text: Tensor, text_mask: Tensor, text_keys: Tensor | None = None, image_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FILIP's similarities of images [B,R,E] with texts [G,T,E], of length 1 -> from the images, from the texts [B,G].

    text_mask: boolean [G,T], the real tokens.  text_keys [G,T], image_keys [B,R]: those that may be chosen.
    """
    flat = text.flatten(0, 1).T  # [E,GT]
    text_keys = text_mask if text_keys is None else text_keys

    def similarities(image: Tensor, image_keys: Tensor | None) -> tuple[Tensor, Tensor]:
        cosines = (image @ flat).unflatten(2, text_mask.shape)  # [B,R,G,T]
        best_words = cosines.masked_fill(~text_keys, -torch.inf).amax(3)  # [B,R,G]
        if image_keys is not None:
            cosines = cosines.masked_fill(~image_keys[:, :, None, None], -torch.inf)
        best_patches = cosines.amax(1)  # [B,G,T]
        return best_words.mean(1), (best_patches * text_mask).sum(2) / text_mask.sum(1)

    chunk_size = max(1, CHUNK_CELLS // (image.shape[1] * flat.shape[1]))
    if chunk_size >= len(image):
        return similarities(image, image_keys)
    parts = image.split(chunk_size)
    masks = [None] * len(parts) if image_keys is None else image_keys.split(chunk_size)
    chunks = [
        checkpoint(similarities, part, mask, use_reentrant=False) for part, mask in zip(parts, masks, strict=True)
    ]
    return tuple(torch.cat(side) for side in zip(*chunks, strict=True))


def _as_wide_as_any_rank(tokens: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
    """tokens [B,T,E] and masks [B,T], padded to the longest T of all ranks, since each rank has its own T."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tokens, *masks
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    missing = int(longest) - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, missing)), *(F.pad(mask, (0, missing)) for mask in masks)


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


def _cosines(text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """text_tokens [B,T,E], image_tokens [B,N,E] -> cosines [B,T,N], at least in fp32."""
    with torch.autocast(text_tokens.device.type, enabled=False):
        return _unit(text_tokens) @ _unit(image_tokens).transpose(1, 2)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over dimension 1 of values [B,T,...] where mask, broadcastable to them, is set."""
    return (values * mask).sum(1) / mask.sum(1)
