"""MLIP's Tables 1, 2 and 4: the paper's numbers, and ours from results of `effclip evaluate` on trained models.

A row's model is trained by a recipe with overlays, converted to a model directory of the row's name, and evaluated. Its
results are read from the folder where `effclip evaluate` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.cells import Comparison, Result, table
from benchmarks.printed import paper_numbers
from common.conditions import conditions
from common.paths import runs_directory

_MLIP, _B32 = "mlip/yfcc15m.yaml", ("mlip/yfcc15m.yaml", "mlip/vit_b_32.yaml")
RECIPES: dict[str, tuple[str, ...]] = {
    "clip-b32": (*_B32, "mlip/clip.yaml"),
    "filip-b32": ("mlip/filip.yaml", "mlip/clip_b_32.yaml"),
    "slip-b32": ("mlip/slip.yaml", "mlip/clip_b_32.yaml"),
    "declip-b32": ("mlip/declip.yaml", "mlip/clip_b_32.yaml"),
    "mlip-b32": _B32,
    "mlip-ls-b32": (*_B32, "mlip/label_smoothing.yaml"),
    "clip-b16": (_MLIP, "mlip/clip.yaml"),
    "slip-b16": ("mlip/slip.yaml",),
    "declip-b16": ("mlip/declip.yaml",),
    "mlip-b16": (_MLIP,),
}
"""The models that we can train, each with its recipe and the overlays on it."""


@dataclass(frozen=True)
class Column:
    """A column's title, and the result of `effclip evaluate` with its number. recall: (direction, R@k) of retrieval."""

    title: str
    data: str
    task: str
    recall: tuple[str, str] | None = None

    def read(self, result: dict[str, Any]) -> float:
        """The number of one result, a fraction."""
        metrics = result["metrics"]
        if self.recall is not None:
            direction, name = self.recall
            return metrics[direction][name]
        if self.task == "linear-probe":
            metrics = metrics["shots"]["full"]
        return metrics["top1" if result["metric"] == "accuracy" else result["metric"]]


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

    def run(self, smoke: bool = False) -> dict[str, Any]:
        """The cells that were evaluated. smoke: the same. ValueError: two results for one cell."""
        known, blocks = stored(), []
        for block in TABLES[self.number]:
            rows = []
            for row in paper_numbers("mlip")[block.printed]:
                ours = [_cell(known, row.get("run"), column) for column in block.columns]
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
        tasks = ",".join(dict.fromkeys(column.task for block in blocks for column in block.columns))
        data = list(dict.fromkeys(column.data for block in blocks for column in block.columns))
        runs = dict.fromkeys(row["run"] for rows in result["blocks"] for row in rows if "run" in row)
        lines = [
            "Scale: paper, in %. What was not run needs YFCC15M, the data sets and GPUs. With the file of mae-lite's "
            "DeiT-Tiny in MLIP_GUIDE, also when it is converted, a row is made by"
        ]
        for run in runs:
            files = " ".join(f"-c {file}" for file in RECIPES[run])
            lines.append(f"- `{run}`: `lightning fit {files}`, then `effclip convert LAST.ckpt {run}`")
        options = " --captions KARPATHY.json" if "retrieval" in tasks else " --features penultimate"
        lines.append(
            f"\nand `effclip evaluate --model {next(iter(runs))} --data NAME --root DIR{options} --tasks {tasks}` for "
            f"{', '.join(data)}; the same command as now then fills it in."
            + (" UniCLIP is not part of this suite." if self.number == "4" else "")
        )
        return {"md": "\n\n".join([*texts, "\n".join(lines)]) + "\n", "figures": {}}

    def compare(self, result: Result) -> Iterator[Comparison]:
        """Every printed cell and mean, beside the result of `effclip evaluate`."""
        for titles, rows in zip(result["columns"], result["blocks"], strict=True):
            for row in rows:
                for title, paper, ours in zip(titles, row["values"], row["ours"], strict=False):  # means follow
                    if paper is not None:
                        yield Comparison(f"{row['method']}, {title}", paper, ours, "%")
                for count, paper in enumerate(row["values"][len(titles) :], start=len(titles)):
                    yield Comparison(f"{row['method']}, mean of {count}", paper, _mean(row["ours"][:count]), "%")


def stored() -> list[dict[str, Any]]:
    """The results of `effclip evaluate` on whole test splits in $EFFCLIP_RUNS/evaluations."""
    results = [json.loads(path.read_text()) for path in sorted((runs_directory() / "evaluations").glob("*.json"))]
    return [result for result in results if result["split"] == "test" and result["conditions"]["limit"] is None]


def _cell(known: Sequence[dict[str, Any]], run: str | None, column: Column) -> float | None:
    """A model's number, in %; None: not run. The papers probe what is before the projection."""
    wanted = (run, column.data, column.task)
    matching = [
        result
        for result in known
        if (result["model"], result["data"], result["task"]) == wanted
        and (column.task != "linear-probe" or result["conditions"].get("features") == "penultimate")
    ]
    if len(matching) > 1:
        raise ValueError(
            f"{len(matching)} results of {column.task} on {column.data} by {run} in "
            f"{runs_directory() / 'evaluations'}; keep one"
        )
    return 100 * column.read(matching[0]) if matching else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one of the values was not run."""
    return None if None in values else fmean(values)


def _table(block: Block, rows: Sequence[dict[str, Any]]) -> str:
    """Two lines for each method: the paper's numbers, and ours."""
    titles, lines = block.printed_titles, []
    for row in rows:
        lines.append([f"{row['method']}, paper", *("–" if v is None else f"{v:.1f}" for v in row["values"])])
        ours = row["ours"]
        values = [*ours[: len(titles)], *(_mean(ours[:count]) for count in block.means.values())]
        lines.append([f"{row['method']}, ours", *("not run" if v is None else f"{v:.1f}" for v in values)])
    return table([block.title, *titles, *block.means], lines)


TABLE_1, TABLE_2, TABLE_4 = Evaluated("1"), Evaluated("2"), Evaluated("4")
