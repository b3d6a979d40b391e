"""MLIP's Tables 1, 2 and 4: the paper's numbers, and ours from results of `effclip evaluate` on trained models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import Comparison, Result, table
from benchmarks.mlip.paper_scale import Column, cell, how, stored, two_lines
from benchmarks.printed import paper_numbers
from common.conditions import conditions


@dataclass(frozen=True)
class Block:
    """One part of a table.

    printed: the name of the paper's rows in mlip.yaml.
    means: the last columns, each the mean of the first columns: title -> how many of them.
    """

    title: str
    printed: str
    columns: Sequence[Column]
    means: dict[str, int]

    @property
    def printed_titles(self) -> list[str]:
        """The columns that the paper prints before the means. ImageNet counts in a mean and has no column there."""
        return [column.title for column in self.columns if not self.means or column.title != "IN"]


SMALL = {
    "C10": "cifar10",
    "C100": "cifar100",
    "F101": "food101",
    "PETS": "oxford_pets",
    "FLOW": "flowers102",
    "SUN": "sun397",
    "CARS": "stanford_cars",
    "DTD": "dtd",
    "CAL": "caltech101",
    "AIR": "fgvc_aircraft",
}
"""Table 2's data sets by the paper's abbreviations, in the paper's order."""
_SIDES = {"I2T": "image_to_text", "T2I": "text_to_image"}
TABLES = {
    "1": (
        Block(
            "ImageNet",
            "table1",
            [Column("zero-shot", "imagenet", "zeroshot"), Column("linear probe", "imagenet", "linear-probe")],
            {},
        ),
    ),
    "2": tuple(
        Block(
            f"{title}, B/32",
            printed,
            [Column(short, name, task) for short, name in SMALL.items()] + [Column("IN", "imagenet", task)],
            {"AVG": len(SMALL), "AVG + IN": len(SMALL) + 1},
        )
        for title, task, printed in (
            ("zero-shot", "zeroshot", "table2_zeroshot"),
            ("linear probe", "linear-probe", "table2_linear_probe"),
        )
    ),
    "4": (
        Block(
            "retrieval",
            "table4",
            [
                Column(f"{side} {title} R@{k}", name, "retrieval", (_SIDES[side], f"R@{k}"))
                for side in _SIDES
                for title, name in (("Flickr30k", "flickr30k"), ("COCO", "coco"))
                for k in (1, 5, 10)
            ],
            {},
        ),
    ),
}


@dataclass(frozen=True)
class Evaluated:
    """One of the three tables."""

    number: str

    def run(self, smoke: bool = False, dry: Path | None = None) -> dict[str, Any]:
        """The cells that were evaluated. smoke: the same.  dry: see ``stored``.

        ValueError: two results for one cell.
        """
        known, blocks = stored(dry), []
        for block in TABLES[self.number]:
            rows = []
            for row in paper_numbers("mlip")[block.printed]:
                ours = [cell(known, row.get("model"), column) for column in block.columns]
                rows.append({**row, "ours": ours})
            blocks.append(rows)
        return {
            "name": f"mlip-table{self.number}",
            "conditions": conditions("paper"),
            "columns": [block.printed_titles for block in TABLES[self.number]],
            "blocks": blocks,
        }

    def render(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result as {"md": Markdown, "figures": {}}."""
        blocks = TABLES[self.number]
        texts = [_table(block, rows) for block, rows in zip(blocks, result["blocks"], strict=True)]
        note = how(
            (row for rows in result["blocks"] for row in rows), (column for block in blocks for column in block.columns)
        )
        if self.number == "4":
            note += " UniCLIP is not part of this suite, its row is printed only."
        return {"md": "\n\n".join([*texts, note]) + "\n", "figures": {}}

    def compare(self, result: Result) -> Iterator[Comparison]:
        """Every printed cell and mean, beside the result of `effclip evaluate`."""
        for titles, rows in zip(result["columns"], result["blocks"], strict=True):
            for row in rows:
                for title, paper, ours in zip(titles, row["values"], row["ours"], strict=False):  # means follow
                    if paper is not None:
                        yield Comparison(f"{row['method']}, {title}", paper, ours, "%")
                for count, paper in enumerate(row["values"][len(titles) :], start=len(titles)):
                    yield Comparison(f"{row['method']}, mean of {count}", paper, _mean(row["ours"][:count]), "%")


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one of the values was not run."""
    return None if None in values else fmean(values)


def _table(block: Block, rows: Sequence[dict[str, Any]]) -> str:
    """Two lines for each method: the paper's numbers, and ours."""
    titles, lines = block.printed_titles, []
    for row in rows:
        means = (_mean(row["ours"][:count]) for count in block.means.values())
        lines += two_lines(row, row["values"], [*row["ours"][: len(titles)], *means])
    return table([block.title, *titles, *block.means], lines)


TABLE_1, TABLE_2, TABLE_4 = Evaluated("1"), Evaluated("2"), Evaluated("4")
