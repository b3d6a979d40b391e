"""This suite's LightningCLI: models and data by class path, run folders, checkpoints, and what every run is given."""

import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from common import run_folder
from common.checkpoint_io import SafeCheckpointIO
from common.checkpoints import read_plain
from common.dev_run import DevRun, fit_validation
from common.exact_resume import ExactResume
from common.finite import StopOnNonFinite
from common.inference import BF16_PRODUCTS
from common.keep_work import KeepWork
from common.optim import OptimizerName, refuse_another
from common.prediction_file import PredictionFile
from common.progress_bar import RunProgress
from common.run_folder import RunOptions
from common.run_log import RunLogger
from common.run_record import RunRecord
from common.run_report import Sizes, closing_lines, quiet
from common.settings import differences
from common.throughput import Throughput

ALWAYS = (PredictionFile, DevRun, ExactResume, StopOnNonFinite, Throughput, KeepWork)
"""The callbacks that every run gets; one that a recipe lists itself, with its settings, is not added again."""


class RecipeCLI(LightningCLI):
    """Parse `arguments` (`["fit", "-c", "recipe.yaml", ...]`), build model, data and trainer, and run.

    A recipe names model and data by `class_path`. Modules configure their own optimisers. Every random generator is
    seeded, with 0 unless the recipe gives a seed. Every run gets the callbacks ``ALWAYS`` and ``SafeCheckpointIO``.

    options: what the command line says of the run; see ``common.run_folder``.

    Raises:
        ValueError: `--ckpt_path` is a web address, is missing, or is not a plain checkpoint; a requeued job's
            checkpoint is another run's; `validate`, `test` or `predict` was given no weights; no checkpoint could be
            written.
        SystemExit: a setting was rejected, with code 2 and its name on stderr.
    """

    def __init__(self, arguments: Sequence[str], options: RunOptions | None = None) -> None:
        self._arguments, self.options = list(arguments), options or RunOptions()
        self.checkpoint_io = SafeCheckpointIO()
        quiet()
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=self._arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the subcommand that runs, since building each parser takes long."""
        name = self._arguments[0]
        return {name: LightningCLI.subcommands()[name]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, which answers an unknown setting of model or data in one line."""
        parser = super().init_parser(**kwargs)
        parser.error = partial(_refuse, parser.error)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Build the data before the model, so that missing data is reported before weights are downloaded."""
        super().add_core_arguments_to_parser(parser)
        parser._actions.sort(key=lambda action: action.dest == "model")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse `args`, without the base class's warning that they do not come from sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Find the run's root and its checkpoint; take model arguments that the user did not give from the latter.

        In the base class the checkpoint overrides even the command line. Here a model argument in a YAML file or on
        the command line keeps its value. All others, such as widths that the weights depend on, come from the
        checkpoint instead of the class's defaults.
        """
        subcommand = self.config.subcommand
        settings = self.config[subcommand]
        self.root = run_folder.root(self.options, settings.trainer.default_root_dir)
        typed_path = settings.get("ckpt_path")
        path, asked = run_folder.continued(subcommand, self.options, self.root, typed_path)
        settings.ckpt_path = path
        if path is None:
            if subcommand != "fit" and not self.options.random_weights:
                _need_weights(subcommand, settings.model)
            return
        if path != typed_path:
            rank_zero_info(f"goes on from {path}" if subcommand == "fit" else f"weights of {path}")
        checkpoint = {} if "://" in path or Path(path).is_dir() else read_plain(path)
        self._take_arguments(path, checkpoint.get("hyper_parameters", {}))
        if not asked:
            self._refuse_another_run(path, checkpoint)
        # Before the run has a folder, where it would leave a checkpoint of the wrong optimiser.
        optimizer = self.config[subcommand].model.get("init_args", {}).get("optimizer")
        if subcommand == "fit" and optimizer in get_args(OptimizerName):
            for state in checkpoint.get("optimizer_states", ()):
                refuse_another(state, optimizer)

    def _take_arguments(self, path: str, remembered: dict[str, Any]) -> None:
        """Fill the model's arguments from those that a checkpoint remembers."""
        subcommand = self.config.subcommand
        remembered = {name: value for name, value in remembered.items() if name != "_instantiator"}
        typed = self.parser.parse_args(self._arguments, defaults=False)[subcommand].model
        class_path = remembered.pop("_class_path", typed.class_path)
        # Compare class names without their modules: a class may have moved since the checkpoint was written.
        if class_path.rpartition(".")[2] != typed.class_path.rpartition(".")[2]:
            if subcommand == "fit":
                raise ValueError(
                    f"{path} was written by {class_path}, the configuration names {typed.class_path}; a training goes "
                    "on from its own checkpoints alone"
                )
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

    def _refuse_another_run(self, path: str, checkpoint: dict[str, Any]) -> None:
        """ValueError: the record in a checkpoint that nobody asked for is another run's."""
        states = checkpoint.get("callbacks", {})
        record = next((state for key, state in states.items() if key.startswith("RunRecord")), None)
        if record is None:
            return
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.config.subcommand]
        now = {part: config.get(part) for part in ("model", "data")}
        if not isinstance(config.get("seed_everything"), bool):  # True: Lightning draws one
            now["seed"] = config.get("seed_everything")
        changed = differences({part: record.get(part) for part in now}, now)
        if changed:
            raise ValueError(
                f"{path} stands where this job goes on, but its record is another run's: {'; '.join(changed)}; begin "
                "under another --name, or go on with that run by --ckpt_path"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer with what every run is given."""
        listed = config.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        # A recipe says that there is a bar; this suite's counts the steps of the whole run.
        listed = [RunProgress() if type(callback) is RichProgressBar else callback for callback in listed]
        config["callbacks"] = [*listed, *(kind() for kind in ALWAYS if not any(type(c) is kind for c in listed))]
        if config.get("enable_model_summary") is not False:
            config["callbacks"].append(Sizes())
        config["default_root_dir"] = str(self.root)
        if config.get("logger") in (None, True):
            config["logger"] = RunLogger(self.root)
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, self.checkpoint_io]
        fit_validation(config)
        trainer = super()._instantiate_trainer(config, callbacks)
        if trainer.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu" and not BF16_PRODUCTS:
            rank_zero_warn(
                "bfloat16 is emulated here, so precision bf16-mixed takes ten times as long as float32 or longer; "
                "--trainer.precision 32-true avoids that"
            )
        return trainer

    def after_fit(self) -> None:
        """Say where everything is. ValueError: every checkpoint of the run failed."""
        if self.checkpoint_io.failed and not self.checkpoint_io.saved:
            raise ValueError(
                f"none of {self.checkpoint_io.failed} checkpoints could be written below {self.root.absolute()}; make "
                "room there, or name another folder by EFFCLIP_RUNS, and train again"
            )
        if self.checkpoint_io.failing:
            rank_zero_warn("the last checkpoint could not be written; the newest below is of an earlier step")
        if not self.trainer.fast_dev_run:
            rank_zero_info("\n".join(closing_lines(self.trainer, self.model, self.options.recipe)))


def _refuse(other: Callable[..., NoReturn], message: str, error: Exception | None = None) -> NoReturn:
    """Name a setting that a class does not have, with the nearest one. other: answers all other mistakes."""
    wrong = re.search(r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
    if wrong is None:
        other(message, error)
    module, _, name = wrong[1].rpartition(".")
    known = ArgumentParser()  # its names are those of the class, and of a base where the class passes them on
    known.add_class_arguments(getattr(import_module(module), name), "of")
    settings = sorted(vars(known.get_defaults(skip_validation=True).of))
    near = get_close_matches(wrong[2], settings, 1)
    mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(settings)}"
    print(f"lightning: error: {name} has no setting {wrong[2]!r}; {mend}", file=sys.stderr)
    raise SystemExit(2)


def _need_weights(subcommand: str, model: Any) -> None:
    """ValueError: a model that is evaluated without a checkpoint starts from no weights of its own either."""
    module, _, name = model.class_path.rpartition(".")
    starts = getattr(getattr(import_module(module), name), "starts_from", {})
    if all(model.init_args.get(name) == nothing for name, nothing in starts.items()):
        raise ValueError(
            f"{subcommand} without weights would measure random ones; give --ckpt_path FILE, or --ckpt_path last for "
            "the newest of this recipe, or say --random-weights"
        )
