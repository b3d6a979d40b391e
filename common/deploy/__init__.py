"""Deployment: load a model, classify, calibrate, convert and export it, and check an installation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.deploy.model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import ``load`` on first use, because the commands of this package answer a mistake before they import torch."""
    if name == "load":
        from common.deploy.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
