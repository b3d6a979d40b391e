"""Where a CLIP's weights come from, and what is known of them: open_clip's tags, files, and folders of other programs.

A folder is in open_clip's hub layout (``open_clip_config.json``) or in that of transformers' CLIPModel
(``config.json``). ``hf-hub:ORG/NAME`` names such a folder on the model hub, ``local-dir:FOLDER`` one on this machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from common.arguments import PREFIXES
from common.network import LOCAL_WEIGHTS, downloads
from common.preprocess import Preprocess, choose_preprocess
from common.weights import read_record, read_state_dict

HUB, LOCAL = PREFIXES
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHTS = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
_PROCESSORS = {"processor_config.json": "image_processor", "preprocessor_config.json": None}
"""Where transformers writes how pictures are prepared, the file and its section: with a tokenizer, and alone."""
_CONFIGS = (OPEN_CLIP_CONFIG, "config.json", *_PROCESSORS)
VOCABULARY = 49_408
"""The ids of CLIP's byte-pair vocabulary."""
QUICK = "-quickgelu"
"""How open_clip's names of architectures with that activation end, where there is one without it too."""
_SIGLIP = (
    " (a SigLIP is read by its name in open_clip, such as ViT-B-16-SigLIP with --weights webli; `adapt` of "
    "common.adapters takes the image tower of one that transformers has loaded)"
)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which transformers writes."""


@dataclass(frozen=True)
class Folder:
    """A model's folder that another program wrote.

    architecture: in open_clip's format, with the preprocessing.  weights: the file.
    plain: whether it is transformers' CLIPModel, which has this suite's own towers.
    """

    path: Path
    architecture: dict[str, Any]
    weights: Path
    plain: bool


def read_folder(path: Path, pictures: bool = True) -> Folder | None:
    """The model of a folder; None: it has no configuration of open_clip or transformers.

    pictures: whether to read how transformers prepared them; where somebody says it, this need not be known.
    ValueError: the configuration cannot be read, is of another kind of model, or the weights are missing.
    """
    file = next((path / name for name in _CONFIGS[:2] if (path / name).is_file()), None)
    if file is None:
        return None
    plain = file.name != OPEN_CLIP_CONFIG
    try:
        config = json.loads(file.read_text())
        architecture = _of_transformers(config) if plain else _of_open_clip(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} describes no CLIP: {reason}; give a folder of open_clip or CLIPModel") from error
    if plain and pictures:
        size = architecture["vision_cfg"]["image_size"]
        architecture = Preprocess.read(_image_processor(path, size), size).recorded_in(architecture)
    names = _WEIGHTS[-2:] if plain else _WEIGHTS
    weights = next((path / name for name in names if (path / name).is_file()), None)
    if weights is None:
        several = "; several files must be one: save_pretrained(..., max_shard_size='100GB')" if plain else ""
        raise ValueError(f"{path.absolute()} has no weights, {' or '.join(names)}{several}")
    return Folder(path, architecture, weights, plain)


def _of_open_clip(config: dict[str, Any]) -> dict[str, Any]:
    architecture = config["model_cfg"]
    size = architecture["vision_cfg"].get("image_size", 224)
    return Preprocess.read(config.get("preprocess_cfg"), size).recorded_in(architecture)


def _of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The architecture of a CLIPConfig, which leaves out what equals its defaults."""
    if config.get("model_type") != "clip":
        kind = config.get("model_type")
        raise ValueError(f"its model_type is {kind!r}, not 'clip'{_SIGLIP if str(kind).startswith('siglip') else ''}")
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"} | (config.get("vision_config") or {})
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    text |= {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu"}
    text |= config.get("text_config") or {}
    if text["vocab_size"] != VOCABULARY:
        raise ValueError(f"its vocabulary has {text['vocab_size']:,} ids, CLIP's tokenizer has {VOCABULARY:,}")
    activation = vision["hidden_act"]
    if activation != text["hidden_act"] or activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act is {activation!r} and {text['hidden_act']!r}, not both quick_gelu or both gelu")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def _image_processor(path: Path, size: int) -> dict[str, Any] | None:
    """How a folder of transformers prepares pictures for a tower of ``size`` pixels, in open_clip's words.

    None: it does not say.  ValueError: no JSON, or a step or a size that ``Preprocess`` does not have.
    """
    for name, section in _PROCESSORS.items():
        if not (path / name).is_file():
            continue
        try:
            config = json.loads((path / name).read_text())
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
            if config := (config.get(section) if section else config):
                return _of_image_processor(config, size)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / name} prepares pictures in a way that is not known here: {error}; name the folder as the "
                "weights of an architecture and say --preprocess, such as --model ViT-B-32-quickgelu --weights FOLDER "
                "--preprocess clip"
            ) from error
    return None


