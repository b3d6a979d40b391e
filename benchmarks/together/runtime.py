"""The exported folder alone: its program's answers on every test picture where torch cannot be imported, beside those
of `effclip classify` with the model that was exported.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import ROOT, read_log
from benchmarks.cells import table
from benchmarks.embedded import LOGGED, MODELS, REVISION
from common.cli import main as effclip
from common.conditions import conditions, digest
from common.data.embedded.folder import write_folder
from common.data.embedded.shapes import class_names
from common.data.embedded.splits import indices

_CLIP, _WAVECLIP = "shapes_clip", "shapes_waveclip"
ROWS = (
    ("CLIP, classes by its text tower", _CLIP, None),
    ("WaveCLIP, all levels", _WAVECLIP, None),
    ("WaveCLIP, early exit", _WAVECLIP, 0.2),
)
"""Name, weights and threshold."""
_WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "torchvision", "open_clip", "common", "benchmarks"])
note, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    names = {name.partition(".")[0] for name, module in sys.modules.items() if module} - set(sys.stdlib_module_names)
    open(note, "w").write(" ".join(sorted(name for name in names if not name.startswith("_"))))
"""
"""Runs a program with its arguments where neither torch nor this suite can be imported, and notes what it imports."""


def run(smoke: bool = False) -> dict[str, Any]:
    """A row for each of ``ROWS``. smoke: on a few pictures. ValueError: a command failed."""
    pictures = 60 if smoke else len(indices("test", REVISION))
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "pictures", "test", pictures)
        rows = [_row(Path(folder), *row) for row in ROWS]
    if not smoke:
        read_log.record("runtime", LOGGED[REVISION], MODELS[REVISION])
    weights = {path.name: digest(path) for path in MODELS[REVISION]}
    reads = read_log.reads_of_all(LOGGED[REVISION])
    run_conditions = conditions(
        "embedded", seeds=1, weights=weights, pictures=pictures, split="test", reads_of_test=reads
    )
    return {"name": "runtime", "conditions": run_conditions, "rows": rows}


def _row(folder: Path, name: str, weights: str, threshold: float | None) -> dict[str, Any]:
    model, pictures = folder / weights, str(folder / "pictures")
    if not model.exists():
        _effclip("convert", str(ROOT / f"benchmarks/weights/{weights}.safetensors"), str(model))
        _effclip("export", str(model), "--format", "onnx")
    how = [] if threshold is None else ["--threshold", str(threshold)]
    if weights == _CLIP:
        (folder / "names.txt").write_text("\n".join(class_names("seen")))
        how = ["--labels-file", str(folder / "names.txt"), "--template", "{a} {}"]
    ours, theirs, note = (folder / file for file in ("ours.csv", "theirs.csv", "imported"))
    _effclip("classify", pictures, "--model", str(model), "--device", "cpu", *how, "--out", str(ours))
    words = [str(note), str(model / "onnx/predict.py"), pictures, *how, "--out", str(theirs)]
    code = subprocess.run([sys.executable, "-I", "-c", _WITHOUT_TORCH, *words]).returncode
    if code:
        raise ValueError(f"predict.py: exit code {code}; it said why above")
    imported = note.read_text().split()
    return {"model": name, "threshold": threshold, "imported": imported, **compared(_answers(ours), _answers(theirs))}


def _effclip(*words: str) -> None:
    with redirect_stdout(io.StringIO()):
        code = effclip(list(words))
    if code:
        raise ValueError(f"effclip {words[0]}: exit code {code}; it said why above")


def _answers(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def compared(ours: Sequence[dict[str, str]], theirs: Sequence[dict[str, str]]) -> dict[str, Any]:
    """How the rows of two CSV files differ. ValueError: they are not of the same pictures in the same order."""
    if [row["picture"] for row in ours] != [row["picture"] for row in theirs]:
        raise ValueError(f"{len(ours)} and {len(theirs)} answers are not of the same pictures in the same order")
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "pictures": len(pairs),
        "stopped early": sum(row["level"] == "0" for row in ours),
        "other labels": sum(one["label"] != other["label"] for one, other in pairs),
        "other levels": sum(one["level"] != other["level"] for one, other in pairs),
        "probability": max(abs(float(one["probability"]) - float(other["probability"])) for one, other in pairs),
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The table as Markdown."""
    head = ("model", "threshold", "pictures", "stopped at level 0", "other labels", "other levels", "probabilities")
    rows = [
        [
            row["model"],
            "–" if row["threshold"] is None else f"{row['threshold']:g}",
            f"{row['pictures']:,}",
            "–" if row["threshold"] is None else f"{row['stopped early']:,}",
            f"{row['other labels']:,}",
            f"{row['other levels']:,}",
            "equal" if not row["probability"] else f"within {ceil(row['probability'] * 1e6):g}e-06",
        ]
        for row in result["rows"]
    ]
    run = result["conditions"]
    imported = sorted({name for row in result["rows"] for name in row["imported"]})
    note = (
        "The answers of `predict.py`, in a process where torch and this suite cannot be imported, beside those of "
        f"`effclip classify` on the same files: {run['split']} pictures of scenes of shape. It imported "
        f"{', '.join(imported)}. Probabilities are compared as both print them, by six digits. {run['device']}; "
        f"classify by torch {run['torch']}.{read_log.remark(run)}"
    )
    return {"md": f"{table(head, rows)}\n\n{note}\n", "figures": {}}
