"""CLIP = image tower + text tower + logit scale: building a model, loading and saving its weights.

Shapes: B images or texts, T text tokens, E joint dim.

An architecture is a dictionary in open_clip's model-config format, from an open_clip model name or a ``.json`` file.
This suite extends the format by two keys, ``text_cfg.vocabulary``, the ids kept of the byte-pair vocabulary, and
``preprocess_cfg``, how pictures are prepared where it is not as OpenAI's CLIP wants them (``common.preprocess``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.arguments import PREFIXES
from common.hub_card import UNKNOWN, hub_card
from common.layouts import of_timm
from common.preprocess import Preprocess, choose_preprocess
from common.pretrained import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, find_pretrained
from common.tokenizer import Tokenizer, encode
from common.tower import ImageTower, TextTower, resize_positions
from common.weights import load_state, read_record, read_state_dict, save_model, save_state

_KEYS = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "preprocess_cfg"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "vocabulary"},
}
_TEXT_KEYS = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
_NO_WEIGHTS = ("attn_mask", "context_length", "input_resolution", "vocab_size")
_POSITIONS = "image_tower.positional_embedding"
_INITIAL_SCALE = 1 / 0.07


def load_architecture(name: str) -> dict[str, Any]:
    """The architecture of an open_clip model name, or of a ``.json`` file in the same format.

    A file may name another one or a model as its "base", and say only what differs; "vision_cfg" and "text_cfg" are
    merged key by key.

    ValueError: an unknown name, a missing file, the name of a folder with weights, or a part that CLIP's plain ViT
        family does not have.
    """
    if name.endswith(".json"):
        path = Path(name) if Path(name).exists() else Path(__file__).parent.parent / name
        if not path.exists():
            raise ValueError(f"no architecture file at {Path(name).absolute()}")
        try:
            architecture = json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no text
            raise ValueError(f"{path.absolute()} is no JSON ({error}); write a model config of open_clip") from error
        if not isinstance(architecture, dict):
            raise ValueError(f"{path.absolute()} holds no model config of open_clip, an object with embed_dim")
        if "base" in architecture:
            base = load_architecture(architecture.pop("base"))
            merged = {key: base.get(key, {}) | value for key, value in architecture.items() if isinstance(value, dict)}
            architecture = base | architecture | merged
    elif name.startswith(PREFIXES):  # open_clip would read the configuration alone, and the weights would be random
        raise ValueError(
            f"{name} is a model with weights, which an architecture leaves behind; name it as the weights, and its "
            "architecture by a model name such as ViT-B-32 or a .json file"
        )
    else:
        import open_clip  # with torchvision, as slow to import as torch

        architecture = open_clip.get_model_config(name)
        if architecture is None:
            raise ValueError(f"{name!r} is neither an open_clip model name nor a .json file")
    return check_architecture(architecture, name)


def check_architecture(architecture: dict[str, Any], name: str = "architecture") -> dict[str, Any]:
    """Return the dictionary unchanged. ValueError names a key that this suite's towers do not implement."""
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in architecture]
    if missing:
        raise ValueError(f"{name} has no {missing[0]}; an architecture is a model config of open_clip")
    for section in _KEYS:
        for key, value in (architecture[section] if section else architecture).items():
            unknown = key not in _KEYS[section] and value is not None
            if unknown or (key == "layers" and not isinstance(value, int)):  # a ResNet has a list of them
                where = f"{section}.{key}" if section else key
                raise ValueError(
                    f"{name}: {where} = {value!r} is not part of CLIP's plain ViT family, which alone is trained and "
                    "distilled here, such as ViT-B-32; `effclip evaluate` and token reducers take the others as well"
                )
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

    @property
    def preprocess(self) -> Preprocess:
        """How pictures are prepared for the image tower."""
        return Preprocess.of(self.architecture)

    @classmethod
    def from_open_clip(
        cls,
        name: str = "ViT-B-16",
        weights: str | None = None,
        *,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        preprocess: str | Mapping[str, Any] | None = None,
    ) -> CLIP:
        """A CLIP of a named architecture.

        weights: an open_clip tag, a local file, or a folder of open_clip or transformers; None: random weights.
        quick_gelu: whether a local file was trained with QuickGELU. It must be given for a file that does not record
            it, since weights load with the wrong activation without an error and only lose accuracy.
        image_size: pixels per side, if they differ from the architecture's; positional embeddings are then
            interpolated to the new grid. Without it, weights for another size are refused.
        preprocess: how pictures were prepared for the weights, where neither tag nor file tells; see
            ``choose_preprocess``.
        ValueError: unknown name, tag or file; keys or shapes that do not fit; an activation that does not match;
            a preprocessing that is not known.
        """
        architecture = load_architecture(name)
        if image_size is not None:
            vision = {**architecture["vision_cfg"], "image_size": image_size}
            architecture = {**architecture, "vision_cfg": vision}
        size = architecture["vision_cfg"]["image_size"]
        native = bool(architecture.get("quick_gelu", False))
        if weights is None:
            if preprocess is not None:
                architecture = choose_preprocess(name, None, preprocess, size).recorded_in(architecture)
            return cls({**architecture, "quick_gelu": native if quick_gelu is None else quick_gelu})
        source = find_pretrained(name, weights, size, quick_gelu, preprocess)
        wanted = native if quick_gelu is None else quick_gelu
        if source.quick_gelu != wanted:
            names = {True: "QuickGELU", False: "GELU"}
            raise ValueError(
                f"{weights} was trained with {names[source.quick_gelu]} but {name} with quick_gelu={quick_gelu} means "
                f"{names[wanted]}; name the matching architecture (e.g. ViT-B-16-quickgelu) or "
                f"quick_gelu={source.quick_gelu}"
            )
        model = cls({**source.preprocess.recorded_in(architecture), "quick_gelu": source.quick_gelu})
        model.load_weights(source.read(), weights, image_size is not None)
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
        """Load a state dict of this class, or in open_clip's or timm's names. ValueError names keys that do not fit.

        source: the name of the weights in an error.  resize: interpolate positional embeddings of another grid.
        """
        state = {_our_key(key): value for key, value in of_timm(state).items() if key not in _NO_WEIGHTS}
        if state and all(key.startswith("image_tower.") for key in state):
            raise ValueError(f"{source} holds an image tower without a text tower; give the file of the whole CLIP")
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
        save_model(self, path, self._record(), dtype)

    @classmethod
    def load(cls, path: str | Path) -> CLIP:
        """Read a file that ``save`` or ``save_pretrained`` wrote. ValueError: it records no architecture."""
        record = read_record(path)
        if "architecture" not in record:
            raise ValueError(f"{path} records no architecture; use CLIP.from_open_clip(name, {str(path)!r})")
        model = cls(record["architecture"])
        model.load_weights(read_state_dict(path), str(path))
        return model

    def save_pretrained(self, folder: str | Path, credit: str = UNKNOWN) -> None:
        """Write a folder in open_clip's hub layout, which ``open_clip.create_model("local-dir:FOLDER")`` loads.

        The weights' file also records what ``load`` needs, such as a cut vocabulary, which open_clip does not know. A
        README.md is the model card; one that is there stays. ``huggingface_hub.upload_folder`` publishes the folder.

        credit: Markdown of the card about licence and attribution.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(self.open_clip_state_dict(), folder / OPEN_CLIP_WEIGHTS, self._record(), torch.float32)
        config = {key: value for key, value in self._record()["architecture"].items() if key != "preprocess_cfg"}
        config["text_cfg"] = {key: value for key, value in config["text_cfg"].items() if key != "vocabulary"}
        described = {"model_cfg": config, "preprocess_cfg": asdict(self.preprocess)}
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(described, indent=1) + "\n")
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(hub_card(self.architecture, self.quick_gelu, credit))

    def _record(self) -> dict[str, Any]:
        return {"architecture": {**self.architecture, "quick_gelu": self.quick_gelu}}


def _our_key(key: str) -> str:
    key = key.removeprefix("text.")  # where open_clip keeps the text tower apart
    if key.startswith("visual."):
        return "image_tower." + key.removeprefix("visual.")
    return "text_tower." + key if key.startswith(_TEXT_KEYS) else key
