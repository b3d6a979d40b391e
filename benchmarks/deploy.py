"""The commands for a model in use, run on embedded test pictures, with what they print.

They are run in this process, in a folder that is left afterwards, as if it were the checkout.
"""

from __future__ import annotations

import io
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.embedded import RULE, STUDENT, TEACHER
from common.cli import main as effclip
from common.conditions import conditions, digest
from common.data.embedded import class_names
from common.data.embedded_folder import main as embedded_folder

_ROOT = Path(__file__).parent.parent
STEPS = (
    ("python -m common.data.embedded_folder runs/emoji   # 200 test pictures, one folder a class",),
    ("effclip classify runs/emoji",),
    ("effclip calibrate --data embedded --gmacs 0.015",),
    ("effclip classify runs/emoji --gmacs 0.015 --out runs/emoji.csv",),
    (
        "rm -rf runs/emoji-model",
        "effclip convert benchmarks/weights/embedded_waveclip.safetensors runs/emoji-model",
        "effclip export runs/emoji-model --format onnx",
    ),
)
"""Blocks of the README, each with what it prints."""
_SHOWN = 5
"""Lines of a table that are shown."""
_PROGRAMS = {"effclip": lambda words: effclip(words), "python": lambda words: embedded_folder(words[2:])}


def run(smoke: bool = False) -> dict[str, Any]:
    """Run all steps. ValueError: a command that failed, with what it said."""
    stated = conditions(
        "embedded",
        seeds=1,
        weights={path.name: digest(path) for path in (TEACHER, STUDENT)},
        names=len(class_names("seen")),
        rule=RULE,
        chosen_on="val",
        reported_on="the first 200 pictures of test",
    )
    with _like_the_checkout():
        steps = [{"lines": list(lines), "printed": [_printed(line, smoke) for line in lines]} for lines in STEPS]
    return {"name": "deploy", "conditions": stated, "steps": steps}


def _printed(line: str, smoke: bool) -> dict[str, Any]:
    """What one command printed and how long it took; in a smoke run on a few pictures."""
    program, *words = shlex.split(line, comments=True)
    if program not in _PROGRAMS:
        return {"out": "", "error": "", "seconds": 0.0}
    if smoke:
        words += {"classify": ["--device", "cpu"], "calibrate": ["--limit", "200"]}.get(words[0], [])
        words += ["--pictures", "20"] if program == "python" else []
    out, error, start = io.StringIO(), io.StringIO(), time.monotonic()
    with redirect_stdout(out), redirect_stderr(error):
        code = _PROGRAMS[program](words)
    if code:
        raise ValueError(f"{line}: exit code {code}; it said: {error.getvalue().strip()}")
    # Paths as a reader sees them, from where the commands are typed.
    said = (text.getvalue().replace(f"{Path.cwd()}/", "") for text in (out, error))
    return {**dict(zip(("out", "error"), said, strict=True)), "seconds": time.monotonic() - start}


@contextmanager
def _like_the_checkout() -> Iterator[None]:
    """An empty working directory that has the benchmarks in it; the folder of runs stays what it is."""
    before, runs = Path.cwd(), os.environ.get("EFFCLIP_RUNS")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "benchmarks").symlink_to(_ROOT / "benchmarks")
        os.environ["EFFCLIP_RUNS"] = str(Path(runs or "runs").absolute())
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.pop("EFFCLIP_RUNS")
            if runs is not None:
                os.environ["EFFCLIP_RUNS"] = runs


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The blocks with what they printed, long tables cut, as Markdown."""
    parts = []
    for step in result["steps"]:
        parts.append("\n".join(["```bash", *step["lines"], "```"]))
        said = [line for printed in step["printed"] for line in _shown(printed)]
        if said:
            parts.append("\n".join(["```text", *said, "```"]))
    stated = result["conditions"]
    parts.append(
        f"{stated['names']:,} names: {stated['rule']}. Pictures of {stated['reported_on']}; thresholds are chosen on "
        f"{stated['chosen_on']}. {stated['device']}, {stated['threads']} threads, torch {stated['torch']}."
    )
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def _shown(printed: dict[str, Any]) -> Sequence[str]:
    """The lines that a reader needs: neither progress bars nor where this machine keeps its runs."""
    out, error = (
        [line.rstrip() for line in printed[name].splitlines() if line.strip() and "━" not in line]
        for name in ("out", "error")
    )
    out = [line for line in out if not line.startswith("saved: ")]
    if out and out[0].startswith("picture,"):
        out = [*out[:_SHOWN], "..."]
    return [*error[:1], *out, *error[1:]] if error and error[0].startswith("the embedded") else [*out, *error]
