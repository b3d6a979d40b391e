"""One model of an exported folder, without torch: its pictures, its class embeddings, its probabilities.

Shapes: B pictures, S pixels, C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from common.article import filled
from common.data.prepared import resized
from common.deploy.words import Words

_TEXTS = 256  # prompts in a batch


class Member:
    """A model that answers at one level or more of a folder; a cascade has two.

    folder: the export.  about: the entries of export.json about this model.  named: how many classes they name.
    session: opens a graph of the folder.
    ValueError: damaged class embeddings, or of another shape than export.json says.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], named: int, session: Callable[[str], onnxruntime.InferenceSession]
    ) -> None:
        self.folder, self.about, self._session = folder, about, session
        file = folder / about.get("classes", "classes.npy")
        self.classes = _classes(file, (named, about["embed_dim"])) if named else None
        """The class embeddings [C,E]; None: the folder names no classes."""

    @property
    def view(self) -> tuple[int, str, str, int]:
        """How a picture is resized: size, interpolation, resize_mode and fill_color of ``resized``."""
        how = self.about["preprocess"]
        return how["size"], how["interpolation"], how["resize_mode"], how["fill_color"]

    def normalised(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [S,S,3] each -> float32 [B,3,S,S], normalised by mean and deviation."""
        how, pixels = self.about["preprocess"], np.stack(pictures).transpose(0, 3, 1, 2)
        mean, std = (np.asarray(how[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        return (pixels.astype(np.float32, order="C") / np.float32(255) - mean) / std

    def probabilities(self, z: np.ndarray) -> np.ndarray:
        """Unit embeddings [B,E] -> class probabilities [B,C], the softmax of the scaled cosines; no classes: [B,0]."""
        if self.classes is None:
            return z[:, :0]
        logits = np.float32(self.about["logit_scale"]) * (z @ self.classes.T)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def embedded(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """The unit embeddings [C,E] of other classes. ValueError: no text tower, or a word that it does not know."""
        prompts = [filled(template, name) for name in names for template in templates]
        try:
            return _unit(self._texts(prompts).reshape(len(names), len(templates), -1).mean(1))
        except ValueError as error:  # of a cascade's two vocabularies, say whose
            raise ValueError(f"{self.about['model']}: {error}") from error

    def _texts(self, texts: Sequence[str]) -> np.ndarray:
        """The unit embeddings [B,E] of texts."""
        rows = [self._words.ids(text) for text in texts]
        session, parts = self._session(self.about["text"]["file"]), []
        for start in range(0, len(rows), _TEXTS):
            some = rows[start : start + _TEXTS]
            ids = np.zeros((len(some), self.about["text"]["tokens"] or max(map(len, some))), np.int64)
            for row, values in zip(ids, some, strict=True):
                row[: len(values)] = values
            parts += session.run(None, {session.get_inputs()[0].name: ids})
        return _unit(np.concatenate(parts))

    @cached_property
    def _words(self) -> Words:
        if self.about["text"] is None:
            raise ValueError(
                f"{self.folder} has no text tower, which other classes need; export it anew, without --no-text"
            )
        return Words(self.folder / self.about["text"]["tokenizer"], **self.about["text"]["words"])


def views_of(image: Image.Image, members: Sequence[Member]) -> list[np.ndarray]:
    """A picture as each model sees it, before normalisation: uint8 [S,S,3] each, one array where two see the same."""
    made = {view: resized(image, *view) for view in {member.view for member in members}}
    return [made[member.view] for member in members]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _classes(file: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        classes = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read ({error}); export it anew") from error
    if classes.shape != shape:
        raise ValueError(f"{file} holds {classes.shape}, and export.json names {shape}; export it anew")
    return classes
