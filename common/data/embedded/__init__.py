"""The embedded benchmark: Twemoji pictures with captions, drawn by code, read like any other shards."""

from common.data.embedded.module import EmbeddedDataModule

__all__ = ["EmbeddedDataModule"]
