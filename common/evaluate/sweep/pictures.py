"""The pictures of a sweep, read once for all of its points, and the answers to them.

Shapes: B images of a batch, M images in all, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.lookup import Captioned, Labelled, version_within
from common.evaluate.tasks import Settings, pictures_of
from common.models import Model

HELD = 2**31
"""Pictures of up to so many bytes stay in memory from their first reading on."""


class Pictures:
    """The batches of a split for one model. Small splits are read once, larger ones at every pass."""

    def __init__(self, model: Model, data: Labelled | Captioned, settings: Settings, held: int = HELD) -> None:
        self.data, self.version = data, version_within(data, settings.limit)
        self._read = partial(pictures_of, model, data, settings)
        self._limit, self._held = held, list[Mapping[str, Any]]()
        self._first: Tensor | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self._held:
            yield from self._held
            return
        held: list[Mapping[str, Any]] = []
        size = 0
        for batch in self._read():
            size += batch["image"].nbytes
            held.append(batch)
            if size > self._limit:
                held.clear()
            yield batch
        if size <= self._limit:
            self._held = held

    def first(self, count: int) -> Tensor:
        """The first pictures [count,3,S,S]. ValueError: there are fewer."""
        if self._first is None:
            images: list[Tensor] = []
            for batch in self:
                images.append(batch["image"])
                if sum(map(len, images)) >= count:
                    break
            if not images:
                raise ValueError(f"the {self.data.split} split has no picture; check the data")
            self._first = torch.cat(images)
        if len(self._first) < count:
            raise ValueError(
                f"{len(self._first)} pictures of {self.data.split} make no batch of {count}, at which speed is to be "
                f"measured; give --timed {len(self._first)}, or no"
            )
        return self._first[:count]


def packed(correct: Tensor) -> str:
    """bool [M] as hexadecimal digits, eight images in two of them, the first in the highest bit."""
    return np.packbits(correct.numpy()).tobytes().hex()


def unpacked(digits: str, samples: int) -> Tensor:
    """bool [M] that ``packed`` gave."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=samples)
    return torch.from_numpy(bits.astype(bool))
