"""LightningCLI as this suite uses it: models and data by class path, run folder, checkpoint precedence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from common.checkpoints import read_plain
from common.paths import runs_directory
from common.prediction_file import PredictionFile
from common.run_record import RunRecord

# The names by which Lightning finds a checkpoint itself.
SPECIAL_CHECKPOINTS = ("best", "last", "hpc")


class RecipeCLI(LightningCLI):
    """Parse `arguments` (`["fit", "-c", "recipe.yaml", ...]`), build model, data and trainer, and run.

    Model and data are named by `class_path`; modules configure their own optimisers; run directories stand
    in `$EFFCLIP_RUNS`; every random generator is seeded, by 0 when the recipe does not say otherwise. `predict`
    writes a file; see ``PredictionFile``.

    Raises:
        ValueError: `--ckpt_path` is a web address, is missing, or is not a plain checkpoint.
        SystemExit: a setting was rejected, with code 2 and its name on stderr.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": str(runs_directory()), "callbacks": [PredictionFile()]},
            args=self._arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The one that runs; the parsers of the others would take as long again each."""
        name = self._arguments[0]
        return {name: LightningCLI.subcommands()[name]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data be built before the model: missing data is said before weights are fetched."""
        super().add_core_arguments_to_parser(parser)
        parser._actions.sort(key=lambda action: action.dest == "model")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse `args`, which always come from `main`, without the base class's warning about sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Fill what the user left unsaid about the model from the checkpoint's hyper-parameters.

        The base class lets the checkpoint override even the command line. Here a top-level argument of the
        model that stands in a YAML file or on the command line keeps that value; the others, such as widths
        that the weights depend on, come from the checkpoint instead of the class's defaults.
        """
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        if not path or path in SPECIAL_CHECKPOINTS:
            return
        remembered = _hyper_parameters(path)
        typed = self.parser.parse_args(self._arguments, defaults=False)[subcommand].model
        class_path = remembered.pop("_class_path", typed.class_path)
        # Names alone: a class may have moved to another module since.
        if class_path.rpartition(".")[2] != typed.class_path.rpartition(".")[2]:
            rank_zero_warn(
                f"{path} was written by {class_path}, the configuration names {typed.class_path}: the "
                "checkpoint's hyper-parameters are ignored, its weights are read."
            )
            return
        said = typed.get("init_args", {})
        unsaid = {name: value for name, value in remembered.items() if name not in said}
        if not unsaid:
            return
        rank_zero_info(f"from {path}: " + ", ".join(f"{name}={value!r}" for name, value in unsaid.items()))
        model = {"class_path": typed.class_path, "init_args": unsaid}
        self.config = self.parser.parse_object({subcommand: {"model": model}}, self.config)


def _hyper_parameters(path: str) -> dict[str, Any]:
    """The model arguments that the local checkpoint at `path` remembers; empty where it has none."""
    if path.startswith(("http://", "https://")):
        raise ValueError(
            f"--ckpt_path {path} is a web address, and Lightning unpickles what it downloads, which can run "
            "code; download the file yourself and give its local path"
        )
    if "://" in path:
        return {}
    if not Path(path).exists():
        raise ValueError(f"no checkpoint at {Path(path).absolute()} (--ckpt_path {path})")
    if Path(path).is_dir():  # a sharded checkpoint, which Lightning opens itself
        return {}
    hyper_parameters = dict(read_plain(path).get("hyper_parameters", {}))
    hyper_parameters.pop("_instantiator", None)
    return hyper_parameters
