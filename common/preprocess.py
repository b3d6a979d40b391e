"""How a model's pictures are prepared: its size, its resizing and its normalisation, as it was trained.

``common.data.transforms`` implements it. An architecture in open_clip's format holds it as ``preprocess_cfg`` where it
differs from OpenAI's, without the size, which is the image tower's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Channel means of OpenAI's CLIP, for pixel values in [0, 1]."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel standard deviations, to go with MEAN."""

_CHOICES = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "longest", "squash")}


@dataclass(frozen=True)
class Preprocess:
    """Pictures of ``size`` x ``size`` pixels; the defaults are those of OpenAI's CLIP. The names are open_clip's.

    mean, std: by channel, for pixel values in [0, 1].  interpolation: bicubic or bilinear.
    resize_mode: ``shortest``: the shorter side becomes ``size``, and the centre is cropped; ``longest``: the longer
        side does, and ``fill_color`` (0 to 255) surrounds the picture; ``squash``: both sides do.
    ValueError: another interpolation or resize_mode.
    """

    size: int = 224
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")

    @classmethod
    def read(cls, config: Mapping[str, Any] | None, size: int) -> Preprocess:
        """That of a ``preprocess_cfg`` in open_clip's format; what it lacks is CLIP's. ValueError: see the class."""
        known = {name: value for name, value in (config or {}).items() if name in _SETTINGS and value is not None}
        if known.get("interpolation") == "random":
            known["interpolation"] = "bicubic"  # as open_clip evaluates
        for name in ("mean", "std"):
            if name in known:
                value = known[name]
                known[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
        return cls(size, **known)

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> Preprocess:
        """That of an architecture in open_clip's format."""
        return cls.read(architecture.get("preprocess_cfg"), architecture["vision_cfg"].get("image_size", 224))

    def recorded_in(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """The architecture with this ``preprocess_cfg``; CLIP's own is not written down."""
        others = {name: value for name, value in architecture.items() if name != "preprocess_cfg"}
        settings = {name: list(value) if name in ("mean", "std") else value for name, value in asdict(self).items()}
        del settings["size"]
        return others if self == Preprocess(self.size) else others | {"preprocess_cfg": settings}


_SETTINGS = tuple(name for name in Preprocess.__dataclass_fields__ if name != "size")


def prepare_data(trainer: Trainer, preprocess: Preprocess) -> None:
    """Have the trainer's data module prepare pictures as a model wants them; their size stays the data module's.

    Loaders that are given without a data module show what they show.
    """
    data = trainer.datamodule
    if hasattr(data, "preprocess"):
        data.preprocess = replace(preprocess, size=data.preprocess.size)


def choose_preprocess(name: str, tag: str | None, chosen: str | Mapping[str, Any] | None, size: int) -> Preprocess:
    """The preprocessing of weights of the open_clip model ``name``.

    tag: which weights of open_clip they are; None: other ones, such as a local file that does not record it.
    chosen: what the user said instead: ``clip`` for OpenAI's, one of the model's tags, whose preprocessing to take, or
        a ``preprocess_cfg``.
    ValueError: no such tag; or neither tag nor choice, and the model's tags differ in it.
    """
    if chosen == "clip":
        return Preprocess(size)
    if isinstance(chosen, Mapping):
        return Preprocess.read(chosen, size)
    import open_clip  # with torchvision, as slow to import as torch

    tags = open_clip.list_pretrained_tags_by_model(name)
    if chosen is not None and chosen not in tags:
        raise ValueError(f"preprocess {chosen!r} is neither clip nor a weights tag of {name}; it has {tags}")
    if (chosen or tag) is not None:
        return Preprocess.read(open_clip.get_pretrained_cfg(name, chosen or tag), size)
    by_tag = {tag: Preprocess.read(open_clip.get_pretrained_cfg(name, tag), size) for tag in tags}
    kinds = set(by_tag.values())
    if len(kinds) > 1:
        examples = ", ".join(next(tag for tag in tags if by_tag[tag] == kind) for kind in sorted(kinds, key=repr))
        raise ValueError(
            f"weights of {name} were trained on pictures prepared in {len(kinds)} ways, and these record none; "
            f"say --preprocess (preprocess: in a recipe) clip, or a tag that was trained alike, such as {examples}"
        )
    return kinds.pop() if kinds else Preprocess(size)
