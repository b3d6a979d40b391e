"""The `lightning` command, also installed as `effclip` and run by `python -m common.cli`.

Lightning ships LightningCLI but no command of that name, so this package does. The subcommand is decided
before torch is imported, so that a mistyped command or path is answered at once. Another distribution may
own a `lightning` command too (the cloud client does); what is not ours to run is handed to it.
"""

import importlib
import importlib.metadata
import importlib.resources
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("common", "waveclip", "mlip", "patchrank", "benchmarks")
SUBCOMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {name: f"common.{name}" for name in ("evaluate", "classify", "calibrate", "convert", "export", "doctor")}
"""Our own commands beside Lightning's, each a module with ``main(arguments) -> exit code``."""
SIGTERM_EXIT_CODE = 128 + 15

USAGE = """\
usage: lightning {fit,validate,test,predict} -c FILE.yaml [-c OVERLAY.yaml ...] [--KEY VALUE ...]
       effclip evaluate --model FILE --data NAME [--tasks TASK,...]
       effclip classify PICTURES ... [--labels "cat,dog"] [--gmacs BUDGET | --threshold T] [--out FILE]
       effclip calibrate --data NAME (--gmacs BUDGET | --accuracy TARGET)
       effclip convert CKPT DIR
       effclip export DIR --format {onnx,torch-export,open-clip}
       effclip doctor

  -c FILE.yaml        a recipe, or changes to the recipes before it; a packaged one is found from any
                      directory by its name, such as waveclip/embedded.yaml
  --KEY VALUE         one changed setting, such as --trainer.max_steps 100 or --model.init_args.NAME VALUE
  --print_config      print the whole configuration and stop
  --ckpt_path FILE    continue from, or evaluate, a checkpoint; what the recipe or the command line says
                      wins over what the checkpoint remembers
  --help              after any of these: all settings

predict writes predictions.npz (every picture's key and embedding) into the run's folder

environment: EFFCLIP_RUNS (folder of run directories, default runs), EFFCLIP_DEBUG=1 (tracebacks)"""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return its exit code.

    0 done, 1 a ValueError raised by this suite (printed as one message), 2 wrong usage, 143 stopped by
    SIGTERM. Any other exception, and the SystemExit of `--help` or of a rejected setting, passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in SUBCOMMANDS:
        return _answered(lambda: _train(argv), "lightning")
    if argv[:1] and argv[0] in COMMANDS:
        return _answered(lambda: importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]), f"effclip {argv[0]}")
    if argv[:1] and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    other = _other_lightning()
    if other is not None:
        return other.load()()
    said = f"no subcommand {argv[0]!r}; it comes first on the line" if argv else "a subcommand is missing"
    print(f"{USAGE}\n\nlightning: error: {said}", file=sys.stderr)
    return 2


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


def _other_lightning() -> importlib.metadata.EntryPoint | None:
    """The `lightning` console script that another installed distribution declares, if there is one."""
    scripts = importlib.metadata.entry_points(group="console_scripts", name="lightning")
    return next((script for script in scripts if script.value != "common.cli:main"), None)


def _answered(call: Callable[[], int], name: str) -> int:
    """The exit code of ``call``; a ValueError of this suite becomes one line, after the command's name, and 1."""
    try:
        return call()
    except ValueError as error:
        ours = own_error(error)
        if os.environ.get("EFFCLIP_DEBUG") or ours is None:
            raise
        print(f"{name}: error: {ours}", file=sys.stderr)
        return 1


def _train(argv: list[str]) -> int:
    arguments = resolve_configs(argv)
    # A console script does not see the working directory; appended, so that it can shadow nothing.
    sys.path.append(os.getcwd())
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from common.lightning_cli import RecipeCLI

    try:
        RecipeCLI(arguments)
    except SIGTERMException:
        # Lightning stops in good order and would report success; a scheduler must see that it was stopped.
        return SIGTERM_EXIT_CODE
    return 0


def own_error(error: BaseException | None) -> BaseException | None:
    """The error, or the one it was raised from, that this suite raised as a message for the user; None: neither.

    The parser wraps what a constructor of model or data says.
    """
    while error is not None and not _raised_here(error):
        error = error.__cause__
    return error


def _raised_here(error: BaseException) -> bool:
    """Whether the line that raised stands in one of this suite's packages: a message meant for the user."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]  # none for a cause that was only stated
    # __spec__, not __name__: under `python -m common.cli` this module's __name__ is __main__.
    spec = frames[-1].f_globals.get("__spec__") if frames else None
    return spec is not None and spec.name.partition(".")[0] in PACKAGES


if __name__ == "__main__":
    sys.exit(main())
