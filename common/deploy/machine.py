"""What `effclip doctor` asks of the machine around this installation: disks, and packages that hide ours.

Every answer is (what was looked at, what was found, the mend or None).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from common.paths import runs_directory
from common.recipes import PACKAGES

Answer = tuple[str, str, str | None]
_ROOT = Path(__file__).resolve().parents[2]
_LITTLE = 2**30
"""Bytes below which a disk counts as full: a checkpoint of ViT-B/16 with its optimiser has more."""


def surroundings() -> Iterator[Answer]:
    """Everything, in turn."""
    yield room("runs", runs_directory(), "EFFCLIP_RUNS")
    yield room("temporary files", Path(os.environ.get("TMPDIR") or _default_temporary()), "TMPDIR")
    yield from hidden_packages()
    yield lightning_owner()


def _default_temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # no folder that Python tries can be written to
        return "/tmp"


def room(what: str, folder: Path, variable: str) -> Answer:
    """Whether a folder, or the one that it would be made in, takes files."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    mend = f"set {variable} to a folder that takes files"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"1")
    except OSError as error:
        return what, f"{folder}: {error.strerror}", mend
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / 2**30:,.1f} GiB free"
    return what, found, f"make room there, or {mend}" if free < _LITTLE else None


def hidden_packages() -> Iterator[Answer]:
    """Packages of other distributions or of the working directory that Python finds instead of ours."""
    places = {name: _place(importlib.util.find_spec(name)) for name in PACKAGES}
    if (_ROOT / "tests" / "__init__.py").is_file():
        # pytest looks in the checkout before site-packages, where some distribution may have left its own tests.
        earlier = [entry for entry in sys.path if Path(entry).name not in ("site-packages", "dist-packages")]
        places["tests"] = _place(PathFinder.find_spec("tests", earlier)) or _ROOT
    for name, place in places.items():
        if place != _ROOT:
            mend = f"run from {_ROOT}, or remove the other package from this environment or PYTHONPATH"
            yield f"package {name}", f"{place or 'none'} hides {_ROOT / name}", mend


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder in which a package lies."""
    return Path(spec.origin).resolve().parent.parent if spec and spec.origin else None


def lightning_owner() -> Answer:
    """Whether `import lightning` finds the package that this suite needs."""
    what = "lightning package"
    spec = importlib.util.find_spec("lightning")
    try:
        installed = importlib.metadata.distribution("lightning")
    except importlib.metadata.PackageNotFoundError:
        return what, "not installed", "pip install 'lightning>=2.6.6'"
    expected = Path(str(installed.locate_file("lightning/__init__.py"))).resolve()
    origin = Path(spec.origin).resolve() if spec and spec.origin else None
    if origin != expected:
        return what, f"{origin or 'a folder without __init__.py'} hides {expected}", "rename or remove the other one"
    return what, f"{installed.version} at {expected.parent}", None
