"""A contrastive batch larger than memory: its parts pass through the towers one after another, twice.

A contrastive loss needs the embeddings of all pairs at once, but not the activations that led to them. The first pass
makes the embeddings of every part and forgets the activations. The loss is that of the whole batch. The backward pass
then takes the parts one by one: it makes a part's activations again and continues with the loss's gradient of the
part's embeddings. The gradient is that of one large batch, at the cost of one more forward pass; the idea is
GradCache's (Gao et al., 2021) and that of open_clip's ``accum-freq``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_parts(embed: Callable[..., Sequence[Tensor | None]], parts: int, *inputs: Tensor) -> Sequence[Tensor | None]:
    """``embed(*inputs)`` with the activations of one part of the batch in memory at a time.

    embed: computes each row of its results [B,...] from the same row of its inputs alone; a result may be None. Our
        towers have no dropout; were there some, both passes would draw the same numbers.
    parts: number of parts, as equal as possible. 1: ``embed`` is called once and keeps its activations.
    inputs: tensors of B rows each.
    ValueError: more parts than rows.
    """
    if parts == 1:
        return embed(*inputs)
    rows = len(inputs[0])
    if parts > rows:
        raise ValueError(f"parts {parts} of a batch of {rows} pairs would be empty; set parts to {rows} at most")
    pieces = zip(*(tensor.tensor_split(parts) for tensor in inputs), strict=True)
    results = [checkpoint(embed, *piece, use_reentrant=False) for piece in pieces]
    return [None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True)]
