"""What a run prints beside its progress: the model's size at the start, where everything is at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from common.run_folder import newest_checkpoint


class Sizes(ModelSummary):
    """The parameters of the module's parts, without Lightning's count of FLOPs, which is 0 for all our models."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        *others: Any,
        **more: Any,
    ) -> None:
        """Print one line a part and one for the sum."""
        columns = dict(summary_data)
        rows = zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
        lines = [f"{name:<24}{kind:<28}{size:>8}" for name, kind, size in rows]
        total = f"{total_parameters:,} parameters, {trainable_parameters:,} of them trained"
        rank_zero_info("\n".join([*lines, total]))


def closing_lines(trainer: Trainer, module: LightningModule, recipe: str | None) -> list[str]:
    """Where a finished training's checkpoint, settings and metrics are, and the next commands."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    checkpoint = newest_checkpoint(folder)
    files = {"checkpoint": checkpoint, "config": folder / "config.yaml", "metrics": folder / "metrics.csv"}
    lines = [f"{what:<12}{file}" for what, file in files.items() if file is not None and file.exists()]
    trainings = {point.name for point in importlib.metadata.entry_points(group="effclip.trainings")}
    if checkpoint is not None and type(module).__name__ in trainings:
        model = f"models/{recipe or 'mine'}"
        lines.append(f"{'next':<12}effclip convert {checkpoint} {model}")
        lines.append(f"{'then':<12}effclip evaluate --model {model} --data NAME")
    return lines


_NOTICES = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"skip_none parameter was deprecated",
    r"The dirpath has changed from",
    r"`Trainer\(limit_\w+=.*was configured so",
    r"(GPU|TPU|HPU) available: (False|True)",
    r"Tip: For seamless cloud",
    r"The .*dataloader.* does not have many workers",
    r"is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r"`Trainer.fit` stopped",
    r"Seed set to",
    r"Trainer already configured with model summary",
    r"module\(s\) in eval mode at the start of training",
    r"Loading `train_dataloader` to estimate",
    r"Loaded model weights from",
    r"Detected KeyboardInterrupt",
    r"Restor(ing|ed) (all )?states from the checkpoint",
    r"`weights_only` was not set",
    r"Experiment logs directory .* exists and is not empty",
)
"""Lightning's notices that a user of a recipe can do nothing about, or that our own lines say."""


def quiet() -> None:
    """Keep the notices that a user cannot act on off the screen."""
    for notice in _NOTICES:
        warnings.filterwarnings("ignore", message=rf"(?s).*{notice}")

    def told(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(re.search(notice, message) for notice in _NOTICES)

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.fabric"):
        logging.getLogger(name).addFilter(told)
