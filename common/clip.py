"""CLIP = image tower + text tower + logit scale: building a model, loading and saving its weights.

Shapes: B images or texts, T text tokens, E joint dim.

An architecture is a dictionary in open_clip's model-config format, from an open_clip model name or a ``.json`` file.
This suite extends the format by one key, ``text_cfg.vocabulary``: the ids kept of the byte-pair vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoints import read_plain
from common.network import LOCAL_WEIGHTS, downloads
from common.tokenizer import Tokenizer, encode
from common.tower import ImageTower, TextTower, resize_positions

_KEYS = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "vocabulary"},
}
_TEXT_KEYS = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
_POSITIONS = "image_tower.positional_embedding"
_INITIAL_SCALE = 1 / 0.07
_Model = TypeVar("_Model", bound=nn.Module)

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Channel means of OpenAI's CLIP, for pixel values in [0, 1]; every model of the suite uses them."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel standard deviations, to go with MEAN."""


def load_architecture(name: str) -> dict[str, Any]:
    """The architecture of an open_clip model name, or of a ``.json`` file in the same format.

    ValueError: an unknown name, a missing file, or a part that CLIP's plain ViT family does not have.
    """
    import open_clip

    if name.endswith(".json"):
        path = Path(name) if Path(name).exists() else Path(__file__).parent.parent / name
        if not path.exists():
            raise ValueError(f"no architecture file at {Path(name).absolute()}")
        architecture = json.loads(path.read_text())
    else:
        architecture = open_clip.get_model_config(name)
        if architecture is None:
            raise ValueError(f"{name!r} is neither an open_clip model name nor a .json file")
    return check_architecture(architecture, name)


def check_architecture(architecture: dict[str, Any], name: str = "architecture") -> dict[str, Any]:
    """Return the dictionary unchanged. ValueError names a key that this suite's towers do not implement."""
    sections = {"": architecture, **{key: architecture.get(key, {}) for key in ("vision_cfg", "text_cfg")}}
    for section, values in sections.items():
        for key, value in values.items():
            if key not in _KEYS[section] and value is not None:
                where = f"{section}.{key}" if section else key
                raise ValueError(f"{name}: {where} = {value!r} is not part of CLIP's plain ViT family")
    vocabulary = architecture["text_cfg"].get("vocabulary")
    if vocabulary is not None and len(vocabulary) != architecture["text_cfg"]["vocab_size"]:
        raise ValueError(f"{name}: vocab_size {architecture['text_cfg']['vocab_size']} but {len(vocabulary)} ids kept")
    return architecture


