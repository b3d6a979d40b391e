"""The record of a run in its checkpoint, for the model card: settings, data, conditions, last metrics."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from common.conditions import conditions
from common.settings import differences


@runtime_checkable
class TunedForTemplate(Protocol):
    """A training that tunes a model for one prompt template; None: for the first of the data's templates."""

    template: str | None


class RunRecord(SaveConfigCallback):
    """Saves the configuration beside the checkpoints, as its base class does, and a record of the run in each.

    The record holds plain values only:
    "model", "data", "seed": from the configuration.
    "conditions": those of the run's start; a resumed run keeps them.
    "attribution", "class_names", "templates": the data module's attributes of these names, where it has them; a
        training that is ``TunedForTemplate`` gives its own template.
    "metrics": those of the last validation.
    "device_hours": the time of the training so far, that of a resumed run included, in hours times the devices.
    "changed": the settings of a resumed run that are not those it began with, "NAME was VALUE, is VALUE".
    """

    record: dict[str, Any] | None = None
    _hours_before: float | None = 0.0  # None: unknown, of a run that an earlier version began
    _started: float | None = None
    _devices = 1

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the record, on the first process, which also writes the checkpoints."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        data = trainer.datamodule
        class_names = getattr(data, "class_names", None)
        if isinstance(pl_module, TunedForTemplate) and pl_module.template:
            templates = [pl_module.template]
        else:
            templates = getattr(data, "templates", None) or []
        self.record = {
            "model": config.get("model"),
            "data": config.get("data") or {},
            "seed": config.get("seed_everything"),
            "conditions": conditions(getattr(data, "scale", "paper")),
            "attribution": getattr(data, "attribution", None),
            "class_names": None if class_names is None else list(class_names),
            "templates": [template for template in templates if isinstance(template, str)],
            "metrics": {},
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._devices = time.monotonic(), trainer.world_size

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of this validation."""
        if self.record is not None and not trainer.sanity_checking:
            self.record["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """The record so far."""
        record = dict(self.record or {})
        if record and self._started is not None and self._hours_before is not None:
            hours = (time.monotonic() - self._started) * self._devices / 3600
            record["device_hours"] = self._hours_before + hours
        return record

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of the run that is resumed, with the settings that it has from now on."""
        if not state_dict:
            return
        self._hours_before = state_dict.get("device_hours")
        now = {name: value for name, value in (self.record or {}).items() if name in ("model", "data", "seed")}
        before = {name: state_dict.get(name) for name in now}
        changed = differences(before, now)
        earlier = list(state_dict.get("changed", []))
        self.record = {**state_dict, **now, **({"changed": earlier + changed} if earlier or changed else {})}
