"""MLIP's tables at the paper's own scale: every model with its recipe line, and the cells that its evaluations fill.

A model is trained by its line, converted to a model directory of its name, and evaluated by `effclip evaluate`. The
tables read the results from the folder where that command writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import number, table
from benchmarks.mlip.shapes_runs import BY_NAME
from benchmarks.training.run import Settings, options
from common.paths import runs_directory


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    files: a recipe and the overlays on it.  settings: further changes of it.
    steps: those of the training, where they are not the recipe's.
    """

    files: tuple[str, ...]
    settings: Settings = field(default_factory=dict)
    steps: int | None = None

    @property
    def line(self) -> str:
        """Its command, for a shell."""
        words = [word for file in self.files for word in ("-c", file)]
        words += options(self.settings)
        words += [] if self.steps is None else ["--trainer.max_steps", str(self.steps)]
        return " ".join(["lightning fit", *words])


def _ablated(row: str) -> Training:
    """A row of the ablations on CC3M: its settings at embedded scale change the recipe of CC3M in the same way."""
    settings = BY_NAME[row].settings["model"]
    without_guide = {"guide_heads": None} if "guide" in settings else {}  # which the recipe states for its Guide
    return Training((_CC3M,), {"model": settings | without_guide})


def _part(recipe: str, fraction: float, steps: int) -> Training:
    """As many passes over a part of the data."""
    return Training((recipe,), {"data": {"train_fraction": fraction}}, steps)


_YFCC15M, _CC3M, _CC12M = "mlip/yfcc15m.yaml", "mlip/cc3m.yaml", "mlip/cc12m.yaml"
_DECLIP_CC3M = "mlip/declip_cc3m.yaml"
_CLIP, _SMOOTHING, _NEIGHBOURS = "mlip/clip.yaml", "mlip/label_smoothing.yaml", "mlip/nearest_neighbours.yaml"
_B32, _OTHERS_B32 = (_YFCC15M, "mlip/vit_b_32.yaml"), "mlip/clip_b_32.yaml"
MODELS: dict[str, Training] = {
    # YFCC15M for 32 epochs: Tables 1, 2, 4 and 5.
    "clip-b32": Training((*_B32, _CLIP)),
    "filip-b32": Training(("mlip/filip.yaml", _OTHERS_B32)),
    "slip-b32": Training(("mlip/slip.yaml", _OTHERS_B32)),
    "declip-b32": Training(("mlip/declip.yaml", _OTHERS_B32)),
    "mlip-b32": Training(_B32),
    "mlip-nns-b32": Training((*_B32, _NEIGHBOURS)),
    "mlip-ls-b32": Training((*_B32, _SMOOTHING)),
    "clip-b16": Training((_YFCC15M, _CLIP)),
    "slip-b16": Training(("mlip/slip.yaml",)),
    "declip-b16": Training(("mlip/declip.yaml",)),
    "mlip-b16": Training((_YFCC15M,)),
    "mlip-nns-b16": Training((_YFCC15M, _NEIGHBOURS)),
    "mlip-ls-b16": Training((_YFCC15M, _SMOOTHING)),
    # 25 epochs of other data, or of a part: Table 3.
    "clip-yfcc15m": Training((_YFCC15M, _CLIP), steps=93926),
    "mlip-yfcc15m": Training((_YFCC15M,), steps=93926),
    "mlip-yfcc15m-90": _part(_YFCC15M, 0.9, 84533),
    "clip-cc12m": Training((_CC12M, _CLIP)),
    "mlip-cc12m": Training((_CC12M,)),
    "mlip-cc12m-90": _part(_CC12M, 0.9, 60424),
    "mlip-cc3m-95": _part(_CC3M, 0.95, 16815),
    # CC3M for 25 epochs: Tables 3 and 6 to 10.
    "clip-cc3m": Training((_CC3M, _CLIP)),
    "mlip-cc3m": Training((_CC3M,)),
    **{
        f"{row}-cc3m": _ablated(row)
        for row in ("frequency", "tokens", "frequency-tokens", "one-many", "one-one", "many-many", "no-guide")
    },
    "slip-cc3m": Training(("mlip/slip_cc3m.yaml",)),
    "declip-cc3m": Training((_DECLIP_CC3M,)),
    "declip-no-neighbours-cc3m": Training((_DECLIP_CC3M,), BY_NAME["declip-no-neighbours"].settings),
}
"""Every model of the paper's tables that we can train, by the name of its model directory.

The paper states 25 epochs for its ablations, and not which part of the data its Table 3 keeps; here that is the first
shards, for 25 epochs too. "steps" are those of the recipes' numbers of pairs.
"""


@dataclass(frozen=True)
class Column:
    """A column's title, and the result of `effclip evaluate` with its number.

    recall: (direction, R@k) of retrieval.  model: the key under which a row of mlip.yaml names the column's model.
    """

    title: str
    data: str
    task: str
    recall: tuple[str, str] | None = None
    model: str = "model"

    def read(self, result: dict[str, Any]) -> float:
        """The number of one result, a fraction."""
        metrics = result["metrics"]
        if self.recall is not None:
            direction, name = self.recall
            return metrics[direction][name]
        if self.task == "linear-probe":
            metrics = metrics["shots"]["full"]
        return metrics["top1" if result["metric"] == "accuracy" else result["metric"]]


