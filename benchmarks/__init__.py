"""The papers' tables and figures, the runs behind them, and the pages made of them; see ``benchmarks.registry``."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
RESULTS, WEIGHTS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "weights"
"""Where every benchmark's result is kept, and the embedded models with their cards."""
