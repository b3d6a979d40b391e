"""Token losses between a picture and its caption: one-to-many, one-to-one, and FILIP's over all pairs.

Shapes: B pairs on this rank, G pairs on all ranks, N or K image tokens, T text tokens (padding included), E joint
dim, R = real text tokens of the whole batch.

Tokens come as the towers give them; cosines are taken here, in fp32 whatever the precision around. One-to-many and
one-to-one reward what fits within a pair and know no negatives: alone they are least when all tokens are one
vector, and only the instance losses beside them rule that out.
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

from common.contrastive import contrast, gather_rows

POOL_CELLS = 1_000_000
"""Similarities of a batch above which the assignments are spread over threads (scipy lets go of the interpreter)."""
CHUNK_CELLS = 2**26
"""Most similarities that the loss over all pairs holds at a time (256 MiB)."""


def caption_mask(ids: Tensor) -> Tensor:
    """Which tokens of ids [B,T] take part in token alignment -> boolean [B,T].

    All words and end-of-text, which sums the caption up. Not the padding, and not start-of-text: under the causal
    mask that token is one and the same vector in every caption, so aligning with it would pull all pictures to one
    point. (The paper says "non-padded" and no more.)
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    return (place > 0) & (place <= ids.argmax(1, keepdim=True))


def one_to_many(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """The loose alignment of eq. 13 to 15 -> scalar in [-1, 1].

    image_tokens: [B,N,E].  text_tokens: [B,T,E].  text_mask: boolean [B,T], at least one token in each row.

    Every image token takes its most similar text token, every text token its most similar image token; the loss is
    minus the mean of both directions' mean cosines. The index s_r that the paper defines with max is its argmax.
    """
    cosines = _cosines(text_tokens, image_tokens)
    of_image = cosines.masked_fill(~text_mask[..., None], -torch.inf).amax(1).mean(1)
    of_text = _masked_mean(cosines.amax(2), text_mask)
    return -0.5 * (of_image.mean() + of_text.mean())


def one_to_one(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
    """The strict alignment of eq. 16 and 17 -> scalar in [-1, 1].

    image_tokens: [B,K,E].  text_tokens: [B,T,E].  text_mask: boolean [B,T], at least one token in each row.

    The tokens of a pair are matched so that the sum of cosines is greatest and none is used twice; the loss is minus
    the mean cosine of the min(real text tokens, K) matches. Which tokens match is a constant to the gradient, which
    flows through the matched cosines alone. ValueError: a cosine is not finite; the sample is named.

    The paper pads to a square with zeros; padding stands on one side only, so every token of the shorter side has a
    real partner and the rectangular assignment is the same. Its "s >= l2 or t >= l3" would zero the last real token
    too (a strict > is meant), and its Algorithm 1 is garbled; the solver here is scipy's.
    """
    known = text_mask.cpu()  # places and lengths in one transfer: on a GPU either would be one of its own
    lengths = known.sum(1)
    owner, place = (index.to(text_mask.device) for index in known.nonzero(as_tuple=True))
    cosines = _cosines(text_tokens, image_tokens)[owner, place]
    partner, lengths = match(cosines, lengths.tolist()).to(cosines.device), lengths.to(cosines.device)
    matched = cosines.gather(1, partner.clamp(min=0)[:, None])[:, 0]
    share = (partner >= 0).to(cosines.dtype) / lengths.clamp(max=cosines.shape[1])[owner]
    return -(matched * share).sum() / len(lengths)


def match(cosines: Tensor, lengths: Sequence[int]) -> Tensor:
    """The assignment of each caption's tokens to its picture's with the greatest sum of cosines -> long [R], on CPU.

    cosines: [R,K], the real text tokens of all captions one after the other.  lengths: how many each caption has.
    The result is each text token's image token, -1 for tokens left over by a caption of more than K.
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
        with ThreadPoolExecutor(threads) as pool:  # a pool that outlives a call would hang a forked process
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
    gather: bool = True,
) -> Tensor:
    """FILIP's contrastive late interaction (Yao et al., 2021) -> scalar: InfoNCE over one-to-many similarities.

    Tokens and mask as above; logit_scale (the multiplier), same, label_smoothing and gather as for ``info_nce``.

    A picture's similarity with any caption is the mean over its tokens of the best cosine there, a caption's with
    any picture likewise. All B x G pairs are compared, ``CHUNK_CELLS`` cosines at a time.
    """
    image, text = _unit(image_tokens), _unit(text_tokens)
    everywhere = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    images, texts = (image, everywhere), (text, text_mask)
    all_images, all_texts = images, texts
    if gather:
        all_images = tuple(gather_rows(part) for part in images)
        all_texts = tuple(gather_rows(part) for part in _as_wide_as_any_rank(*texts))
    with torch.autocast(image.device.type, enabled=False):
        of_image = logit_scale * _mean_best(*images, *all_texts)
        of_text = logit_scale * _mean_best(*texts, *all_images)
    return contrast(of_image, of_text, same=same, label_smoothing=label_smoothing)


def _mean_best(rows: Tensor, row_mask: Tensor, columns: Tensor, column_mask: Tensor) -> Tensor:
    """The mean over the tokens of each of rows [B,R,E] of their best cosines with each of columns [G,C,E] -> [B,G]."""
    flat = columns.flatten(0, 1).T

    def part(rows: Tensor, row_mask: Tensor) -> Tensor:
        cosines = (rows @ flat).unflatten(2, column_mask.shape)
        best = cosines.masked_fill(~column_mask, -torch.inf).amax(3)
        return _masked_mean(best, row_mask[..., None])

    at_once = max(1, CHUNK_CELLS // (rows.shape[1] * flat.shape[1]))
    if at_once >= len(rows):
        return part(rows, row_mask)
    chunks = zip(rows.split(at_once), row_mask.split(at_once), strict=True)
    return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks])


def _as_wide_as_any_rank(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B,T,E] and mask [B,T], padded to the longest T of all ranks: a batch is as wide as its own captions."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tokens, mask
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    missing = int(longest) - tokens.shape[1]
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


def _cosines(text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """text_tokens [B,T,E], image_tokens [B,N,E] -> cosines [B,T,N], at least in fp32."""
    with torch.autocast(text_tokens.device.type, enabled=False):
        return _unit(text_tokens) @ _unit(image_tokens).transpose(1, 2)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over dimension 1 of values [B,T,...] where mask, broadcastable to them, is set."""
    return (values * mask).sum(1) / mask.sum(1)
