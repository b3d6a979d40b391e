"""The commands that deploy a model, and the same from Python, run on embedded test images, with their output; then what
a deployed model costs on every engine (``benchmarks.together.deploy_costs``).

The commands run in this process, in a temporary folder that stands in for the checkout.
"""

from __future__ import annotations

import io
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.embedded import MODELS, REVISION, RULES
from benchmarks.registry import benchmark_of, results
from benchmarks.together import deploy_costs, deploy_tables
from common.cli import main as effclip
from common.conditions import conditions, digest
from common.data.embedded.folder import main as embedded_folder
from common.data.embedded.module import scenes_of
from common.paths import runs_directory

STEPS = (
    ("python -m common.data.embedded.folder runs/emoji   # 200 test pictures, one folder a class",),
    ("effclip classify runs/emoji",),
    ("effclip calibrate --data embedded --gmacs 0.015",),
    ("effclip classify runs/emoji --gmacs 0.015 --out runs/emoji.csv",),
    (
        "rm -rf runs/emoji-model",
        "effclip convert benchmarks/weights/shapes_waveclip.safetensors runs/emoji-model",
        "effclip export runs/emoji-model --format onnx",
    ),
)
"""Blocks of commands; each is shown with its output."""
PYTHON = """\
from common.deploy.model import load

model = load()  # the embedded model, as calibrated above; load("DIR"): a model directory
answers = model.classify("runs/emoji", gmacs=0.015)  # or ["violin", "cookie"] for labels of yours
print(answers[0])
"""
"""The last block, which needs the calibration by the blocks before."""
_SHOWN = 5
"""How many lines of a table are shown."""
_PROGRAMS = {"effclip": lambda words: effclip(words), "python": lambda words: embedded_folder(words[2:])}


def run(smoke: bool = False) -> dict[str, Any]:
    """Run all steps, then measure the costs; of the tables that TIMES names (NAME,NAME) the times alone, again.

    ValueError: a command failed, with its error output; or TIMES names no stored table of this machine.
    """
    made, again = run_commands(smoke), os.environ.get("TIMES")
    if not again:
        return made | {"costs": deploy_costs.measure(smoke)}
    entry = benchmark_of("deploy")
    stored = {entry.stem(result): result for result in results("deploy", RESULTS)}
    if entry.stem(made) not in stored:
        raise ValueError(f"TIMES={again}: nothing is stored of this machine yet; leave TIMES out")
    costs = stored[entry.stem(made)]["costs"]
    return made | {"costs": deploy_costs.timed_again(costs, again.split(","))}


def run_commands(smoke: bool = False) -> dict[str, Any]:
    """The result without the costs. ValueError: a command failed; with its error output."""
    run_conditions = conditions(
        "embedded",
        seeds=1,
        weights={path.name: digest(path) for path in MODELS[REVISION]},
        names=len(scenes_of(REVISION).class_names("seen")),
        rule=RULES[REVISION],
        chosen_on="val",
        reported_on="the first 200 pictures of test",
    )
    with _like_the_checkout():
        steps = [{"lines": list(lines), "printed": [_printed(line, smoke) for line in lines]} for lines in STEPS]
        printed = _captured("the Python block", lambda: exec(PYTHON, {}))
        steps.append({"lines": PYTHON.splitlines(), "language": "python", "printed": [printed]})
    return {"name": "deploy", "conditions": run_conditions, "steps": steps}


def _printed(line: str, smoke: bool) -> dict[str, Any]:
    """The output of one command; in a smoke run on a few images."""
    program, *words = shlex.split(line, comments=True)
    if program not in _PROGRAMS:
        return {"out": "", "error": ""}
    if smoke:
        words += {"classify": ["--device", "cpu"], "calibrate": ["--limit", "200"]}.get(words[0], [])
        words += ["--pictures", "20"] if program == "python" else []
    return _captured(line, lambda: _PROGRAMS[program](words))


