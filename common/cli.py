"""The `lightning` command, also installed as `effclip` and run by `python -m common.cli`.

Lightning has LightningCLI but no command of that name, so this package installs one. It reads the subcommand
before it imports torch, so that a mistyped command or path is answered at once. Another package may install a
`lightning` command too (the cloud client does). Subcommands that are not ours go to that one.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from common.errors import leave_closed_pipe, sentence
from common.recipes import own_error, resolve_configs
from common.run_folder import check_path, option_value, take_options

SUBCOMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {
    "evaluate": "common.evaluate.command",
    "sweep": "common.evaluate.sweep.command",
    **{name: f"common.deploy.{name}" for name in ("classify", "calibrate", "convert", "export", "doctor")},
    **{name: f"common.deploy.{name}" for name in ("models", "datasets")},
}
"""Our commands besides Lightning's. Each is a module with ``main(arguments) -> exit code``."""
SIGTERM_EXIT_CODE, INTERRUPTED_EXIT_CODE = 128 + 15, 128 + 2

USAGE = """\
usage: lightning {fit,validate,test,predict} -c FILE.yaml [-c OVERLAY.yaml ...] [--KEY VALUE ...]
       effclip evaluate --model FILE --data NAME [--tasks TASK,...] [--reducer NAME --keep RATE]
       effclip sweep --model FILE --data NAME [--reducers NAME,...] [--keep 0.9..0.3] [--budget GMACS]
       effclip classify PICTURES ... [--labels "cat,dog"] [--gmacs BUDGET | --threshold T] [--out FILE]
       effclip calibrate --data NAME (--gmacs BUDGET | --accuracy TARGET)
       effclip convert CKPT DIR
       effclip export DIR --format {onnx,torch-export,open-clip}
       effclip models [WORD] | datasets | doctor | --version

  -c FILE.yaml        a recipe, or changes to the recipes before it; a packaged one is found from any
                      directory by its name, such as waveclip/shapes.yaml
  --KEY VALUE         one changed setting, such as --trainer.max_steps 100 or --model.init_args.NAME VALUE
  --print_config      print the whole configuration and stop
  --ckpt_path FILE    continue from, or evaluate, a checkpoint (last: the newest of this recipe); what the recipe
                      or the command line says wins over what the checkpoint remembers
  --name NAME         the run's folder is $EFFCLIP_RUNS/RECIPE/NAME; --resume NAME goes on with that run
  --random-weights    evaluate without --ckpt_path a model that was given no weights
  --help              after any of these: all settings

predict writes predictions.npz (every picture's key and embedding) into the run's folder

A recipe may name any importable class: run only recipes that you trust, as you would a program.

environment: EFFCLIP_RUNS (folder of run directories, default runs), EFFCLIP_DEBUG=1 (tracebacks)"""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return its exit code.

    0 done, 1 something that a user can mend (printed as one sentence), 2 wrong usage, 130 Ctrl-C, 141 the reader of a
    pipe went away, 143 stopped by SIGTERM. Any other exception, and the SystemExit of `--help` or of a rejected
    setting, passes through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in SUBCOMMANDS:
        return _answered(lambda: _train(argv), "lightning")
    if argv[:1] and argv[0] in COMMANDS:
        return _answered(lambda: importlib.import_module(COMMANDS[argv[0]]).main(argv[1:]), f"effclip {argv[0]}")
    if argv[:1] and argv[0] in ("-h", "--help"):
        return _answered(lambda: print(USAGE) or 0, "effclip")
    if argv[:1] == ["--version"]:
        return _answered(lambda: print(f"efficient-clip {_version()}") or 0, "effclip")
    other = _other_lightning()
    if other is not None:
        return other.load()()
    program = "effclip" if Path(sys.argv[0]).stem == "effclip" else "lightning"
    usage = "" if argv else f"{USAGE}\n\n"
    print(f"{usage}{program}: error: {_unknown(argv)}", file=sys.stderr)
    return 2


def _unknown(argv: list[str]) -> str:
    """What is wrong with a line that no subcommand begins."""
    if not argv:
        return "a subcommand is missing"
    near = get_close_matches(argv[0], (*SUBCOMMANDS, *COMMANDS), 1)
    if near:
        return f"no subcommand {argv[0]!r}; did you mean {near[0]}?"
    names = ", ".join((*SUBCOMMANDS, *COMMANDS))
    return f"no subcommand {argv[0]!r}; it comes first on the line, and is one of {names}"


def _version() -> str:
    try:
        return importlib.metadata.version("efficient-clip")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed (pip install -e .)"


def _other_lightning() -> importlib.metadata.EntryPoint | None:
    """The `lightning` console script of another installed package, if there is one."""
    scripts = importlib.metadata.entry_points(group="console_scripts", name="lightning")
    return next((script for script in scripts if script.value != "common.cli:main"), None)


def _answered(call: Callable[[], int], name: str) -> int:
    """The exit code of ``call``; what went wrong that a user can mend becomes one line, after the command's name."""
    try:
        code = call()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return leave_closed_pipe()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        text = own_error(error) if isinstance(error, ValueError) else None
        text = text or sentence(error)
        if os.environ.get("EFFCLIP_DEBUG") or text is None:
            raise
        print(f"{name}: error: {text}", file=sys.stderr)
        return 1


def _check_recipe(argv: Sequence[str]) -> None:
    """ValueError: a line names neither a recipe nor a model of its own, and asks for no help."""
    words = [word.partition("=")[0] for word in argv[1:]]
    asked = ("--config", "-h", "--help", "--print_config")
    if not any(word in asked or word.startswith(("-c", "--model")) or word.endswith(".help") for word in words):
        raise ValueError(f"{argv[0]} needs a recipe: -c FILE.yaml, such as -c common/shapes_clip.yaml")


def _train(argv: list[str]) -> int:
    options, arguments = take_options(resolve_configs(argv))
    _check_recipe(arguments)
    check_path(option_value(arguments, "--ckpt_path"))
    # A console script does not see the working directory. It goes last, so that it shadows no package.
    sys.path.append(os.getcwd())
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from common.lightning_cli import RecipeCLI

    try:
        RecipeCLI(arguments, options)
    except SIGTERMException:
        # Lightning stops cleanly and would report success, but a scheduler must see that the run was stopped.
        return SIGTERM_EXIT_CODE
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's own answer to Ctrl-C has code 1
            raise stop.__context__ from None
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
