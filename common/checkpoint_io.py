"""How checkpoints reach the disk: whole or not at all, two at a time, and never with weights that are not finite."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from common.checkpoints import read_plain

_log = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def first_non_finite(state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor of a state dict that holds NaN or +inf; None: all are finite.

    -inf passes: attention masks are made of it.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not bool((torch.isfinite(value) | torch.isneginf(value)).all()):
            return name
    return None


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints beside their place, syncs them, and renames them into it.

    The file that a new one replaces stays as ``NAME-previous.ckpt``; a file that Lightning removes goes once two
    others stand in its folder, unless the one that takes its place could not be written. A save that fails warns,
    leaves what was there, and lets the run go on: ``saved`` and ``failed`` count them, ``failing`` says that the last
    one failed. Remote paths are left to Lightning.
    """

    def __init__(self) -> None:
        self.saved, self.failed, self.failing = 0, 0, False
        self._superseded: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or warn why it could not be written."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        wrong = first_non_finite(checkpoint.get("state_dict", {}))
        try:
            if wrong is not None:
                raise ValueError(f"the weights {wrong} are not finite")
            _write(checkpoint, target)
        except (OSError, RuntimeError, ValueError) as error:
            self.failed, self.failing = self.failed + 1, True
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            _log.warning("no checkpoint at %s: %s; the run goes on and tries again", target, reason)
            return None
        self.saved, self.failing = self.saved + 1, False
        self._remove_superseded()
        return None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The tensors and plain values of a checkpoint. ValueError: none there, damaged, or more than plain values."""
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_plain(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, as soon as two others stand in its folder; never for one that could not be written."""
        if "://" in str(path) or Path(path).is_dir():
            return super().remove_checkpoint(path)
        if self.failing:
            return None
        self._superseded.append(Path(path))
        return self._remove_superseded()

    def _remove_superseded(self) -> None:
        for path in list(self._superseded):
            if len(set(path.parent.glob("*.ckpt")) - {path}) >= 2:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                self._superseded.remove(path)


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    """Write beside ``target``, then rename; where the disk is too full for three files, the oldest goes first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part, previous = target.with_name(f".{target.name}.part"), target.with_stem(f"{target.stem}-previous")
    try:
        try:
            _save_synced(checkpoint, part)
        except OSError as error:
            if error.errno not in _NO_ROOM or not (previous.is_file() and target.is_file()):
                raise
            previous.unlink()
            _save_synced(checkpoint, part)
        if target.is_file():
            _second_name(target, previous)
        part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    _sync(target.parent)


def _save_synced(checkpoint: dict[str, Any], file: Path) -> None:
    with open(file, "wb") as stream:
        try:
            torch.save(checkpoint, stream)
        except RuntimeError as error:  # the archive's writer hides what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        stream.flush()
        os.fsync(stream.fileno())


def _second_name(target: Path, previous: Path) -> None:
    """Keep ``target`` as ``previous`` too: a link, so that its own name never goes; a rename where there are none."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(target)
    except OSError:
        target.replace(previous)


def _sync(folder: Path) -> None:
    """Make a rename in a folder last through a power cut, where the system knows how."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
