"""The numbers that the papers print, from benchmarks/paper/*.yaml."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from benchmarks import ROOT


@cache
def paper_numbers(paper: str) -> dict[str, Any]:
    """The printed numbers of a paper by table or figure. paper: "waveclip", "mlip" or "patchrank"."""
    return yaml.safe_load((ROOT / "benchmarks" / "paper" / f"{paper}.yaml").read_text())
