"""Recipes, the YAML files of a training: where they are found, and whose fault an error in one is.

No torch here: a mistyped path is answered at once.
"""

from __future__ import annotations

import importlib.resources
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("common", "waveclip", "mlip", "patchrank", "benchmarks")
"""The packages of this suite, whose recipes are found by ``PACKAGE/FILE.yaml``."""


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """A copy of `argv` in which the value of every `-c` and `--config` names an existing file.

    A path is taken from the working directory first, then as `PACKAGE/FILE.yaml` inside the installed
    packages. `sys.argv` stays as it was: the processes that DDP starts read it again.

    Raises:
        ValueError: there is no such file.
    """
    resolved = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag not in ("-c", "--config"):
            continue
        if equals:
            resolved[i] = f"{flag}={_config_path(value)}"
        elif i + 1 < len(argv):
            resolved[i + 1] = _config_path(argv[i + 1])
    return resolved


def _config_path(name: str) -> str:
    if Path(name).is_file():
        return name
    package = Path(name).parts[:1]
    if package and package[0] in PACKAGES:
        packaged = importlib.resources.files(package[0]).joinpath(*Path(name).parts[1:])
        if packaged.is_file():
            return str(packaged)
    raise ValueError(
        f"no config file at {Path(name).absolute()}; give a local YAML file, or a packaged one such as "
        "waveclip/embedded.yaml"
    )


def own_error(error: BaseException | None) -> BaseException | None:
    """The error, or the one it was raised from, that this suite raised as a message for the user; None: neither.

    The parser wraps what a constructor of model or data says.
    """
    while error is not None and not _raised_here(error):
        message = _worker_message(str(error))
        if message is not None:
            return ValueError(message)
        error = error.__cause__
    return error


def _worker_message(text: str) -> str | None:
    """The message of a ValueError that this suite raised in a DataLoader's worker; torch wraps it in a traceback."""
    files = re.findall(r'^\s*File "(.+?)"', text, re.MULTILINE)
    if not text.startswith("Caught ValueError in DataLoader worker process") or not files:
        return None
    ours = Path(files[-1]).is_relative_to(Path(__file__).parent.parent)
    return text.rpartition("\nValueError: ")[2].strip() if ours else None


def _raised_here(error: BaseException) -> bool:
    """Whether the line that raised stands in one of this suite's packages: a message meant for the user."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]  # none for a cause that was only stated
    # __spec__, not __name__: under `python -m common.cli` this module's __name__ is __main__.
    spec = frames[-1].f_globals.get("__spec__") if frames else None
    return spec is not None and spec.name.partition(".")[0] in PACKAGES
