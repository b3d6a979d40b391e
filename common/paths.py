"""Where runs and caches go."""

import os
from pathlib import Path


def runs_directory() -> Path:
    """The folder of run directories and caches: `$EFFCLIP_RUNS`, or `runs` in the working directory."""
    return Path(os.environ.get("EFFCLIP_RUNS") or "runs")
