"""The `lightning` command, also installed as `effclip` and run by `python -m common.cli`.

Lightning ships LightningCLI but no command of that name, so this package does. The subcommand is decided
before torch is imported, so that a mistyped command or path is answered at once. Another distribution may
own a `lightning` command too (the cloud client does); what is not ours to run is handed to it.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from common.recipes import own_error, resolve_configs
from common.run_folder import take_options

SUBCOMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {
    "evaluate": "common.evaluate.command",
    **{name: f"common.deploy.{name}" for name in ("classify", "calibrate", "convert", "export", "doctor")},
}
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
    options, arguments = take_options(resolve_configs(argv))
    # A console script does not see the working directory; appended, so that it can shadow nothing.
    sys.path.append(os.getcwd())
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from common.lightning_cli import RecipeCLI

    try:
        RecipeCLI(arguments, options)
    except SIGTERMException:
        # Lightning stops in good order and would report success; a scheduler must see that it was stopped.
        return SIGTERM_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
