"""The papers' tables and figures, the runs behind them, and the pages made of them; see ``benchmarks.registry``."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
"""The checkout."""
RESULTS, WEIGHTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "weights"
"""Where every benchmark's result is kept, and the embedded models with their cards."""


def read_recipe(recipe: str) -> dict[str, Any]:
    """The contents of a recipe of this checkout, such as ``mlip/shapes.yaml``."""
    return yaml.safe_load((ROOT / recipe).read_text())
