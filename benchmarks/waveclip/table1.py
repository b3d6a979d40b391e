"""WAVECLIP's Table 1: tokens after every level of a ViT-B/16, with the cost of each level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cells import Comparison, Result, table
from benchmarks.printed import paper_numbers
from benchmarks.waveclip.costs import Cost, cost, exit_costs
from benchmarks.waveclip.rivals import BASELINES, TEACHER
from common.clip import CLIP
from common.conditions import conditions
from waveclip.tower import WaveTower

SIZES = {1: 224, 2: 256}
"""Image size by number of levels: the paper's where its grid halves so often, else the nearest size whose grid does."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Cumulative tokens and GMACs after every step, for 0, 1 and 2 levels (smoke: 0 and 1)."""
    run_conditions = conditions("paper", seeds=None, dtype="float32", batch=1, weights="random (costs only)")
    architecture = BASELINES[TEACHER].architecture
    dense = cost(CLIP(architecture).image_tower.eval(), 224)
    rows = [_row(0, 224, [dense])]
    for levels, size in SIZES.items():
        if smoke and levels > 1:
            break
        vision = {**architecture["vision_cfg"], "image_size": size}
        tower = CLIP({**architecture, "vision_cfg": vision}).image_tower
        wave = WaveTower.from_image_tower(tower, levels=levels).eval()
        rows.append(_row(levels, size, exit_costs(wave, size)))
    return {
        "name": "waveclip-table1",
        "conditions": run_conditions,
        "paper_full": paper_numbers("waveclip")["table1"]["full"],
        "patches_needed": {str(size): size / 4 / architecture["vision_cfg"]["patch_size"] for size in (192, 224, 256)},
        "rows": rows,
    }


def _row(levels: int, size: int, costs: Sequence[Cost]) -> dict[str, Any]:
    return {
        "levels": levels,
        "image_size": size,
        "tokens": [cost.tokens for cost in costs],
        "gmacs_paper": [cost.macs.gmacs_paper for cost in costs],
        "gmacs": [cost.macs.gmacs for cost in costs],
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    head = ["levels", "image", "after step", "tokens", "GMACs without attention products", "GMACs"]
    rows = [
        [row["levels"], f"{row['image_size']} px", step, f"{tokens:g}", f"{without:.2f}", f"{gmacs:.2f}"]
        for row in result["rows"]
        for step, (tokens, without, gmacs) in enumerate(
            zip(row["tokens"], row["gmacs_paper"], row["gmacs"], strict=True)
        )
    ]
    need = result["patches_needed"]
    notes = [
        f"Tokens and costs add up over the steps of one cached run. The paper prints {result['paper_full']} "
        "for the full set of one level, which counts one class token; with one at each level, as its loss "
        "has it, the set is 198. The other numbers of its Table 1 are not legible in the text that we have.",
        f"Two levels leave {need['224']:g} patches a side at 224 px, which is not whole; 192 px "
        f"({need['192']:g}) or 256 px ({need['256']:g}) fit; our tower refuses the others and names these. "
        "Scale: paper, random weights.",
    ]
    return {"md": "\n\n".join([table(head, rows, left=()), *notes]) + "\n", "figures": {}}


def compare(result: Result) -> Iterator[Comparison]:
    """Tokens of the full set, with no and with one level."""
    for row in result["rows"]:
        if row["levels"] < 2:
            what = f"the full set with {row['levels']} level{'' if row['levels'] == 1 else 's'}"
            yield Comparison(what, result["paper_full"], row["tokens"][-1], "tokens")