def _of_image_processor(config: dict[str, Any], size: int) -> dict[str, Any]:
    """The settings of transformers' image processor in open_clip's words. ValueError: see ``_image_processor``."""
    config = {key: value for key, value in config.items() if value is not None}  # null is the default
    for key, only in {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}.items():
        if not math.isclose(value := config.get(key, only), only, rel_tol=1e-4):
            raise ValueError(f"{key} is {value}, where pictures are always resized, and scaled by 1/255")
    resampling = config.get("resample", 3)
    if resampling not in _RESAMPLING:
        raise ValueError(f"resample {resampling} is neither 2 (bilinear) nor 3 (bicubic)")
    cropped = config.get("do_center_crop", True)
    resized, crop = config.get("size") or size, (config.get("crop_size") or size) if cropped else size
    resized = {"shortest_edge": resized} if isinstance(resized, int) else resized
    if not isinstance(resized, dict):
        raise ValueError(f"size {resized} is neither a number nor a shortest_edge or height and width")
    squash = resized.keys() == {"height", "width"}
    known = squash or (resized.keys() == {"shortest_edge"} and cropped)
    sides = {*resized.values(), *(crop.values() if isinstance(crop, dict) else [crop])}
    if not known or sides != {size}:
        raise ValueError(
            f"size {resized}, crop_size {crop} and do_center_crop {cropped} do not resize to the tower's {size} pixels "
            "and crop to the same"
        )
    normalised = config.get("do_normalize", True)
    return {
        "mean": config.get("image_mean") if normalised else 0.0,
        "std": config.get("image_std") if normalised else 1.0,
        "interpolation": _RESAMPLING[resampling],
        "resize_mode": "squash" if squash else "shortest",
    }


def named_folder(name: str) -> Path:
    """The folder of ``hf-hub:ORG/NAME``, downloaded unless it is cached, or of ``local-dir:FOLDER``; else the path.

    ValueError: there is no such folder, or it cannot be downloaded.
    """
    if not name.startswith(HUB):
        path = Path(name.removeprefix(LOCAL)).expanduser()
        if name.startswith(LOCAL) and not path.is_dir():
            raise ValueError(f"no folder at {path.absolute()}; {LOCAL} is followed by one")
        return path
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repository = name.removeprefix(HUB)
    with downloads(f"the model {repository}", "give a folder with its files instead (local-dir:FOLDER)"):
        try:
            configs = _fetched(repository, _CONFIGS)
            weights = _fetched(repository, _WEIGHTS[-2:] if OPEN_CLIP_CONFIG not in configs else _WEIGHTS, enough=1)
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ValueError(f"{name}: the hub has no such model; a private one needs HF_TOKEN") from error
        if not (configs and weights) and constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{name} is not whole in the cache, and HF_HUB_OFFLINE keeps from asking the hub; download it once "
                "without that variable, or give a folder with its files instead (local-dir:FOLDER)"
            )
        if not configs or not weights:
            raise ValueError(f"{name} has no CLIP in open_clip's or transformers' layout")
    return next(iter(configs.values())).parent


def _fetched(repository: str, names: Sequence[str], enough: int | None = None) -> dict[str, Path]:
    """Those of the files that the hub has, at most the first ``enough``."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    files: dict[str, Path] = {}
    for name in names:
        if len(files) == enough:
            break
        try:
            files[name] = Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
    return files


@dataclass(frozen=True)
class Pretrained:
    """Weights that can be read, and what is known of their training.

    file: None for a tag.  quick_gelu: the activation.  preprocess: of the pictures.  read: returns the state dict.
    """

    file: Path | None
    quick_gelu: bool
    preprocess: Preprocess
    read: Callable[[], dict[str, Tensor]]


def is_local(weights: str) -> bool:
    """Whether weights are named by a path, not by a tag of open_clip."""
    return bool(Path(weights).suffix) or "/" in weights or Path(weights).is_dir()


def find_pretrained(
    name: str,
    weights: str,
    size: int,
    quick_gelu: bool | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
) -> Pretrained:
    """The weights of an open_clip model by a tag, a file, or a folder of open_clip or transformers.

    size: of the model's pictures.  quick_gelu, preprocess: what the user said, needed where it is not known.
    ValueError: there are no such weights, or they record neither activation nor preprocessing and nobody said it.
    """
    if not is_local(weights):
        trained, read = tag_quick_gelu(name, weights), partial(_tag_state_dict, name, weights)
        chosen = choose_preprocess(name, weights, preprocess, size)
        return Pretrained(None, trained, chosen, partial(read, trained))
    path = named_folder(weights)
    folder = read_folder(path, preprocess is None) if path.is_dir() else None
    file = path if folder is None else folder.weights
    recorded = read_record(file).get("architecture") if folder is None else folder.architecture
    if recorded is None and quick_gelu is None:
        raise ValueError(
            f"{weights} does not record its activation; say quick_gelu true or false (--quick-gelu yes or no)"
        )
    if preprocess is None and recorded is not None:
        chosen = Preprocess.read(recorded.get("preprocess_cfg"), size)
    else:
        chosen = choose_preprocess(name, None, preprocess, size)
    trained = quick_gelu if recorded is None else bool(recorded.get("quick_gelu", False))
    return Pretrained(file, trained, chosen, partial(read_state_dict, file))


def tag_quick_gelu(name: str, tag: str) -> bool:
    """Whether an open_clip tag's weights were trained with QuickGELU; works offline. ValueError: no such tag.

    An architecture that has it without saying so in its name (roberta-ViT-B-32) has no other form, whatever the tag
    records; open_clip builds it so.
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(f"{tag!r} is no weights tag of {name}; it has {tags}, or give a local file")
    native = not name.endswith(QUICK) and open_clip.get_model_config(name).get("quick_gelu", False)
    return bool(native or open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))


def _tag_state_dict(name: str, tag: str, quick_gelu: bool) -> dict[str, Tensor]:
    """The weights of an open_clip tag, from its cache or over the network."""
    import open_clip

    with downloads(f"the weights {tag!r} of {name}", LOCAL_WEIGHTS):
        return open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu).state_dict()
