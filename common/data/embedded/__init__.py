"""The embedded benchmark: Twemoji pictures with captions, drawn by code, read like any other shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.data.embedded.module import EmbeddedDataModule

__all__ = ["EmbeddedDataModule"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use: it needs Lightning, which takes seconds, and the scenes do not."""
    if name == "EmbeddedDataModule":
        from common.data.embedded.module import EmbeddedDataModule

        return EmbeddedDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
