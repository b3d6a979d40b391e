"""Load any model of this suite or of open_clip: ``encode_image``, and ``encode_text`` if it has a text tower.

Shapes: B images or texts, T text tokens, E joint dim, S image size.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.adapters import AdaptedTower, adapt
from common.arguments import SUFFIXES
from common.clip import CLIP
from common.conditions import digest, state_digest
from common.directory import TEXT, WEIGHTS, is_directory
from common.directory import read as read_directory
from common.layouts import of_timm
from common.network import LOCAL_WEIGHTS, downloads
from common.packaged import packaged_model
from common.preprocess import Preprocess
from common.pretrained import HUB, LOCAL, QUICK, Folder, find_pretrained, named_folder, read_folder
from common.recipes import packaged_file
from common.text_model import TextModel
from common.tower import ImageTower
from common.weights import load_state, read_record, read_state_dict

GROUP = "effclip.models"
"""The entry-point group of the model types that may be loaded."""

OPEN_CLIP = "open_clip"
"""The type of a model that open_clip's own code runs; its results are open_clip's bit by bit."""


@dataclass(frozen=True)
class Model:
    """A loaded model.

    type: its registered name, or "open_clip".  preprocess: how its pictures are prepared.
    images: has ``encode_image(images [B,3,S,S]) -> [B,E]`` for such pictures.
    texts: has ``encode_text(ids [B,T]) -> [B,E]`` and ``tokenizer``; None for an image tower alone.
    weights: a hash of each side's weights (and of an open_clip model's name), {"image": ..., "text": ...}.
    files: the hash of each file that was read, by file name.
    folder: the model directory, if the model came from one.
    templates: those of that directory, if the texts were tuned for them (``tuned_for_templates``) and need them.
    own_templates: those of the data that the model was trained on, where its directory or package says them.
    first: a smaller model that answers before this one where it is sure (``common.cascade``); None: no cascade.
    """

    name: str
    type: str
    preprocess: Preprocess
    images: nn.Module
    texts: nn.Module | None
    weights: dict[str, str]
    files: dict[str, str]
    folder: Path | None = None
    templates: tuple[str, ...] = ()
    own_templates: tuple[str, ...] = ()
    first: Model | None = None

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.preprocess.size

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
    model: str,
    weights: str | None = None,
    quick_gelu: bool | None = None,
    text_model: str | None = None,
    preprocess: str | None = None,
) -> Model:
    """Load a model in evaluation mode from a file or folder, or by an open_clip name.

    model: a model directory; a safetensors file with this suite's record, or a folder with one such file; a folder of
        open_clip or of transformers' CLIPModel, which may be named ``local-dir:FOLDER`` or on the hub
        ``hf-hub:ORG/NAME``; an open_clip model name.
    weights: for an open_clip name, one of its tags, or a local file or folder.
    quick_gelu: for a local file of open_clip weights, whether it was trained with QuickGELU.
    text_model: a file, folder or name that gives the text tower, for types that have none. A packaged model brings
        its own.
    preprocess: for an open_clip name, how pictures were prepared for a local file; see ``choose_preprocess``.
    ValueError: the file is missing or has no record, its type is not registered, or arguments do not go together.
    """
    path = _weights_path(model)
    extra = {"--weights": weights, "--quick-gelu": quick_gelu, "--preprocess": preprocess}
    if path is not None and any(value is not None for value in extra.values()):
        raise ValueError(f"{model} records its architecture; {', '.join(extra)} belong to open_clip names")
    if path is None:
        loaded = _from_open_clip(model, weights, quick_gelu, preprocess)
    elif isinstance(path, Folder):
        loaded = _from_folder(_name(model), path)
    else:
        loaded = _from_directory(path) if path.is_dir() else _from_file(model, path)
    packaged = packaged_model(model) if text_model is None else None
    if text_model is None and packaged is None:
        return loaded
    text_side = load_model(text_model or str(packaged.texts))
    return replace(
        loaded,
        texts=text_side.text_encoder(),
        weights={"image": loaded.weights["image"], "text": text_side.weights["text"]},
        files=loaded.files | text_side.files,
        folder=None,
        templates=text_side.templates,
        own_templates=text_side.own_templates if packaged is None else tuple(packaged.templates),
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


def _weights_path(model: str) -> Path | Folder | None:
    """The weights file, model directory or foreign folder that ``model`` names; None where it is not a path."""
    named = model.startswith((HUB, LOCAL))
    path = named_folder(model) if named else Path(model)
    if path.is_dir() and is_directory(path):
        return path
    if path.is_dir():
        folder = read_folder(path)
        if folder is not None:  # ``CLIP.save_pretrained`` records in the file what the folder's format lacks
            return folder.weights if "architecture" in read_record(folder.weights) else folder
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path.absolute()} holds no model; name a model directory or a weights file")
        if len(files) > 1:
            raise ValueError(f"{path.absolute()} has {len(files)} safetensors files; name one of them")
        return files[0]
    return path if path.is_file() or path.suffix in SUFFIXES or "/" in model else None


def _name(model: str) -> str:
    """What results call a model that is named by a path."""
    path = Path(model.removeprefix(LOCAL).removeprefix(HUB)).expanduser()
    return Path(os.path.abspath(path)).name.removesuffix(".safetensors")  # "." has a name, a link keeps its own


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
        own_templates=tuple(described.templates),
    )


def _from_file(model: str, path: Path) -> Model:
    path = packaged_file(path)
    record = read_record(path)  # ValueError where there is no file
    kind = model_type(record, path)
    module = registered()[kind].load().load(path).eval()
    preprocess = Preprocess.of(record["architecture"])
    weights = digest(path)
    name = _name(model)
    texts = module if hasattr(module, "encode_text") else None
    return Model(name, kind, preprocess, module, texts, {"image": weights, "text": weights}, {path.name: weights})


class OpenClip(nn.Module):
    """A model of open_clip, for inference, with the interface of ``common.clip.CLIP``.

    Training branches of its image tower (MobileCLIP, FastViT) are folded into one convolution each, in place.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        from timm.utils import reparameterize_model

        super().__init__()
        reparameterize_model(model.visual, inplace=True)
        self.model, self._tokenizer = model, tokenizer

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S], prepared as for this model, -> [B,E]."""
        return self.model.encode_image(images, normalize=normalize)

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


def _from_open_clip(name: str, weights: str | None, quick_gelu: bool | None, preprocess: str | None) -> Model:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"{name!r} is no file or folder here and no open_clip model; `effclip models WORD` lists those with a word "
            "in their name"
        )
    if weights is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{name} without weights is random; give --weights with one of {tags} or a local file")
    source = find_pretrained(name, weights, config["vision_cfg"].get("image_size", 224), quick_gelu, preprocess)
    native, trained = bool(config.get("quick_gelu", False)), source.quick_gelu
    if quick_gelu not in (None, trained) or native > trained or (source.file is None and native != trained):
        activation = {True: "QuickGELU", False: "GELU"}
        matching = name.removesuffix(QUICK) + (QUICK if trained else "")
        if native == trained:
            mend = "leave --quick-gelu out"
        else:
            mend = f"name the matching one, {matching}" if matching != name else "they need another architecture"
        raise ValueError(
            f"{weights} was trained with {activation[trained]}; the architecture {name} has {activation[native]}"
            f"{'' if quick_gelu is None else f' and --quick-gelu says {activation[quick_gelu]}'}; {mend}"
        )
    state = None if source.file is None else source.read()  # a damaged file is an error before a model is built
    with _building(name, config):
        if state is None:
            with downloads(f"the weights {weights!r} of {name}", LOCAL_WEIGHTS):
                model = open_clip.create_model(name, pretrained=weights, force_quick_gelu=trained)
        else:
            model = open_clip.create_model(name, force_quick_gelu=trained, pretrained_text=False)
        tokenizer = open_clip.get_tokenizer(name)
    if state is not None:
        _load_strictly(model, state, weights, name)
    salt = f"{name} {trained}"
    return _foreign(f"{name} {Path(weights).stem}", model, tokenizer, source.preprocess, salt, source.file)


def _from_folder(name: str, folder: Folder) -> Model:
    """A model of open_clip or transformers from a folder that the library wrote."""
    import open_clip

    state = read_state_dict(folder.weights)
    if folder.plain:
        clip = CLIP(folder.architecture)
        clip.load_weights(state, str(folder.weights))
        weights = dict.fromkeys(("image", "text"), digest(folder.weights))
        files = {folder.weights.name: weights["image"]}
        return Model(name, "CLIP", clip.preprocess, clip.eval(), clip, weights, files)
    local = f"{LOCAL}{folder.path}"
    with _building(name, folder.architecture):
        model = open_clip.create_model(local, load_weights=False, pretrained_text=False)
        tokenizer = open_clip.get_tokenizer(local)
    _load_strictly(model, state, str(folder.weights), "its open_clip_config.json")
    return _foreign(name, model, tokenizer, Preprocess.of(folder.architecture), "", folder.weights)


def _foreign(
    name: str, model: nn.Module, tokenizer: Any, preprocess: Preprocess, salt: str, file: Path | None
) -> Model:
    """An open_clip model with its weights.  salt: what changes its outputs beside those.  file: theirs, if local."""
    # A timm tower of fixed size may be of another one than its architecture says (ViTamin-XL-384); it is right.
    fixed = getattr(getattr(getattr(model.visual, "trunk", None), "patch_embed", None), "img_size", None)
    size = fixed or model.visual.image_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(f"{name} reads pictures of {size}; evaluation gives square ones")
        size = size[0]
    digests = dict.fromkeys(("image", "text"), state_digest(model, salt))
    files = {} if file is None else {file.name: digest(file)}
    wrapped = OpenClip(model, tokenizer).eval()
    return Model(name, OPEN_CLIP, replace(preprocess, size=size), wrapped, wrapped, digests, files)


@contextmanager
def _building(name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """A block in which open_clip builds a model, whose text tower or tokenizer it may take from the hub.

    ValueError: it does, and there is neither a network nor a copy.
    """
    text = config.get("text_cfg", {})
    taken = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    mend = f"fetch that once where there is a network, `hf download {taken}`, and name the folder by HF_HOME"
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that its weights are random, which are loaded next
    try:
        with downloads(f"the text side of {name}, transformers' {taken},", mend) if taken else nullcontext():
            yield
    finally:
        logging.disable(level)


def _load_strictly(model: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """Load a state dict, in timm's names or one of the forms that open_clip knows. ValueError: keys do not fit."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state if hasattr(model.visual, "trunk") else of_timm(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "logit_scale" in state:  # both () and (1,) are in use
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    # Counters of batch normalisation, which inference does not read, are missing from older files.
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    load_state(model, counters | state, source, name)
