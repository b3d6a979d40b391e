"""Where a run's files go, and which checkpoint it goes on from.

A run's root is ``$EFFCLIP_RUNS/RECIPE/NAME``: NAME is that of `--name`, else the SLURM job's id, which a requeue keeps.
Runs with neither share ``$EFFCLIP_RUNS/RECIPE``. In its root every start has a folder ``version_N``. A folder that
`--trainer.default_root_dir` names is a root as it stands.

No torch here: a mistake in the line is answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.paths import runs_directory
from common.recipes import PACKAGES

_FLAGS = ("--name", "--resume", "--random-weights")


@dataclass(frozen=True)
class RunOptions:
    """What a command line says of its run beside the settings.

    recipe: the first `-c`'s name, such as "waveclip-shapes"; None without a `-c`.
    name: of `--name` or `--resume`.  resume: go on with the run of that name.
    random_weights: evaluate a model that was given no weights.
    """

    recipe: str | None = None
    name: str | None = None
    resume: bool = False
    random_weights: bool = False


def take_options(argv: Sequence[str]) -> tuple[RunOptions, list[str]]:
    """The run's options, and the line without them, for Lightning.

    ValueError: a name that is no folder's, both `--name` and `--resume`, or a flag without its value.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _FLAGS:
            rest.append(word)
        elif flag == "--random-weights":
            given[flag] = "yes"
        else:
            given[flag] = value if equals else next(words, "")
    if "--name" in given and "--resume" in given:
        raise ValueError("--name begins a run and --resume goes on with one; give one of them")
    resume = "--resume" in given
    name = given.get("--resume", given.get("--name"))
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        flag = "--resume" if resume else "--name"
        raise ValueError(f"{flag} {name!r} is no name; letters, digits, dots and dashes make one, such as {flag} first")
    return RunOptions(_recipe(rest), name, resume, "--random-weights" in given), rest


def _recipe(argv: Sequence[str]) -> str | None:
    """The first configuration's name: PACKAGE-FILE for a recipe of this suite, else FILE."""
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            path = Path(value if equals else "".join(argv[place + 1 : place + 2])).absolute()
            runs = runs_directory().absolute()
            if path.name == "config.yaml" and path.is_relative_to(runs):  # a run's own record of its settings
                return path.relative_to(runs).parts[0]
            return f"{path.parent.name}-{path.stem}" if path.parent.name in PACKAGES else path.stem
    return None


def option_value(argv: Sequence[str], name: str) -> str | None:
    """The last value that a line gives an option; None where it gives none."""
    values = [word.partition("=")[2] for word in argv if word.startswith(f"{name}=")]
    values += [after for word, after in pairwise(argv) if word == name]
    return values[-1] if values else None


def job() -> str | None:
    """The id of the SLURM job that this process is a task of, ARRAY_TASK for one of an array; None outside of one.

    An interactive allocation is no job: it may start many runs.
    """
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def root(options: RunOptions, default_root_dir: str | None) -> Path:
    """The folder that a run's files stand in. ValueError: `--name` beside a root of the user's own."""
    if default_root_dir is not None:
        if options.name is not None:
            raise ValueError(
                f"--trainer.default_root_dir {default_root_dir} already says where the run's files go; leave out the "
                f"name {options.name!r}"
            )
        return Path(default_root_dir)
    name = options.name or job()
    return runs_directory() / (options.recipe or "no-recipe") / (name or "")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint below a folder that was written last."""
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def continued(subcommand: str, options: RunOptions, folder: Path, asked: str | None) -> tuple[str | None, bool]:
    """The checkpoint that a command begins with, and whether the user asked for it.

    folder: the run's root.  asked: the value of `--ckpt_path`. A requeued job asks for nothing and goes on with its own
    root's newest checkpoint.
    ValueError: no such checkpoint, or a run of that name is there already and nobody asked to go on with it.
    """
    if options.resume and asked not in (None, "last"):
        raise ValueError(f"--resume {options.name} and --ckpt_path {asked} both name a checkpoint; give one of them")
    if asked == "best":
        raise ValueError("--ckpt_path best is known only to the run itself; give the checkpoint's path, or last")
    newest = newest_checkpoint(folder)
    if options.resume or asked in ("last", "hpc"):
        if newest is None:
            raise ValueError(
                f"no checkpoint below {folder.absolute()}{_others(folder)}; a run that begins needs neither --resume "
                "nor --ckpt_path"
            )
        return str(newest), True
    if asked or newest is None or subcommand != "fit":
        return check_path(asked), True
    if job() is not None and (folder.name == job() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"):
        return str(newest), False
    if job() is not None and list(folder.glob("hpc_ckpt_*.ckpt")):  # which Lightning would take without asking
        raise ValueError(
            f"{folder.absolute()} holds another job's {newest.name}; give this run a root of its own, or "
            f"--ckpt_path {newest} to go on with that one"
        )
    if options.name is not None:
        raise ValueError(
            f"the run {options.name!r} is there already ({newest}); --resume {options.name} goes on with it, another "
            "--name begins anew"
        )
    return None, True


def _others(folder: Path) -> str:
    """The runs beside a folder that is not there, for a mistyped name."""
    beside = sorted(path.name for path in folder.parent.glob("*") if path.is_dir()) if not folder.is_dir() else []
    return f" (there are {', '.join(beside[:10])})" if beside else ""


def check_path(path: str | None) -> str | None:
    """The path of a local checkpoint, as it was given. ValueError: a web address, or nothing there."""
    if path is None or path in ("last", "hpc", "best"):
        return path
    if path.startswith(("http://", "https://")):
        raise ValueError(
            f"--ckpt_path {path} is a web address, and Lightning unpickles what it downloads, which can run "
            "code; download the file yourself and give its local path"
        )
    if "://" not in path and not Path(path).exists():
        raise ValueError(f"no checkpoint at {Path(path).absolute()} (--ckpt_path {path})")
    return path
