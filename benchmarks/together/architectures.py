"""What works on each of open_clip's architectures, tried on towers of two blocks with random weights.

Shapes: S image size, D width, L blocks.

Width, patches and picture size are the architecture's own; two of its L blocks stand for all, which are alike, and the
count adds the others. Convolutional towers are counted whole.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from torch import Tensor, nn

from benchmarks.cells import table
from common.adapters import AdaptedTower, adapt
from common.conditions import conditions
from common.flops import count_macs
from common.progress import bar
from common.reduction import ReducedTower
from patchrank.golden import golden_ranking
from patchrank.reducers import ClassAttention, ToMe
from waveclip import AdaptedWaveTower

SMALLEST = ("ViT-S-32-alt", "ViT-B-32-SigLIP2-256", "PE-Core-T-16-384", "ViTamin-S", "MobileCLIP2-S0")
"""The architectures of a smoke run, one a family."""
COLUMNS = ("load", "evaluate", "GMACs", "reduce", "golden", "wave", "export")
YES = "yes"


def run(smoke: bool = False) -> dict[str, Any]:
    """A row for each architecture. smoke: ``SMALLEST`` alone."""
    names = SMALLEST if smoke else open_clip.list_models()
    run_conditions = conditions("paper", seeds=None, open_clip=open_clip.__version__, timm=timm.__version__)
    result = {row["name"]: row for row in rows(bar(sorted(names, key=_size), "architectures"))}
    return {"name": "models", "conditions": run_conditions, "rows": [result[name] for name in names]}


def _size(name: str) -> tuple[int, str]:
    vision = open_clip.get_model_config(name)["vision_cfg"]
    return vision.get("width") or 0, vision.get("timm_model_name", "")


def rows(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The row of each architecture.

    Image towers that share their kinds of parts and differ in sizes alone share one trial, on the first of them.
    """
    trials: dict[str, dict[str, str]] = {}
    towers: dict[str, dict[str, Any]] = {}
    for name in names:
        config = open_clip.get_model_config(name)
        key = json.dumps([config["vision_cfg"], config["embed_dim"], config.get("quick_gelu", False)])
        if key not in towers:
            towers[key] = image_side(config, trials)
        text, image = text_side(name, config), dict(towers[key])
        embeds = image.pop("embeds")
        yield {"name": name, "load": text, "evaluate": embeds if text == YES else text, **image}


def text_side(name: str, config: dict[str, Any]) -> str:
    """Whether the text tower is built, tokenises and embeds without a network; what it needs if not."""
    text = config["text_cfg"]
    for key, part in (("hf_model_name", "text tower"), ("hf_tokenizer_name", "tokenizer")):
        if text.get(key):
            return f"{part} of transformers"
    with torch.device("meta"):
        tower = _build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False)).eval()
        tower.token_embedding = nn.Embedding(49_408, tower.token_embedding.embedding_dim)
    cut(tower)
    with_memory(tower)
    z = tower(open_clip.get_tokenizer(name)(["a photo of a cat"]))
    return YES if (z[0] if isinstance(z, tuple) else z).isfinite().all() else "not finite"