COLUMNS = {
    "i2t": Column("I2T R@1", "coco", "retrieval", ("image_to_text", "R@1")),
    "t2i": Column("T2I R@1", "coco", "retrieval", ("text_to_image", "R@1")),
    "top1": Column("zero-shot", "imagenet", "zeroshot"),
    "lp": Column("linear probe", "imagenet", "linear-probe"),
    "top1_b32": Column("zero-shot, B/32", "imagenet", "zeroshot", model="model_b32"),
    "lp_b32": Column("linear probe, B/32", "imagenet", "linear-probe", model="model_b32"),
}
"""The columns of Tables 3 and 5 to 8 by the keys of mlip.yaml; a table has some of them."""


def stored(dry: Path | None = None) -> list[dict[str, Any]]:
    """The results of `effclip evaluate` on whole test splits in $EFFCLIP_RUNS/evaluations.

    dry: the folder of a dry run (``benchmarks.mlip.dry_run``) whose results take their place.
    """
    folder = (dry or runs_directory()) / "evaluations"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in results if result["split"] == "test" and result["conditions"]["limit"] is None]


def result_of(known: Sequence[dict[str, Any]], model: str | None, column: Column) -> dict[str, Any] | None:
    """The one result of ``stored()`` with a model's number in a column; None: not run, or no model of ours.

    The papers probe what is before the projection, so a linear probe of the embedding does not count.
    ValueError: there are several.
    """
    wanted = (model, column.data, column.task)
    matching = [
        result
        for result in known
        if (result["model"], result["data"], result["task"]) == wanted
        and (column.task != "linear-probe" or result["conditions"].get("features") == "penultimate")
    ]
    if len(matching) > 1:
        raise ValueError(
            f"{len(matching)} results of {column.task} on {column.data} by {model} in "
            f"{runs_directory() / 'evaluations'}; keep one"
        )
    return matching[0] if matching else None


def cell(known: Sequence[dict[str, Any]], model: str | None, column: Column) -> float | None:
    """A model's number in %, as ``result_of`` finds it."""
    result = result_of(known, model, column)
    return None if result is None else 100 * column.read(result)


def evaluated(known: Sequence[dict[str, Any]], printed: Mapping[str, Any]) -> dict[str, float | None]:
    """Our numbers in % beside those that a row of mlip.yaml prints in COLUMNS."""
    return {key: cell(known, printed.get(column.model), column) for key, column in COLUMNS.items() if key in printed}


def two_lines(
    printed: Mapping[str, Any], paper: Sequence[float | None], ours: Sequence[float | None]
) -> list[list[str]]:
    """The lines of a row: the paper's numbers, and ours, with a dash where the paper has one and nothing was run.

    A method that is no part of this suite has the first line alone.
    """
    name = printed.get("title", printed["method"])
    lines = [[f"{name}, paper", *("–" if value is None else number(value) for value in paper)]]
    if "model" in printed:
        cells = ("–" if value is other is None else number(value) for value, other in zip(ours, paper, strict=True))
        lines.append([f"{name}, ours", *cells])
    return lines


def keyed_table(title: str, rows: Sequence[Mapping[str, Any]], ours: Mapping[str, Mapping[str, float | None]]) -> str:
    """The table of rows of mlip.yaml that print numbers in COLUMNS. ours: by method and key, see ``evaluated``."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = []
    for row in rows:
        if any(key in row for key in keys):
            known = ours.get(row["method"], {})
            lines += two_lines(row, [row.get(key) for key in keys], [known.get(key) for key in keys])
    return table([title, *(COLUMNS[key].title for key in keys)], lines)


def how(rows: Iterable[Mapping[str, Any]], columns: Iterable[Column]) -> str:
    """What fills the cells: the line of every model that rows of mlip.yaml name, and how all are evaluated."""
    rows, columns = list(rows), list(columns)
    names = list(dict.fromkeys(row[key] for row in rows for key in ("model", "model_b32") if key in row))
    lines = [
        "Scale: paper, in %. What was not run needs the pairs (docs/data.md), the data sets and GPUs. With the file of "
        "mae-lite's DeiT-Tiny in MLIP_GUIDE, also when it is converted, a row is made by",
        *(f"- `{name}`: `{MODELS[name].line}`, then `effclip convert LAST.ckpt {name}`" for name in names),
        "",
    ]
    commands = []
    for retrieval in (False, True):
        chosen = [column for column in columns if (column.task == "retrieval") == retrieval]
        tasks = list(dict.fromkeys(column.task for column in chosen))
        data = ", ".join(dict.fromkeys(column.data for column in chosen))
        option = ""
        if retrieval:
            option = " --captions KARPATHY.json"
        elif "linear-probe" in tasks:
            option = " --features penultimate"
        if chosen:
            start = f"effclip evaluate --model {names[0]} --data NAME --root DIR"
            commands.append(f"`{start}{option} --tasks {','.join(tasks)}` for {data}")
    filip = [name for name in names if name.startswith("filip")]
    if filip and any(column.task == "linear-probe" for column in columns):
        commands[0] += f" ({filip[0]}, which has no features before a projection: zeroshot alone)"
    lines.append(f"and {'; '.join(commands)}. The same command as now then fills it in.")
    return "\n".join(lines)
