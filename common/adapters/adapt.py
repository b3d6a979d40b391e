"""``adapt``: from a model of this suite or another library to its image tower."""

from __future__ import annotations

from torch import nn

from common.adapters.tower import AdaptedTower
from common.tower import ImageTower

_REASONS = {
    "ModifiedResNet": "a ResNet is convolutional",
    "ConvNeXt": "a ConvNeXt is convolutional",
    "FastVit": "a FastViT is convolutional in all stages but the last",
    "SwinTransformer": "a Swin attends in windows of a fixed grid",
}


def adapt(model: nn.Module) -> ImageTower | AdaptedTower:
    """The image tower of a model, with ``embed``, ``run_blocks`` and ``pool``, for reducers, costs and rankings.

    model: a CLIP of this suite, of open_clip or of transformers; or the image tower of one; or a timm trunk. The
        tower shares its modules and weights. Of a tower that prunes: the ``whole_tower`` that it prunes.
    A tower of this suite is returned as it is.
    ValueError: an architecture without a fixed sequence of tokens, or with a part that is not adapted.
    """
    projection = getattr(model, "visual_projection", None)
    if hasattr(model, "whole_tower"):
        model = model.whole_tower()
    for name in ("image_tower", "visual", "vision_model"):
        model = getattr(model, name, model)
    if isinstance(model, ImageTower | AdaptedTower):
        return model
    library = type(model).__module__.partition(".")[0]
    trunk, head = (model.trunk, model.head) if type(model).__name__ == "TimmModel" else (model, None)
    if library == "open_clip" and type(model).__name__ == "VisionTransformer":
        from common.adapters.open_clip_vit import OpenClipTower

        return OpenClipTower(model)
    if type(trunk).__module__.startswith("timm."):
        from common.adapters.timm_vit import KINDS, TimmTower

        if isinstance(trunk, tuple(KINDS)):
            return TimmTower(trunk, head)
    kind = type(trunk).__name__
    if library == "transformers":
        from common.adapters import transformers_vit

        if kind in transformers_vit.KINDS:
            return transformers_vit.TransformersTower(model, projection)
    reason = _REASONS.get(kind, "it is none of the vision transformers that are adapted")
    raise ValueError(
        f"{kind} has no sequence of patch tokens that a reducer could shorten: {reason}; choose a ViT architecture"
    )
