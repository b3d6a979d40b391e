"""The metrics of a run on disk: metrics.csv, and the same as JSON lines."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

_log = logging.getLogger(__name__)


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` and ``metrics.jsonl`` into ``version_N`` of the run's root.

    A line of the latter is {"step": 50, "train_loss": 3.2, ...}, written as soon as it is logged; a value that is not
    finite is null. A disk that is full costs the metrics, not the run.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir, name="")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log the metrics of a step."""
        super().log_metrics(metrics, step)
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with open(Path(self.log_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._warn(error)

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged since the last time."""
        try:
            super().save()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        _log.warning("metrics are not written to %s: %s; the run goes on", self.log_dir, error.strerror)
