"""CLIP's byte-pair tokenizer, optionally with a vocabulary cut to the ids that a small data set uses.

Shapes: B texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.byte_pairs import cleaned, decode, encode

__all__ = ["Tokenizer", "encode", "is_empty"]


def is_empty(text: str) -> bool:
    """Whether CLIP's cleaning (entities, control characters) leaves nothing of a text that can be seen."""
    if text.isprintable() and "&" not in text:
        return not text.strip()
    return not any(letter.isprintable() and not letter.isspace() for letter in cleaned(text))


class Tokenizer:
    """Text -> ids, with open_clip's byte-pair encoding.

    vocabulary: the ids to keep of the full vocabulary, ascending; None keeps all 49,408. A kept id becomes its index
        in the list, so end-of-text stays the highest id, by which the text tower finds it.
    """

    def __init__(self, context_length: int = 77, vocabulary: Sequence[int] | None = None) -> None:
        if vocabulary is not None and list(vocabulary) != sorted(set(vocabulary)):
            raise ValueError("a vocabulary must list its ids once each, in ascending order")
        self.context_length = context_length
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self._new_id = None if vocabulary is None else {old: new for new, old in enumerate(vocabulary)}

    def ids(self, text: str, truncate: bool = False) -> list[int]:
        """The unpadded ids of a text. ValueError: it is empty, too long (unless ``truncate``), or has unknown words."""
        if is_empty(text):
            raise ValueError("an empty text has nothing to tokenise; give it words or leave the sample out")
        ids = encode(text)
        if len(ids) > self.context_length:
            if not truncate:
                raise ValueError(
                    f"{len(ids)} tokens do not fit context_length {self.context_length}: {text!r}; shorten the text"
                )
            ids = ids[: self.context_length - 1] + ids[-1:]
        if self._new_id is None:
            return ids
        missing = [decode(i).strip() for i in ids if i not in self._new_id]
        if missing:
            raise ValueError(
                f"{missing} in {text!r} is not in this model's vocabulary of {len(self._new_id)} ids; use words "
                "that it was trained with, or a model with the whole vocabulary"
            )
        return [self._new_id[i] for i in ids]

    def __call__(self, texts: Sequence[str], truncate: bool = False, longest: bool = False) -> Tensor:
        """texts -> ids, long [B,T], zero after end-of-text.

        truncate: cut long texts before end-of-text, as CLIP's pretraining does; otherwise they are a ValueError.
        longest: T is the length of the longest row; otherwise T is context_length.
        """
        rows = [self.ids(text, truncate) for text in texts]
        length = max(map(len, rows), default=0) if longest else self.context_length
        out = torch.zeros(len(rows), length, dtype=torch.long)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return out