class CLIP(nn.Module):
    """A CLIP model: ``image_tower``, ``text_tower``, ``logit_scale`` (a logarithm) and ``tokenizer``.

    image_tower: the tower to use; None: the architecture's plain ViT.
    """

    def __init__(self, architecture: dict[str, Any], image_tower: nn.Module | None = None) -> None:
        super().__init__()
        self.architecture = check_architecture(architecture)
        vision, text = dict(architecture["vision_cfg"]), dict(architecture["text_cfg"])
        shared = {"embed_dim": architecture["embed_dim"], "quick_gelu": self.quick_gelu}
        heads = vision["width"] // vision.pop("head_width", 64)
        self.tokenizer = Tokenizer(text["context_length"], text.pop("vocabulary", None))
        self.image_tower = ImageTower(**vision, heads=heads, **shared) if image_tower is None else image_tower
        self.text_tower = TextTower(**text, **shared)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_SCALE)))

    @property
    def quick_gelu(self) -> bool:
        """Whether the towers were trained with QuickGELU instead of GELU."""
        return bool(self.architecture.get("quick_gelu", False))

    @classmethod
    def from_open_clip(
        cls,
        name: str = "ViT-B-16",
        weights: str | None = None,
        *,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
    ) -> CLIP:
        """A CLIP of a named architecture.

        weights: an open_clip tag or a local file; None: random weights.
        quick_gelu: whether a local file was trained with QuickGELU. It must be given for a file that does not record
            it, since weights load with the wrong activation without an error and only lose accuracy.
        image_size: pixels per side, if they differ from the architecture's; positional embeddings are then
            interpolated to the new grid. Without it, weights for another size are refused.
        ValueError: unknown name, tag or file; keys or shapes that do not fit; an activation that does not match.
        """
        architecture = load_architecture(name)
        if image_size is not None:
            vision = {**architecture["vision_cfg"], "image_size": image_size}
            architecture = {**architecture, "vision_cfg": vision}
        native = bool(architecture.get("quick_gelu", False))
        if weights is None:
            return cls({**architecture, "quick_gelu": native if quick_gelu is None else quick_gelu})
        if Path(weights).suffix or "/" in weights:
            recorded = read_record(weights).get("architecture")
            if recorded is None and quick_gelu is None:
                raise ValueError(f"{weights} does not record its activation; say quick_gelu true or false")
            trained = quick_gelu if recorded is None else bool(recorded.get("quick_gelu", False))
            read = partial(read_state_dict, weights)
        else:
            trained = tag_quick_gelu(name, weights)
            read = partial(_tag_state_dict, name, weights, trained)
        wanted = native if quick_gelu is None else quick_gelu
        if trained != wanted:
            names = {True: "QuickGELU", False: "GELU"}
            raise ValueError(
                f"{weights} was trained with {names[trained]} but {name} with quick_gelu={quick_gelu} means "
                f"{names[wanted]}; name the matching architecture (e.g. ViT-B-16-quickgelu) or quick_gelu={trained}"
            )
        model = cls({**architecture, "quick_gelu": trained})
        model.load_weights(read(), weights, image_size is not None)
        return model

    @classmethod
    def tiny(cls) -> CLIP:
        """A small random CLIP for tests: 32 px, patch 8, 2 blocks of width 64, a vocabulary of 10 words."""
        vocabulary = sorted(set(encode("a red green blue cat dog bird on the of")))
        text = {"context_length": 16, "vocab_size": len(vocabulary), "vocabulary": vocabulary}
        return cls(
            {
                "embed_dim": 32,
                "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
                "text_cfg": {**text, "width": 64, "heads": 2, "layers": 2},
            }
        )

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> embeddings [B,E], of length 1 unless ``normalize`` is False."""
        z = self.image_tower(images)
        return F.normalize(z, dim=-1) if normalize else z

    def penultimate(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> the class token [B,D] before projection, which linear probes of the field read."""
        tower = self.image_tower
        return tower.class_feature(tower.run_blocks(tower.embed(images)))

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """ids [B,T] -> embeddings [B,E], of length 1 unless ``normalize`` is False."""
        z = self.text_tower(ids)
        return F.normalize(z, dim=-1) if normalize else z

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B,3,S,S], ids [B,T] -> embeddings [B,E] of both, of length 1, and the multiplier of the cosines."""
        return self.encode_image(images), self.encode_text(ids), self.logit_scale.exp()

    def load_weights(self, state: dict[str, Tensor], source: str = "state dict", resize: bool = False) -> None:
        """Load a state dict of open_clip's ViT family or of this class. ValueError names the keys that do not fit.

        source: the name of the weights in an error.  resize: interpolate positional embeddings of another grid.
        """
        state = {_our_key(key): value for key, value in state.items() if key not in ("attn_mask", "context_length")}
        if "logit_scale" in state and state["logit_scale"].numel() == 1:  # one-dimensional where it was sharded
            state["logit_scale"] = state["logit_scale"].reshape(self.logit_scale.shape)
        if resize and _POSITIONS in state:
            state[_POSITIONS] = resize_positions(state[_POSITIONS], self.image_tower.grid)
        try:
            load_state(self, state, source)
        except ValueError as error:
            if _POSITIONS in state and len(state[_POSITIONS]) != len(self.state_dict()[_POSITIONS]):
                raise ValueError(f"{error}; image_size interpolates positions for pictures of another size") from None
            raise

    def open_clip_state_dict(self) -> dict[str, Tensor]:
        """A copy of the weights under open_clip's names, which its model of this architecture loads strictly."""
        return {
            key.replace("image_tower.", "visual.", 1).removeprefix("text_tower."): value.detach().clone()
            for key, value in self.state_dict().items()
        }

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write weights, architecture, activation and vocabulary as one safetensors file."""
        save_model(self, path, {"architecture": {**self.architecture, "quick_gelu": self.quick_gelu}}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> CLIP:
        """Read a file that ``save`` wrote. ValueError for a file without a recorded architecture."""
        problem = f"records no architecture; use CLIP.from_open_clip(name, {str(path)!r})"
        return load_saved(path, {"architecture"}, problem, lambda record: cls(record["architecture"]))


def save_model(module: nn.Module, path: str | Path, record: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a module's weights as safetensors of one dtype, with ``record`` as JSON in the file's metadata."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().to("cpu", dtype).contiguous().clone() for key, value in module.state_dict().items()}
    save_file(state, str(path), metadata={key: json.dumps(value) for key, value in record.items()})


def load_saved(path: str | Path, sections: set[str], problem: str, build: Callable[[dict[str, Any]], _Model]) -> _Model:
    """Build a model from the record of a file that ``save_model`` wrote, and load the file's weights.

    sections: those that the record must have.  build: record -> the model, with any weights.
    ValueError: a section is missing (the message is the path and ``problem``), or the weights do not fit.
    """
    record = read_record(path)
    if not sections <= record.keys():
        raise ValueError(f"{path} {problem}")
    model = build(record)
    load_state(model, read_state_dict(str(path)), str(path))
    return model


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a complete state dict; ``source`` is its name in an error. ValueError names the keys that do not fit."""
    expected = module.state_dict()
    wrong = [f"missing {key}" for key in expected.keys() - state.keys()]
    wrong += [f"unknown {key}" for key in state.keys() - expected.keys()]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{source} does not fit this architecture: {'; '.join(sorted(wrong)[:4])}{more}")
    module.load_state_dict(state)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a safetensors file's metadata, as JSON objects by section; {} for a file without one.

    The section "architecture" is a CLIP's; a model of another registered type adds a section named after the type.
    ValueError: there is no file.
    """
    if not Path(path).is_file():
        raise ValueError(f"no weights at {Path(path).absolute()}")
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    # Other programs write plain words there ("format": "pt"), which are not part of the record.
    return {key: json.loads(value) for key, value in metadata.items() if value.startswith("{")}


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The weights of a safetensors or torch file as fp32; no code in the file is run.

    A state dict inside ``{"state_dict": ...}`` or ``{"model": ...}`` is taken out. A ``module.``, ``model.`` or
    ``clip.`` prefix that all keys share is removed. ValueError: there is no file, or it holds more than plain values.
    """
    if not Path(path).is_file():
        raise ValueError(f"no weights at {Path(path).absolute()}")
    if Path(path).suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        state = read_plain(path)
        state = state.get("state_dict", state.get("model", state))
    for prefix in ("module.", "model.", "clip."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def tag_quick_gelu(name: str, tag: str) -> bool:
    """Whether an open_clip tag's weights were trained with QuickGELU; works offline. ValueError: no such tag."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(f"{tag!r} is no weights tag of {name}; it has {tags}, or give a local file")
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))


def _tag_state_dict(name: str, tag: str, quick_gelu: bool) -> dict[str, Tensor]:
    """The weights of an open_clip tag, from its cache or over the network."""
    import open_clip

    with downloads(f"the weights {tag!r} of {name}", LOCAL_WEIGHTS):
        return open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu).state_dict()


def _our_key(key: str) -> str:
    if key.startswith("visual."):
        return "image_tower." + key.removeprefix("visual.")
    return "text_tower." + key if key.startswith(_TEXT_KEYS) else key