def _captured(what: str, call: Callable[[], int | None]) -> dict[str, str]:
    """The output of ``call`` on both streams, with paths relative to the folder. ValueError: its exit code is not 0."""
    streams = {"out": io.StringIO(), "error": io.StringIO()}
    with redirect_stdout(streams["out"]), redirect_stderr(streams["error"]):
        code = call()
    if code:
        raise ValueError(f"{what}: exit code {code}; it said: {streams['error'].getvalue().strip()}")
    return {name: text.getvalue().replace(f"{Path.cwd()}/", "") for name, text in streams.items()}


@contextmanager
def _like_the_checkout() -> Iterator[None]:
    """A working directory with the benchmarks, and a run directory that holds the packed data alone.

    So an earlier calibration of the default model neither changes the output nor is lost.
    """
    before, runs = Path.cwd(), os.environ.get("EFFCLIP_RUNS")
    data = runs_directory().absolute() / "data"
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "benchmarks").symlink_to(ROOT / "benchmarks")
        (Path(folder) / "runs").mkdir()
        (Path(folder) / "runs" / "data").symlink_to(data)
        os.environ["EFFCLIP_RUNS"] = "runs"
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.pop("EFFCLIP_RUNS")
            if runs is not None:
                os.environ["EFFCLIP_RUNS"] = runs


def render(result: dict[str, Any]) -> dict[str, Any]:
    """Commands, and costs where they were measured, as {"md": Markdown, "figures": {}}."""
    parts = [commands(result), *([costs(result)] if "costs" in result else [])]
    return {"md": "\n".join(parts), "figures": {}}


def commands(result: dict[str, Any]) -> str:
    """The blocks with their output, long tables cut, as Markdown."""
    parts = [_block(step) for step in result["steps"]]
    run = result["conditions"]
    parts.append(
        f"{run['names']:,} names: {run['rule']}. Pictures of {run['reported_on']}; thresholds are chosen on "
        f"{run['chosen_on']}. {run['device']}, {run['threads']} threads, torch {run['torch']}."
    )
    return "\n\n".join(parts) + "\n"


def costs(result: dict[str, Any]) -> str:
    """The tables of what models cost as Markdown, or a line that they were not measured."""
    if "costs" not in result:
        return "Not run: `python -m benchmarks deploy`.\n"
    return "\n\n".join(deploy_tables.parts(result["costs"], result["conditions"])) + "\n"


def goals(result: dict[str, Any]) -> str:
    """Whether WaveCLIP reaches its goals on each data set, as Markdown; empty where no costs were measured."""
    found = result.get("costs", {"tables": {}})["tables"]
    parts = [(f"{name}.", *deploy_tables.goals(case["rows"])) for name, case in found.items() if case["pictures"]]
    return "\n\n".join(" ".join(part) for part in parts) + "\n"


def missing(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The costs, where a result was made before they were measured."""
    return [] if "costs" in result else [("what the models cost on every engine", "make reproduce-deploy")]


def in_python(result: dict[str, Any]) -> str:
    """The Python block alone with its output, as Markdown."""
    return "\n\n".join(_block(step) for step in result["steps"] if step.get("language") == "python") + "\n"


def _block(step: dict[str, Any]) -> str:
    """The lines of a step, and under them their output."""
    output = [line for printed in step["printed"] for line in _shown(printed)]
    typed = "\n".join([f"```{step.get('language', 'bash')}", *step["lines"], "```"])
    return "\n".join([typed, "", "```text", *output, "```"]) if output else typed


def _shown(printed: dict[str, Any]) -> Sequence[str]:
    """The lines without progress bars, of a table only the beginning."""
    out, error = (
        [line.rstrip() for line in printed[name].splitlines() if line.strip() and "━" not in line]
        for name in ("out", "error")
    )
    if out and out[0].startswith("picture,"):
        out = [*out[:_SHOWN], "..."]
    return [*error[:1], *out, *error[1:]] if error and error[0].startswith("the embedded") else [*out, *error]
