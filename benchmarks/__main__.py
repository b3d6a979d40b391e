"""`python -m benchmarks NAME`: run a benchmark and write what it found to benchmarks/results.

A benchmark is a module with ``run(smoke) -> result``, plain values, and
``render(result) -> {"md", "figures"}``, its Markdown and matplotlib figures by file name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from common.paths import runs_directory

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "table2": "WAVECLIP's Table 2: tokens, multiply-adds, accuracy; then the embedded benchmark",
    "waveclip-table1": "its Table 1: tokens at every level",
    "waveclip-fig1": "its Figure 1: accuracy against multiply-adds",
    "waveclip-fig3": "its Figure 3: cached against naive re-encoding",
    "waveclip-fig4": "its Figure 4: margin against maximum probability as the gate",
    "embedded-models": "zero-shot, retrieval and linear probe of the embedded models on all embedded splits",
    "waveclip-highres": "two and three levels at 448 and 512 px: cost and time of every exit; 96 px embedded",
    "frontier": "the three methods and their compositions: accuracy against multiply-adds and against time",
    "mlip-table1": "MLIP's Table 1: zero-shot accuracy and linear probe on ImageNet (from `effclip evaluate`)",
    "mlip-table2": "its Table 2: the same on ten data sets",
    "mlip-table3": "its Table 3 at embedded scale: data of several sizes",
    "mlip-table4": "its Table 4: retrieval on Flickr30k and MS-COCO",
    "mlip-table5": "its Table 5: label smoothing and nearest neighbours",
    "mlip-table6": "its Table 6: frequency transform and token alignment",
    "mlip-table7": "its Table 7: the matchings of tokens",
    "mlip-table8": "its Table 8: with and without the Guide",
    "mlip-table9": "its Table 9: multiply-adds of CLIP and MLIP",
    "mlip-table10": "its Table 10: time of a step, and accuracy for the time",
    "mlip-fig2": "its Figure 2: likeness of tokens, and removing some at random",
    "mlip-fig5": "its Figure 5: the ten pictures found for a caption",
    "mlip-fig6": "its Figure 6: what the Lego-Filter passes",
    "mlip-fig7": "its Figure 7: the embedding space by t-SNE",
    "patchrank-table1": "Patch Ranking's table: methods x tasks at keep .6, and what tuning leaves of the loss",
    "patchrank-fig1": "its Figure 1: accuracy against multiply-adds by keep rate, with and without prompts",
    "patchrank-fig3": "its Figure 3: the three scores, patch by patch",
    "patchrank-fig4": "its Figure 4: the patches kept at 50 %",
    "patchrank-fig5": "its Figure 5: pruning before the first block, without tuning",
    "patchrank-costs": "Patch Ranking's costs: all methods by keep rate, and golden rankings",
    "deploy": "classify, calibrate, convert and export on embedded test pictures, with what they print",
    "speed": "our towers against open_clip's, MLIP's training step against CLIP's, on this machine",
    "loading": "our shard loader against open_clip's on this machine",
    "fashion-mnist": "a CLIP and a WaveCLIP trained and tested on Fashion-MNIST (needs EFFCLIP_DATA)",
}
NEED_DATA = ("fashion-mnist",)
"""What `all` leaves out where EFFCLIP_DATA names no folder of data sets; a smoke run needs none."""
ACTIONS = {
    "retrain": "train the embedded models again (--list; ONLY=NAME)",
    "mlip-ablations": "train the rows of MLIP's tables 3, 5, 6, 7 and 8 (--table N, --only RUN, --list)",
    "patchrank-runs": "train and evaluate what Patch Ranking's table 1 and figures 1, 4 and 5 show (--list, --seeds N)",
    "evaluations": "tables of the results of `effclip evaluate` in some folders (DIR ... [--out FILE])",
    "report": "write the tables of README and docs, and one HTML page from benchmarks/results (--page FILE)",
    "screenshots": "photograph that page for the README (needs chromium)",
}


def module_of(name: str) -> Any:
    """The module of a benchmark or action, imported when it is asked for."""
    return import_module("benchmarks." + name.replace("-", "_"))


def smoke() -> bool:
    """Whether SMOKE asks for benchmarks at their smallest."""
    return os.environ.get("SMOKE", "0") not in ("", "0")


def write(result: dict[str, Any], rendered: dict[str, Any], folder: Path) -> list[Path]:
    """Write <name>.json, <name>.md and each figure's PNG into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{result['name']}.json", folder / f"{result['name']}.md"]
    paths[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    paths[1].write_text(rendered["md"])
    for name, figure in rendered["figures"].items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def run_one(name: str, console: Console) -> None:
    """Run one benchmark, print its table, and write its files.

    A smoke run's numbers mean nothing, so they go to the run directory and never over the results.
    """
    folder = runs_directory() / "smoke" if smoke() else RESULTS
    console.rule(name)
    start = time.monotonic()
    module = module_of(name)
    result = module.run(smoke=smoke())
    rendered = module.render(result)
    paths = write(result, rendered, folder)
    console.print(Markdown(rendered["md"]))
    written = ", ".join(os.path.relpath(path) for path in paths)
    console.print(f"[dim]{time.monotonic() - start:.0f} s; wrote {written}[/dim]", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when everything was done, 1 when a benchmark could not be run."""
    lines = [f"  {name:<18}{text}" for name, text in (BENCHMARKS | ACTIONS).items()]
    lines.append(f"  {'all':<18}every benchmark, in one process")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The papers' tables and figures, each beside ours.\n\n" + "\n".join(lines),
        epilog="environment: SMOKE=1 (smallest runs, written to the run directory), IMAGENET and WEIGHTS "
        "(table2's accuracies at paper scale), ONLY and CONFIG (retrain), EFFCLIP_DATA and DOWNLOAD=1 (fashion-mnist), "
        "EFFCLIP_RUNS (run directory)",
    )
    parser.add_argument("name", choices=[*BENCHMARKS, *ACTIONS, "all"], metavar="NAME")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.name not in ACTIONS:
        parser.error(f"{arguments.name} takes no {' '.join(rest)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.name in ACTIONS:
        return _reported(lambda: module_of(arguments.name).main(rest), arguments.name, console)
    names = [arguments.name]
    if arguments.name == "all":
        left_out = () if smoke() or os.environ.get("EFFCLIP_DATA") else NEED_DATA
        names = [name for name in BENCHMARKS if name not in left_out]
        for name in left_out:
            console.print(f"{name}: not run, EFFCLIP_DATA is not set")
    return max(_reported(lambda name=name: run_one(name, console), name, console) for name in names)


def _reported(call: Any, name: str, console: Console) -> int:
    """Call; a user's mistake becomes one line, so that with `all` the other benchmarks still run."""
    try:
        return call() or 0
    except ValueError as error:
        if os.environ.get("EFFCLIP_DEBUG"):
            raise
        console.print(f"benchmarks: error: {name}: {error}", style="red", markup=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
