"""What an engineer uses: load a model, classify, calibrate, convert and export it, look at an installation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.deploy.model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """``load`` on first use: the commands in this package answer a mistake before torch is imported."""
    if name == "load":
        from common.deploy.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
