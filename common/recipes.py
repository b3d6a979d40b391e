"""Recipes, the YAML files of trainings: finding them, and telling a user's mistake from a fault in the code.

Nothing here imports torch, so a mistyped path is answered at once.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

PACKAGES = ("common", "waveclip", "mlip", "patchrank", "benchmarks")
"""The packages of this suite. ``PACKAGE/FILE.yaml`` names a recipe in one of them."""
_EXAMPLE = "waveclip/shapes.yaml"


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """A copy of `argv` in which the value of every `-c` and `--config` names an existing file.

    A path is looked up in the working directory first, then as `PACKAGE/FILE.yaml` in the installed packages.
    `sys.argv` does not change, because the processes that DDP starts read it again.

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


def packaged_file(path: str | Path) -> Path:
    """A path as it stands; where nothing is there, the packaged file of the same ``PACKAGE/...``, if there is one."""
    path = Path(path)
    if not path.exists() and path.parts[:1] and path.parts[0] in PACKAGES:
        packaged = _folder(path.parts[0]).joinpath(*path.parts[1:])
        return packaged if packaged.is_file() else path
    return path


def _config_path(name: str) -> str:
    found = packaged_file(name)
    if found.is_file():
        return name if found == Path(name) else str(found)
    near = get_close_matches(name, _packaged_recipes(), 1)
    mend = f"did you mean {near[0]}?" if near else f"give a local YAML file, or a packaged one such as {_EXAMPLE}"
    raise ValueError(f"no config file at {Path(name).absolute()}; {mend}")


def _packaged_recipes() -> list[str]:
    """The recipes and overlays of this suite, PACKAGE/FILE.yaml."""
    return [f"{package}/{file.name}" for package in PACKAGES for file in sorted(_folder(package).glob("*.yaml"))]


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported, which would import torch."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path(package)


def recipe_variables() -> list[str]:
    """The environment variables that packaged recipes read, as ``${NAME}``: where their data and weights are."""
    recipes = (file.read_text(encoding="utf-8") for package in PACKAGES for file in _folder(package).rglob("*.yaml"))
    return sorted({name for text in recipes for name in re.findall(r"\$\{(\w+)\}", text)})


def own_error(error: BaseException | None) -> BaseException | None:
    """The first error in the chain of causes that this suite raised, a message for the user; None: there is none.

    The parser wraps the errors of a model's or data module's constructor, so the cause may be ours.
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
    """Whether a line in one of this suite's packages raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]  # empty for a cause that was never raised
    # __spec__ instead of __name__: under `python -m common.cli` this module's __name__ is __main__.
    spec = frames[-1].f_globals.get("__spec__") if frames else None
    return spec is not None and spec.name.partition(".")[0] in PACKAGES
