"""Draws of a training of several processes, which Lightning seeds alike."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, distributed


def of_this_rank(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This rank's rows of a draw for the batches of all ranks, each of so many ``rows``.

    Every rank draws all of them from the same state, so that no two pictures share a draw, and several ranks draw what
    one would for the joined batch.

    draw: number of rows -> that many, of one size and kind on every rank.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return draw(rows)
    first = distributed.get_rank() * rows
    return draw(distributed.get_world_size() * rows)[first : first + rows]
