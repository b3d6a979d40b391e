"""Token losses between an image and its caption (MLIP, section 3.3): one-to-many, one-to-one, and FILIP's.

Shapes: B pairs on this rank, G pairs on all ranks, N, K or R image tokens, T text tokens (padding included), E joint
dim, R = real text tokens of the whole batch (in one-to-one), K = tokens that may be chosen (in late interaction).

The tokens need not be normalised. Cosines are taken here, at least in fp32 whatever the precision around.
One-to-many and one-to-one reward agreement within a pair and have no negatives: on their own they are least when all
tokens are the same vector. Only the instance losses beside them prevent that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

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
    # Not amax: it looks for ties to share the gradient among them, which takes about twice as long.
    image_to_text = cosines.masked_fill(~text_mask[..., None], -torch.inf).max(1).values.mean(1)
    text_to_image = _masked_mean(cosines.max(2).values, text_mask)
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
    ``CHUNK_CELLS`` cosines at a time. Without keys each cosine is computed once for both similarities.
    """
    image, text, mask = _unit(image_tokens), _unit(text_tokens), text_mask
    if gather:
        text, mask = _as_wide_as_any_rank(text, mask)
    chosen = None if keys is None else key_tokens(image, text, mask, keys)
    texts, masks = text, mask
    if gather:
        texts, masks = gather_rows(text), gather_rows(mask)
        chosen = chosen and chosen._replace(text=gather_rows(chosen.text), text_mask=gather_rows(chosen.text_mask))
    with torch.autocast(image.device.type, enabled=False):
        to_texts, from_texts = late_similarities(image, texts, masks, chosen)  # [B,G] each: this rank's images
        if texts is not text:  # the captions' similarities with the other ranks' images are on those ranks
            from_texts = gather_rows(from_texts)[:, places_among_ranks(text)]
        logits = logit_scale * to_texts, logit_scale * from_texts.T
    return contrast(*logits, same=same, label_smoothing=label_smoothing)


class KeyTokens(NamedTuple):
    """The tokens that may be chosen: image [B,K,E], text [G,K,E], and which of the latter are words, boolean [G,K]."""

    image: Tensor
    text: Tensor
    text_mask: Tensor


def key_tokens(image: Tensor, text: Tensor, text_mask: Tensor, keys: int) -> KeyTokens:
    """The tokens that may be chosen, as Cui et al. (2022) train FILIP, of B images and their captions (G = B).

    image: [B,R,E], text: [B,T,E], of length 1.  text_mask: boolean [B,T].

    They are the ``keys`` tokens of an image, and of a caption, whose cosines with all tokens of their own partner
    have the greatest sum (16 there). The other tokens choose, but are not chosen. Padding is left out here.
    """
    cosines = _cosines(text, image).detach().masked_fill(~text_mask[..., None], 0.0)
    of_image, of_text = cosines.sum(1), cosines.sum(2).masked_fill(~text_mask, -torch.inf)
    patches, words = (sums.topk(min(keys, sums.shape[1]), dim=1).indices for sums in (of_image, of_text))
    image, text = (tokens.take_along_dim(places[..., None], 1) for tokens, places in ((image, patches), (text, words)))
    return KeyTokens(image, text, text_mask.gather(1, words))


def late_similarities(
    image: Tensor, text: Tensor, text_mask: Tensor, keys: KeyTokens | None = None
) -> tuple[Tensor, Tensor]:
    """FILIP's similarities of images [B,R,E] with texts [G,T,E], of length 1 -> from the images, from the texts [B,G].

    text_mask: boolean [G,T], the real tokens.  keys: those that may be chosen; None: all.
    """
    patches, words, words_mask = keys or (image, text, text_mask)

    def similarities(image: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        to_words = _all_cosines(image, words)  # [B,R,G,K]
        to_patches = to_words if keys is None else _all_cosines(patches, text)  # [B,K,G,T]
        best_patches = to_patches.max(1).values  # [B,G,T]
        return _best_words(to_words, words_mask), (best_patches * text_mask).sum(2) / text_mask.sum(1)

    cells = image.shape[1] * words_mask.numel() + (0 if keys is None else patches.shape[1] * text_mask.numel())
    parts = _in_chunks(similarities, cells, image, patches)
    return tuple(torch.cat(side) for side in zip(*parts, strict=True))


def similarities_from_images(image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The first of ``late_similarities``'s alone, [B,G]: what classification asks for."""

    def similarities(image: Tensor) -> Tensor:
        return _best_words(_all_cosines(image, text), text_mask)

    return torch.cat(_in_chunks(similarities, image.shape[1] * text_mask.numel(), image))


def _all_cosines(image: Tensor, text: Tensor) -> Tensor:
    """Unit tokens [B,R,E] and [G,T,E] -> the cosines of all [B,R,G,T]."""
    return (image @ text.flatten(0, 1).T).unflatten(2, text.shape[:2])


def _best_words(cosines: Tensor, mask: Tensor) -> Tensor:
    """cosines [B,R,G,T] -> [B,G]: the mean over the R tokens of each one's best among the words of mask [G,T]."""
    return cosines.masked_fill(~mask, -torch.inf).max(3).values.mean(1)


def _in_chunks(function: Callable[..., Any], cells: int, *rows: Tensor) -> list[Any]:
    """What ``function`` gives of parts of rows [B,...], of so many ``cells`` each; larger than a chunk, parts are
    computed again for the gradient instead of held.
    """
    size = max(1, CHUNK_CELLS // cells)
    if size >= len(rows[0]):
        return [function(*rows)]
    parts = zip(*(part.split(size) for part in rows), strict=True)
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def _as_wide_as_any_rank(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B,T,E] and mask [B,T], padded to the longest T of all ranks, since each rank has its own T."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
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
