"""This suite's LightningCLI: models and data by class path, run folders, hyper-parameters from checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from common.checkpoints import read_plain
from common.paths import runs_directory
from common.prediction_file import PredictionFile
from common.run_record import RunRecord

# Names for which Lightning itself finds the checkpoint.
SPECIAL_CHECKPOINTS = ("best", "last", "hpc")


class RecipeCLI(LightningCLI):
    """Parse `arguments` (`["fit", "-c", "recipe.yaml", ...]`), build model, data and trainer, and run.

    A recipe names model and data by `class_path`. Modules configure their own optimisers. Run directories go into
    `$EFFCLIP_RUNS`. Every random generator is seeded, with 0 unless the recipe gives a seed. `predict` writes a file;
    see ``PredictionFile``.

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
        """Only the subcommand that runs, since building each parser takes long."""
        name = self._arguments[0]
        return {name: LightningCLI.subcommands()[name]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Build the data before the model, so that missing data is reported before weights are downloaded."""
        super().add_core_arguments_to_parser(parser)
        parser._actions.sort(key=lambda action: action.dest == "model")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse `args`, without the base class's warning that they do not come from sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take the model arguments that the user did not give from the checkpoint's hyper-parameters.

        In the base class the checkpoint overrides even the command line. Here a model argument in a YAML file or on
        the command line keeps its value. All others, such as widths that the weights depend on, come from the
        checkpoint instead of the class's defaults.
        """
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        if not path or path in SPECIAL_CHECKPOINTS:
            return
        remembered = _hyper_parameters(path)
        typed = self.parser.parse_args(self._arguments, defaults=False)[subcommand].model
        class_path = remembered.pop("_class_path", typed.class_path)
        # Compare class names without their modules: a class may have moved since the checkpoint was written.
        if class_path.rpartition(".")[2] != typed.class_path.rpartition(".")[2]:
            rank_zero_warn(
                f"{path} was written by {class_path}, the configuration names {typed.class_path}: the "
                "checkpoint's hyper-parameters are ignored, its weights are read."
            )
            return
        given = typed.get("init_args", {})
        missing = {name: value for name, value in remembered.items() if name not in given}
        if not missing:
            return
        rank_zero_info(f"from {path}: " + ", ".join(f"{name}={value!r}" for name, value in missing.items()))
        model = {"class_path": typed.class_path, "init_args": missing}
        self.config = self.parser.parse_object({subcommand: {"model": model}}, self.config)


def _hyper_parameters(path: str) -> dict[str, Any]:
    """The model arguments recorded in the local checkpoint at `path`; {} if it records none."""
    if path.startswith(("http://", "https://")):
        raise ValueError(
            f"--ckpt_path {path} is a web address, and Lightning unpickles what it downloads, which can run "
            "code; download the file yourself and give its local path"
        )
    if "://" in path:
        return {}
    if not Path(path).exists():
        raise ValueError(f"no checkpoint at {Path(path).absolute()} (--ckpt_path {path})")
    if Path(path).is_dir():  # a sharded checkpoint; Lightning opens it
        return {}
    hyper_parameters = dict(read_plain(path).get("hyper_parameters", {}))
    hyper_parameters.pop("_instantiator", None)
    return hyper_parameters
