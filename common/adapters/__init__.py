"""Image towers of open_clip, timm and transformers under one protocol, so that every reducer runs on them."""

from common.adapters.adapt import adapt
from common.adapters.tower import AdaptedBlock, AdaptedTower, PatchMap

__all__ = ["AdaptedBlock", "AdaptedTower", "PatchMap", "adapt"]
