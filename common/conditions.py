"""The conditions under which a result was made: code revision, machine, library versions, hashes of weights."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.inference import BF16_PRODUCTS

_ROOT = Path(__file__).parent.parent
_OUTPUTS = (":!*/results/*", ":!*/weights/*")


def conditions(scale: str, **others: Any) -> dict[str, Any]:
    """The conditions of a run that starts now.

    scale: "paper", "embedded" or "own data".  others: seeds, dtype, batch, and everything else that the run depends on.
    "device" is a GPU's name, or a CPU's kind with the vector instructions that its times and rounding depend on.
    "revision" is None outside a git checkout. "clean" means that no tracked file differs from the revision, except
    for results and weights, which a run writes itself.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_OUTPUTS)
    return {
        "scale": scale,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _git("rev-parse", "HEAD"),
        "clean": None if changes is None else not changes,
        "torch": str(torch.__version__),  # plain: checkpoints hold it too
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        **others,
    }


def _cpu() -> str:
    """Such as "x86_64 CPU (AVX512, bf16 products)"."""
    instructions = torch.backends.cpu.get_cpu_capability() + ", bf16 products" * BF16_PRODUCTS
    return f"{platform.machine()} CPU ({instructions})"


def digest(path: str | Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def state_digest(module: nn.Module, salt: str) -> str:
    """16 hex digits that change with any weight, any name in the state dict, and ``salt``."""
    result = hashlib.sha256(salt.encode())
    for key, value in sorted(module.state_dict().items()):
        result.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
