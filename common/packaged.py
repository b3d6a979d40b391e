"""Models that an installed package brings along, ready without a download, by the entry points ``effclip.packaged``.

No torch here: a command can name its default model before it imports anything heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "effclip.packaged"
"""The entry-point group; each entry is a function without arguments that returns a ``PackagedModel``."""


@dataclass(frozen=True)
class PackagedModel:
    """A model in the files of an installed package.

    weights: the image tower, a file of this suite.  texts: the file of the CLIP whose text tower it is read with.
    class_names, templates: used where a call names none.  about: one line on what the model can do.
    """

    weights: Path
    texts: Path
    class_names: Sequence[str]
    templates: Sequence[str]
    about: str


def default_model() -> PackagedModel:
    """The first packaged model by name. ValueError: no package brings one."""
    first = next(packaged_models(), None)
    if first is None:
        raise ValueError(
            f"no installed package brings a model (entry points {GROUP}), so none is the default; name one with "
            "--model, or install this suite again (`effclip doctor` says how)"
        )
    return first


def packaged_model(weights: str | Path) -> PackagedModel | None:
    """The packaged model whose weights file this is; None where it is another file."""
    path = Path(weights).resolve()
    return next((model for model in packaged_models() if model.weights.resolve() == path), None)


def packaged_models() -> Iterator[PackagedModel]:
    """All of them, by name."""
    return (point.load()() for point in sorted(entry_points(group=GROUP), key=lambda point: point.name))
