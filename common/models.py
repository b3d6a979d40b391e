"""Load any model of this suite or of open_clip: ``encode_image``, and ``encode_text`` if it has a text tower.

Shapes: B images or texts, T text tokens, E joint dim, S image size.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.adapters import AdaptedTower, adapt
from common.clip import MEAN, STD, read_record, read_state_dict, tag_quick_gelu
from common.conditions import digest, state_digest
from common.directory import TEXT, WEIGHTS, is_directory
from common.directory import read as read_directory
from common.network import LOCAL_WEIGHTS, downloads
from common.packaged import packaged_model
from common.text_model import TextModel
from common.tower import ImageTower

GROUP = "effclip.models"
"""The entry-point group of the model types that may be loaded."""

OPEN_CLIP = "open_clip"
"""The type of a model that open_clip's own code runs; its results are open_clip's bit by bit."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Model:
    """A loaded model.

    type: its registered name, or "open_clip".  image_size: S in pixels.
    images: has ``encode_image(images [B,3,S,S]) -> [B,E]`` for images normalised by CLIP's mean and deviation.
    texts: has ``encode_text(ids [B,T]) -> [B,E]`` and ``tokenizer``; None for an image tower alone.
    weights: a hash of each side's weights (and of an open_clip model's name), {"image": ..., "text": ...}.
    files: the hash of each file that was read, by file name.
    folder: the model directory, if the model came from one.
    templates: those of that directory, if the texts were tuned for them (``tuned_for_templates``) and need them.
    """

    name: str
    type: str
    image_size: int
    images: nn.Module
    texts: nn.Module | None
    weights: dict[str, str]
    files: dict[str, str]
    folder: Path | None = None
    templates: tuple[str, ...] = ()

    def text_encoder(self) -> nn.Module:
        """``texts``. ValueError: the model has no text tower."""
        if self.texts is None:
            raise ValueError(
                f"{self.name} (type {self.type}) has no text tower; name the CLIP that it was distilled from "
                "with --text-model FILE"
            )
        return self.texts


def registered() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of the model types that may be loaded, by type name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def load_model(
    model: str, weights: str | None = None, quick_gelu: bool | None = None, text_model: str | None = None
) -> Model:
    """Load a model in evaluation mode from a file or folder of this suite, or by an open_clip name.

    model: a model directory, a safetensors file with this suite's record, a folder with one such file, or an
        open_clip model name.
    weights: for an open_clip name, one of its tags or a local file.
    quick_gelu: for a local file of open_clip weights, whether it was trained with QuickGELU.
    text_model: a file, folder or name that gives the text tower, for types that have none. A packaged model brings
        its own.
    ValueError: the file is missing or has no record, its type is not registered, or arguments do not go together.
    """
    path = _weights_path(model)
    if path is not None and (weights is not None or quick_gelu is not None):
        raise ValueError(f"{path} records its architecture; --weights and --quick-gelu belong to open_clip names")
    if path is None:
        loaded = _from_open_clip(model, weights, quick_gelu)
    else:
        loaded = _from_directory(path) if path.is_dir() else _from_file(model, path)
    if text_model is None:
        packaged = packaged_model(model)
        if packaged is None:
            return loaded
        text_model = str(packaged.texts)
    text_side = load_model(text_model)
    return replace(
        loaded,
        texts=text_side.text_encoder(),
        weights={"image": loaded.weights["image"], "text": text_side.weights["text"]},
        files=loaded.files | text_side.files,
        folder=None,
        templates=text_side.templates,
    )


def model_type(record: dict[str, Any], path: Path) -> str:
    """The registered type of a file: the one section of its record beside "architecture", or CLIP without one.

    ValueError: there is no record, or the type is not registered.
    """
    if "architecture" not in record:
        raise ValueError(
            f"{path} records no architecture; for open_clip's weights give --model NAME --weights {path}, and of a "
            "training checkpoint `effclip convert` makes a model directory"
        )
    sections = sorted(record.keys() - {"architecture"})
    kind = sections[0] if sections else "CLIP"
    if len(sections) > 1 or kind not in registered():
        raise ValueError(f"{path} is of type {sections or kind}; registered are {sorted(registered())}")
    return kind


def _weights_path(model: str) -> Path | None:
    """The weights file or model directory that ``model`` names; None where it is not a path."""
    path = Path(model)
    if path.is_dir() and is_directory(path):
        return path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{path.absolute()} has {len(files)} safetensors files; name one of them")
        return files[0]
    if path.is_file() or path.suffix in _SUFFIXES or "/" in model:
        return path
    return None


