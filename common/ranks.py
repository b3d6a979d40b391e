"""What several processes of a training share: draws, which Lightning seeds alike, and the number of a mean's parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed


def of_this_rank(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This rank's rows of a draw for the batches of all ranks, each of so many ``rows``.

    Every rank draws all of them from the same state, so that no two pictures share a draw, and several ranks draw what
    one would for the joined batch.

    draw: number of rows -> that many, of one size and kind on every rank.
    """
    if not _several():
        return draw(rows)
    first = distributed.get_rank() * rows
    return draw(distributed.get_world_size() * rows)[first : first + rows]


def mean_over_ranks(total: Tensor, count: int) -> Tensor:
    """This rank's share of a mean over the parts of all ranks, which may have different numbers of them.

    DDP averages gradients over ranks; with this share they are those of the mean over all parts. 0 where there is none.

    total: scalar, the sum of this rank's ``count`` parts. Every rank calls this as often as the others.
    """
    if not _several():
        return total / max(count, 1)
    counts = total.new_tensor(count, dtype=torch.float64 if total.dtype == torch.float64 else torch.float32)
    distributed.all_reduce(counts)
    return total * distributed.get_world_size() / counts.clamp(min=1)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
