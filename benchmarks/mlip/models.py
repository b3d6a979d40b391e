"""The two embedded models that MLIP's figures compare: a plain CLIP and an MLIP with the same start, steps and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.embedded import GUIDE
from benchmarks.mlip.ablations import BASELINE, COMMAND, MODEL
from common.conditions import conditions, digest
from mlip.model import MLIP

MAKE = {
    GUIDE: "make retrain ONLY=guide",
    BASELINE: f"{COMMAND} --only clip-seed0",
    MODEL: f"{COMMAND} --only mlip-seed0",
}
"""The weights that a benchmark may need with the command that trains each, in the order of training."""
TITLES = {"clip": "CLIP", "mlip": "MLIP"}
COMPARED = "Embedded scale, two models of one start, length and data (rows `clip` and `mlip` of the ablations, seed 0)"
"""How notes describe the two models."""


def models() -> dict[str, MLIP]:
    """{"clip": ..., "mlip": ...} from the committed weights; the CLIP is an MLIP with all of its parts switched off."""
    return {name: MLIP.load(path).eval() for name, path in (("clip", BASELINE), ("mlip", MODEL))}


def needing(name: str, weights: tuple[Path, ...], measure: Callable[[], dict[str, Any]], **setting: Any) -> dict:
    """The result ``name`` with what ``measure`` returns; without the weights, with the commands that train them.

    setting: conditions beside seed and weights.
    """
    absent = [path for path in weights if not path.is_file()]
    if MODEL in absent and not GUIDE.is_file():
        absent.append(GUIDE)  # MLIP's training reads it
    missing = [command for path, command in MAKE.items() if path in absent]
    known = {path.name: digest(path) for path in weights if path.is_file()}
    result = {"name": name, "conditions": conditions("embedded", seeds=1, weights=known, **setting), "missing": missing}
    return result if missing else result | measure()


def not_run(result: dict[str, Any]) -> dict[str, Any] | None:
    """The rendered form of a result whose weights were missing; None: they were there."""
    if not result["missing"]:
        return None
    commands = ", then ".join(f"`{command}`" for command in result["missing"])
    return {"md": f"Not run: {commands}, then `python -m benchmarks {result['name']}`.\n", "figures": {}}