def _from_directory(folder: Path) -> Model:
    described = read_directory(folder)
    loaded = _from_file(folder.resolve().name, folder / WEIGHTS)
    texts = TextModel.load(folder / TEXT).eval() if TEXT in described.files else loaded.texts
    tuned = getattr(texts, "tuned_for_templates", False)
    return replace(
        loaded,
        texts=texts,
        weights=described.weights,
        files=described.files,
        folder=folder,
        templates=tuple(described.templates) if tuned else (),
    )


def _from_file(model: str, path: Path) -> Model:
    record = read_record(path)  # ValueError where there is no file
    kind = model_type(record, path)
    module = registered()[kind].load().load(path).eval()
    size = record["architecture"]["vision_cfg"]["image_size"]
    weights = digest(path)
    name = Path(model).name.removesuffix(".safetensors")
    texts = module if hasattr(module, "encode_text") else None
    return Model(name, kind, size, module, texts, {"image": weights, "text": weights}, {path.name: weights})


class OpenClip(nn.Module):
    """A model of open_clip with the interface of ``common.clip.CLIP``."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        preprocess = model.visual.preprocess_cfg
        clip_mean, clip_std, mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD, preprocess["mean"], preprocess["std"])
        )
        self.register_buffer("scale", clip_std / std)
        self.register_buffer("shift", (clip_mean - mean) / std)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S], normalised as CLIP's, -> [B,E]. They are normalised again for this model."""
        return self.model.encode_image(images * self.scale + self.shift, normalize=normalize)

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids [B,T] -> embeddings [B,E], of length 1 if ``normalize``."""
        return self.model.encode_text(ids, normalize=normalize)

    @property
    def image_tower(self) -> ImageTower | AdaptedTower:
        """Its image tower for reducers, for pictures with this model's own normalisation.

        ValueError: an architecture that ``common.adapters.adapt`` refuses.
        """
        return adapt(self.model)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the cosines' multiplier, as in ``CLIP``."""
        return self.model.logit_scale

    def tokenizer(self, texts: Sequence[str], truncate: bool = True, longest: bool = False) -> Tensor:
        """texts -> ids [B,T] of the full context length; open_clip's tokenizers always truncate."""
        return self._tokenizer(list(texts))


def _from_open_clip(name: str, weights: str | None, quick_gelu: bool | None) -> Model:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"{name!r} is no file or folder here and no open_clip model; `python -c 'import open_clip; "
            "print(open_clip.list_models())'` lists those"
        )
    if weights is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{name} without weights is random; give --weights with one of {tags} or a local file")
    path = Path(weights)
    if path.suffix in _SUFFIXES or "/" in weights:
        if quick_gelu is None:
            raise ValueError(f"{weights} does not record its activation; say --quick-gelu yes or --quick-gelu no")
        state, trained = read_state_dict(weights), quick_gelu
    else:
        state, trained = None, tag_quick_gelu(name, weights)
    native = bool(config.get("quick_gelu", False))
    if quick_gelu not in (None, trained) or native > trained or (state is None and native != trained):
        activation = {True: "QuickGELU", False: "GELU"}
        raise ValueError(
            f"{weights} was trained with {activation[trained]}; {name} has {activation[native]}"
            f"{'' if quick_gelu is None else f' and --quick-gelu says {activation[quick_gelu]}'}; name the matching "
            f"architecture, such as ViT-B-16 or ViT-B-16-quickgelu"
        )
    if state is None:
        with downloads(f"the weights {weights!r} of {name}", LOCAL_WEIGHTS):
            model = open_clip.create_model(name, pretrained=weights, force_quick_gelu=trained)
    else:
        model = open_clip.create_model(name, force_quick_gelu=trained)
    if state is not None:
        try:
            model.load_state_dict(open_clip.convert.convert_state_dict(model, state))
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {name}: {str(error)[:400]}") from error
    wrapped = OpenClip(model, open_clip.get_tokenizer(name)).eval()
    size = model.visual.image_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(f"{name} reads pictures of {size}; evaluation gives square ones")
        size = size[0]
    digests = dict.fromkeys(("image", "text"), state_digest(model, f"{name} {trained}"))
    files = {path.name: digest(path)} if state is not None else {}
    return Model(f"{name} {path.stem}", OPEN_CLIP, size, wrapped, wrapped, digests, files)
