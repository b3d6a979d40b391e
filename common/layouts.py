"""The names that other programs give a CLIP's weights -> open_clip's.

Shapes: D width, E joint dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIXES = ("module.", "model.", "clip.")
_COMPILED = "_orig_mod."
"""What torch.compile puts into the names, at any depth."""

_BLOCK_OF_TRANSFORMERS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TRANSFORMERS = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # transformers' own spelling
    "vision_model.post_layernorm": "visual.ln_post",
}
_BLOCK_OF_TIMM = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TIMM = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.weight": "conv1.weight",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
}
_TRANSPOSED = ("text_projection", "visual.proj")
"""Linear maps of transformers [E,D] that are matrices [D,E] in open_clip."""


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers put before the names, and of transformers' CLIPModel in open_clip's names.

    Wrappers: ``_orig_mod.`` anywhere, and ``module.``, ``model.`` or ``clip.`` where all names begin with it.
    Names that are in neither form stay as they are.
    """
    state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return _of_transformers(state) if any(key.startswith(("text_model.", "vision_model.")) for key in state) else state


def _of_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)", key)
        if block is None:
            if not key.endswith(".position_ids"):  # older versions store 0, 1, 2, ...
                new = _renamed(key, _TRANSFORMERS)
                renamed[new] = value.T if new in _TRANSPOSED else value
            continue
        side, layer, name = block.groups()
        place = f"{'visual.' if side == 'vision' else ''}transformer.resblocks.{layer}."
        part = re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", name)
        if part is not None:
            names = (key.replace("q_proj", f"{letter}_proj") for letter in "qkv")
            renamed[f"{place}attn.in_proj_{part[1]}"] = torch.cat([state[other] for other in names if other in state])
        elif not name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            renamed[place + _renamed(name, _BLOCK_OF_TRANSFORMERS)] = value
    return renamed


def of_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a plain ViT, bare or below ``visual.trunk.``, -> open_clip's; other names stay as they are."""
    prefix = "" if "patch_embed.proj.weight" in state else "visual.trunk."
    if prefix and not any(key.startswith(prefix) for key in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix).removeprefix("visual.")
        if prefix and not key.startswith("visual."):
            renamed[key] = value
            continue
        if name in ("head.bias", "head.proj.bias") and not value.any():
            continue  # timm adds a bias of zeros to the projection, which has none in a CLIP
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is not None:
            name = f"transformer.resblocks.{block[1]}.{_renamed(block[2], _BLOCK_OF_TIMM)}"
        elif name in ("cls_token", "pos_embed"):
            name, value = _TIMM[name], value[0] if name == "pos_embed" else value.flatten()
        elif name in ("head.weight", "head.proj.weight"):
            name, value = "proj", value.T
        renamed[f"visual.{_renamed(name, _TIMM)}"] = value
    return renamed


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """``key`` with the name, or the first parts of it, that ``names`` translates."""
    if key in names:
        return names[key]
    parts, _, last = key.rpartition(".")
    return f"{names[parts]}.{last}" if parts in names else key
