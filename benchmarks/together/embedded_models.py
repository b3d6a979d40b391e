"""The committed embedded models on all embedded splits: zero-shot, retrieval and linear probe.

Both models go through `effclip evaluate`; the tables are those of ``benchmarks.together.evaluations``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import read_log
from benchmarks.embedded import LOGGED, MODELS, REVISION
from benchmarks.together.embedded_reference import sentence
from benchmarks.together.evaluations import collect, markdown
from common.conditions import conditions
from common.evaluate import command as evaluate

_PARTS = (
    ("--split", "test", "--tasks", "zeroshot"),
    ("--split", "unseen", "--tasks", "zeroshot"),
    ("--split", "unseen-alone", "--tasks", "zeroshot"),
    ("--tasks", "retrieval"),
    ("--tasks", "linear-probe", "--shots", "1,4"),
)
"""Two shot counts only: with more images of a name the probe's search takes longer than all the rest."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Evaluate both models on every part (smoke: on 64 images, without the probe)."""
    teacher, student = MODELS[REVISION]
    if not smoke:
        read_log.record("embedded-models", LOGGED[REVISION], (teacher, student))
    reads = max(read_log.reads(path, LOGGED[REVISION]) for path in (teacher, student))
    run_conditions = conditions("embedded", seeds=1, test_reads=reads)
    models = (("--model", str(teacher)), ("--model", str(student), "--text-model", str(teacher)))
    small = ("--limit", "64", "--batch-size", "32", "--workers", "0") if smoke else ()
    with TemporaryDirectory() as folder:
        for model in models:
            for part in _PARTS[:-1] if smoke else _PARTS:
                evaluate.main([*model, "--data", "embedded", *part, *small, "--out", folder])
        results = [{**result, "file": Path(result["file"]).name} for result in collect([folder])]
    return {"name": "embedded-models", "conditions": run_conditions, "results": results}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    reads = f"Test was read {result['conditions']['test_reads']} times with these models."
    return {"md": f"{markdown(result['results'])}\n{sentence()}\n\n{reads}\n", "figures": {}}
