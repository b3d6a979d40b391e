"""What a checkpoint says of its run, for the model card: settings, data, conditions, last metrics."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from common.conditions import conditions
from common.settings import differences


class RunRecord(SaveConfigCallback):
    """Saves the configuration beside the checkpoints, as its base class does, and a record of the run in each.

    The record holds plain values only: "model", "data" and "seed" from the configuration; "conditions" of the
    run's start, kept when it goes on later; "attribution", "class_names" and "templates" where the data has them, or
    the template that a model was tuned with; "metrics", the last validation's.
    """

    record: dict[str, Any] | None = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the record, on the first process, which is the one that writes checkpoints."""
        said = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        data, of = said.get("data") or {}, trainer.datamodule
        names, own = getattr(of, "class_names", None), getattr(pl_module, "template", None)
        templates = [own] if own else getattr(of, "templates", None) or []
        self.record = {
            "model": said.get("model"),
            "data": data,
            "seed": said.get("seed_everything"),
            "conditions": conditions(getattr(of, "scale", "paper")),
            "attribution": getattr(of, "attribution", None),
            "class_names": None if names is None else list(names),
            "templates": [template for template in templates if isinstance(template, str)],
            "metrics": {},
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of this validation."""
        if self.record is not None and not trainer.sanity_checking:
            self.record["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """The record so far."""
        return dict(self.record or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the record of the run that is continued; its settings are those that are used from now on."""
        if not state_dict:
            return
        now = {name: value for name, value in (self.record or {}).items() if name in ("model", "data", "seed")}
        before = {name: state_dict.get(name) for name in now}
        changed = differences(before, now)
        earlier = list(state_dict.get("changed", []))
        self.record = {**state_dict, **now, **({"changed": earlier + changed} if earlier or changed else {})}