@torch.no_grad()
def image_side(config: dict[str, Any], trials: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The image tower's GMACs, and what works on it; a reason where something does not.

    trials: what came of those before, by the towers' kinds of parts; a new one is added.
    """
    visual = built(config)
    if _refusal(visual):
        with_memory(visual, drawn=False)
        gmacs = count_macs(visual, torch.zeros(1, 3, *2 * [config["vision_cfg"]["image_size"]])).gmacs
        cut(visual)
        if (kind := kinds(visual)) not in trials:
            trials[kind] = trial(config, visual, None)
        return {"GMACs": gmacs, **trials[kind]}
    depth = cut(visual)
    tower = adapt(visual)
    kind = f"{kinds(visual)} {tower.leading} {tower.reads_class}"
    with_memory(visual, drawn=kind not in trials)
    if kind not in trials:
        trials[kind] = trial(config, visual, tower)
    outcome = dict(trials[kind])
    if outcome["wave"] == YES:
        outcome["wave"] = wave_size(tower)
    cut(visual, 1)
    tower = adapt(visual)
    macs = count_macs(tower, torch.zeros(1, 3, tower.image_size, tower.image_size))
    return {"GMACs": macs.gmacs + (depth - 1) * macs.by_module["transformer.resblocks.0"], **outcome}


def _refusal(visual: nn.Module) -> str:
    """Why the tower is not adapted; empty if it is."""
    try:
        adapt(visual)
    except ValueError as error:
        return str(error)
    return ""


def kinds(visual: nn.Module) -> str:
    """The types of all parts of a tower, in order."""
    return " ".join(type(part).__name__ for part in visual.modules())


def trial(config: dict[str, Any], visual: nn.Module, tower: AdaptedTower | None) -> dict[str, str]:
    """What works on one tower of two blocks; tower: the same, adapted."""
    with_memory(visual, drawn=True)
    size = config["vision_cfg"]["image_size"] if tower is None else tower.image_size
    outcome = {
        "embeds": tried(lambda: embedded(visual, size)),
        "export": tried(lambda: exported(visual, torch.randn(2, 3, size, size))),
    }
    if tower is None:
        reason = "no: convolutional" if "convolutional" in _refusal(visual) else "no: windows"
        return outcome | dict.fromkeys(("reduce", "golden", "wave"), reason)
    fits = wave_size(tower)
    return outcome | {
        "reduce": reduced(tower),
        "golden": tried(lambda: ranked(tower)),
        "wave": fits if fits.startswith("no") else tried(lambda: waved(config, tower)),
    }


def built(config: dict[str, Any], image_size: int | None = None) -> nn.Module:
    """The image tower of an architecture on the meta device, in evaluation mode; image_size: another S."""
    vision = copy.deepcopy(config["vision_cfg"])
    vision["image_size"] = image_size or vision["image_size"]
    with torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
        if image_size and hasattr(visual, "set_input_size"):
            visual.set_input_size(image_size)
    return visual.eval()


def cut(model: nn.Module, blocks: int = 2) -> int:
    """Cut every stack of blocks to its first ones; returns the depth L of the last stack."""
    depth = 0
    for name, part in model.named_modules():
        if re.search(r"(^|\.)(blocks|resblocks|layer\d)$", name) and isinstance(part, nn.ModuleList | nn.Sequential):
            depth = len(part)
            del part[blocks:]
    return depth


@torch.no_grad()
def with_memory(module: nn.Module, drawn: bool = True) -> None:
    """Move a module from the meta device to the CPU. drawn: with small random weights; without, they mean nothing."""
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
        elif hasattr(part, "_init_buffers"):
            part._init_buffers()
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
        if isinstance(mask := getattr(part, "attn_mask", None), Tensor) and mask.ndim == 2:
            mask.fill_(-torch.inf).triu_(1)  # a text tower's
    for parameter in module.parameters() if drawn else ():
        parameter.uniform_(-0.05, 0.05)


def tried(work: Callable[[], bool]) -> str:
    """What came of some work: "yes", "no", or the first words of its error."""
    try:
        return YES if work() else "no"
    except Exception as error:  # exporters raise their own types
        return f"no: {str(error).splitlines()[0][:60]}"


def exported(visual: nn.Module, images: Tensor) -> bool:
    """Whether torch.export makes a graph of the image tower for any batch size."""
    torch.export.export(visual, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return True


def reduced(tower: AdaptedTower) -> str:
    """Which token reducers run: those that read features, and those that read class attention."""
    places = {(0, "middle"): ToMe(tower.grid**2 // 2), 1: ClassAttention(0.5)}
    try:
        return YES if embedded(ReducedTower(tower, places), tower.image_size) else "no"
    except ValueError:
        del places[1]
        return "without class attention" if embedded(ReducedTower(tower, places), tower.image_size) else "no"


def embedded(tower: nn.Module, size: int) -> bool:
    """Whether every embedding of a picture of noise is finite."""
    z = tower(torch.randn(1, 3, size, size))
    return all(part.isfinite().all() for part in (z if isinstance(z, tuple) else (z,)))


def ranked(tower: AdaptedTower) -> bool:
    """Whether a golden ranking of four windows before the last block has finite scores."""
    images = torch.randn(1, 3, tower.image_size, tower.image_size)
    ranking = golden_ranking(tower, images, prune_layer=1, block=tower.grid - 1)
    return bool(ranking.scores.isfinite().all())


def wave_size(tower: AdaptedTower) -> str:
    """The least size from its own on at which a WaveTower of one level may start from the tower, or why none may."""
    try:
        tower.patch_map()
    except ValueError as error:
        return "no: relative positions" if "positions" in str(error) else "no: convolutional stem"
    unit = 2 * tower.patch_size
    size = -(-tower.image_size // unit) * unit
    return YES if size == tower.image_size else f"at {size} px"


def waved(config: dict[str, Any], tower: AdaptedTower) -> bool:
    """Whether the first level of a WaveTower that starts from the tower, at ``wave_size``, embeds a picture."""
    if (at := wave_size(tower)) != YES:
        larger = built(config, int(at.split()[1]))  # ValueError where no size may
        cut(larger)
        with_memory(larger)
        tower = adapt(larger)
    wave = AdaptedWaveTower.from_image_tower(tower)
    return bool(wave.begin(torch.randn(1, 3, tower.image_size, tower.image_size))[0].isfinite().all())


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The Markdown table, and below it how many architectures each column says yes to, and why not the others."""
    cells = [
        [row["name"], *(f"{row[key]:.4g}" if key == "GMACs" else row[key] for key in COLUMNS)] for row in result["rows"]
    ]
    left = [0, *(1 + index for index, key in enumerate(COLUMNS) if key != "GMACs")]
    parts = [table(["architecture", *COLUMNS], cells, left), totals(result["rows"])]
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def totals(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line: of each column how many rows say yes, and how many say each other thing."""
    counted = []
    for key in (key for key in COLUMNS if key != "GMACs"):
        said = Counter(row[key] for row in rows)
        others = [f"{number} {text}" for text, number in said.most_common() if text != "yes"]
        counted.append(f"{key} {said['yes']}" + (f" ({', '.join(others)})" if others else ""))
    return f"Of {len(rows)} architectures: {'; '.join(counted)}."
