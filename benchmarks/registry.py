"""Every table and figure once: its name, paper and item, one line about it, the module that makes it, and its needs.

`python -m benchmarks`, `make help`, `make reproduce-NAME`, the report page and the tests all read this list. It needs
nothing but Python, so that `make help` works before anything is installed.

A maker is a module of ``benchmarks``, or an object in one (``module:object``), with

* ``run(smoke) -> result``: plain values, with "name" and "conditions"; None: it trained a part, and there is no result;
* ``render(result) -> {"md": Markdown, "figures": {name: matplotlib figure}}``;
* ``compare(result) -> iterable of Comparison``, if the paper prints numbers of the same kind;
* ``missing(result) -> iterable of (what, command)``, if a result may lack embedded runs;
* ``folder() -> path``, if its result does not belong to the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cells import Comparison, Result

PAPERS = {
    "WAVECLIP": "arXiv 2509.21153",
    "MLIP": "ICML 2024, arXiv 2406.01460",
    "Patch Ranking": "WACV 2025, arXiv 2409.14607",
}
"""The papers and their publication."""


@dataclass(frozen=True)
class Benchmark:
    """One table or figure.

    name: that of its command and of its result files.  about: one line.  maker: see the top of this file.
    paper, item: the table or figure that it reproduces; None: it goes beyond the papers.
    fill: the command that fills the numbers at the paper's own scale; None: its own command.
    trains: the action, with its arguments, that trains the embedded runs which it collects.
    needs: an environment variable; `all` skips the benchmark where it is not set.
    each: it has a result for each "data" set or each "device", NAME-DATA or NAME-DEVICE; None: it has one, NAME.
    """

    name: str
    about: str
    maker: str
    paper: str | None = None
    item: str | None = None
    fill: str | None = None
    trains: str | None = None
    needs: str | None = None
    each: str | None = None

    @property
    def title(self) -> str:
        """Paper and item, or ``about`` for a benchmark beyond the papers."""
        return self.about if self.paper is None else f"{self.paper}, {self.item}"

    @property
    def command(self) -> str:
        """The command that makes its numbers anew."""
        return f"make reproduce-{self.name}"

    def stem(self, result: Result) -> str:
        """What the files of a result are called."""
        if self.each != "device":
            return result["name"]
        return f"{self.name}-{re.sub('[^a-z0-9]+', '-', result['conditions']['device'].lower()).strip('-')}"

    def files(self, folder: Path) -> list[Path]:
        """Its results in ``folder``: by name, those of devices the newest first."""
        paths = sorted(folder.glob(f"{self.name}{'-*' if self.each else ''}.json"))
        if self.each == "device":
            paths.sort(key=lambda path: json.loads(path.read_text())["conditions"]["date"], reverse=True)
        return paths

    def load(self) -> Any:
        """Import and return the maker."""
        module, _, attribute = self.maker.partition(":")
        maker = import_module(f"benchmarks.{module}")
        return getattr(maker, attribute) if attribute else maker

    def compare(self, result: Result) -> list[Comparison]:
        """The paper's numbers beside ours; empty if the maker compares nothing."""
        return list(getattr(self.load(), "compare", _nothing)(result))

    def missing(self, result: Result) -> list[tuple[str, str]]:
        """The embedded runs that a result lacks, each with the command that makes it."""
        return list(getattr(self.load(), "missing", _nothing)(result))


@dataclass(frozen=True)
class Absent:
    """A table or figure of a paper without a benchmark, and why."""

    paper: str
    item: str
    about: str
    why: str


@dataclass(frozen=True)
class Action:
    """A command beside the benchmarks: ``main(arguments) -> exit code`` in a module of ``benchmarks``."""

    name: str
    about: str
    module: str

    def main(self, arguments: Iterable[str] = ()) -> int:
        """Import its module and run it; returns the exit code."""
        return import_module(f"benchmarks.{self.module}").main(list(arguments)) or 0


def _nothing(result: Result) -> tuple[()]:
    return ()


def _waveclip(name: str, item: str, about: str, maker: str, **others: str) -> Benchmark:
    return Benchmark(name, about, f"waveclip.{maker}", "WAVECLIP", item, **others)


def _mlip(item: str, about: str, maker: str, **others: str) -> Benchmark:
    name = item.lower().replace("figure ", "fig").replace("table ", "table")
    return Benchmark(f"mlip-{name}", about, f"mlip.{maker}", "MLIP", item, **others)


def _ablation(number: int, about: str, **others: str) -> Benchmark:
    return _mlip(f"Table {number}", about, f"tables_3_5_6_7_8:TABLE_{number}", **others)


def _patchrank(name: str, item: str, about: str, maker: str | None = None, **others: str) -> Benchmark:
    return Benchmark(f"patchrank-{name}", about, f"patchrank.{maker or name}", "Patch Ranking", item, **others)


_YFCC15M, _CC3M = "lightning fit -c mlip/yfcc15m.yaml", "lightning fit -c mlip/cc3m.yaml"
_SIZES = f"{_CC3M}; lightning fit -c mlip/cc12m.yaml; {_YFCC15M}"
_IMAGENET = "IMAGENET=DIR WEIGHTS=DIR make reproduce-table2"
_RUNS = "patchrank-runs"
BENCHMARKS = (
    _waveclip("waveclip-table1", "Table 1", "tokens after every level", "table1"),
    _waveclip("table2", "Table 2", "tokens, multiply-adds and accuracy of ten models", "table2", fill=_IMAGENET),
    _waveclip("waveclip-fig1", "Figure 1", "accuracy against multiply-adds", "fig1"),
    _waveclip("waveclip-fig3", "Figure 3", "with and without the cache", "fig3"),
    _waveclip("waveclip-fig4", "Figure 4", "the margin against the maximum probability as a gate", "fig4"),
    _mlip("Table 1", "ImageNet, zero-shot and linear probe", "tables_1_2_4:TABLE_1", fill=_YFCC15M),
    _mlip(
        "Table 2",
        "ten smaller data sets, zero-shot and linear probe",
        "tables_1_2_4:TABLE_2",
        fill=f"{_YFCC15M} -c mlip/vit_b_32.yaml",
    ),
    _ablation(3, "less data", fill=_SIZES),
    _mlip("Table 4", "retrieval on Flickr30k and MS-COCO", "tables_1_2_4:TABLE_4", fill=_YFCC15M),
    _ablation(5, "label smoothing and nearest neighbours", fill=_YFCC15M),
    _ablation(6, "frequency transform and token alignment", fill=_CC3M),
    _ablation(7, "the matchings of tokens", fill=_CC3M),
    _ablation(8, "with and without the Guide", fill=_CC3M),
    _mlip("Table 9", "multiply-adds", "table9", fill=_CC3M),
    _mlip("Table 10", "training time, and accuracy for it", "table10", fill=_CC3M),
    _mlip("Figure 2", "likeness of tokens, and removing some at random", "fig2"),
    _mlip("Figure 5", "pictures found for a caption", "fig5"),
    _mlip("Figure 6", "what the Lego-Filter passes", "fig6"),
    _mlip("Figure 7", "the embedding space", "fig7"),
    _patchrank("fig1", "Figure 1", "accuracy by keep rate, with and without prompts", trains=_RUNS),
    _patchrank("fig3", "Figure 3", "the three scores, patch by patch"),
    _patchrank("fig4", "Figure 4", "the patches kept at 50 %"),
    _patchrank("fig5", "Figure 5", "pruning before the first block, without tuning", trains=_RUNS),
    _patchrank("table1", "The table of its code", "methods and data sets at one keep rate", trains=_RUNS),
    _patchrank("costs", "Costs", "every method by keep rate, of which the paper prints one number", each="device"),
    Benchmark(
        "waveclip-shapes", "WaveCLIP and its controls on scenes of shape, over training seeds", "waveclip.shapes"
    ),
    Benchmark(
        "waveclip-gates",
        "one threshold for several data sets: the margin against the maximum probability",
        "waveclip.gates",
    ),
    Benchmark("mlip-shapes", "MLIP and its rivals from scratch on scenes of shape and texture", "mlip.shapes"),
    Benchmark(
        "waveclip-highres",
        "WaveCLIP of two and three levels at 448 and 512 px; the embedded one at 96 px",
        "waveclip.highres",
    ),
    Benchmark(
        "frontier", "the three methods and their compositions: accuracy against cost and time", "together.frontier"
    ),
    Benchmark(
        "embedded-reference",
        "what the embedded benchmark measures: its teacher beside chance, colours alone and grey pictures",
        "together.embedded_reference",
    ),
    Benchmark(
        "embedded-models", "zero-shot, retrieval and linear probe of the embedded models", "together.embedded_models"
    ),
    Benchmark(
        "fashion-mnist",
        "a CLIP and a WaveCLIP trained and tested on Fashion-MNIST (needs EFFCLIP_DATA)",
        "together.fashion_mnist",
        needs="EFFCLIP_DATA",
    ),
    Benchmark(
        "reducer-costs",
        "every token reducer at ViT-B/16: multiply-adds, and speed beside the whole tower",
        "together.reducer_costs",
        each="device",
    ),
    Benchmark("fewer-patches", "FLIP and A-CLIP: pretraining on a part of each picture", "patchrank.pretraining"),
    Benchmark("models", "what works on each of open_clip's architectures", "together.architectures"),
    Benchmark(
        "photos",
        "a CLIP and a WaveCLIP for the pictures in PHOTOS, one folder a class, beside fair controls",
        "together.photos",
        needs="PHOTOS",
        each="data",
    ),
    Benchmark(
        "deploy", "classify, calibrate, convert and export, with what they print", "together.deploy", each="device"
    ),
    Benchmark(
        "runtime",
        "the exported folder's program without torch, beside classify, on all test pictures",
        "together.runtime",
    ),
    Benchmark(
        "speed", "our towers and MLIP's training step, each against its reference", "speed.towers", each="device"
    ),
    Benchmark("loading", "our shard loader against open_clip's", "speed.loading", each="device"),
)
"""All benchmarks, those of the papers first."""
NOT_MEASURED = "nothing in it is measured"
ABSENT = (
    Absent("WAVECLIP", "Figure 2", "not in the text that we have", "there is nothing to compare with"),
    Absent("MLIP", "Tables 11 to 13", "data sets and sizes", "they are our catalogue and recipes"),
    Absent("MLIP", "Figure 1", "pictures and their spectra", NOT_MEASURED),
    Absent("MLIP", "Figures 3 and 4", "drawings of the method", NOT_MEASURED),
    Absent("Patch Ranking", "Figure 2", "a drawing of the method", NOT_MEASURED),
    Absent(
        "Patch Ranking", "Tables 1 to 7", "not in the text that we have", "the table of its released code stands here"
    ),
)
"""The other tables and figures of the papers."""
ACTIONS = (
    Action("retrain", "train the embedded models again (--list; ONLY=NAME)", "training.retrain"),
    Action("mlip-shapes-runs", "train MLIP and its rivals from scratch (--only NAME, --list)", "mlip.shapes_runs"),
    Action("mlip-dry-run", "fill every cell of MLIP's tables with the numbers of a miniature", "mlip.dry_run"),
    Action("patchrank-runs", "train what Patch Ranking's tables show (--list, --seeds N)", "patchrank.runs"),
    Action("figures", "draw every picture again from the stored results", "figures"),
    Action("evaluations", "tables of `effclip evaluate` results (DIR ... [--out FILE])", "together.evaluations"),
    Action("report", "write the tables of README and docs, and one HTML page (--page FILE)", "report.pages"),
    Action("screenshots", "photograph that page for the README (needs chromium)", "report.screenshots"),
)
"""Commands beside the benchmarks."""


def benchmark(name: str) -> Benchmark:
    """The entry of a benchmark. ValueError: there is none of that name."""
    return _named(name, BENCHMARKS, "benchmark")


def benchmark_of(result: str) -> Benchmark:
    """The entry that a result file of this name belongs to. ValueError: none does."""
    several = (entry for entry in BENCHMARKS if entry.each and result.startswith(f"{entry.name}-"))
    return next(several, None) or benchmark(result)


def results(name: str, folder: Path) -> list[Result]:
    """The stored results of a benchmark, those of devices the newest first; or the one result of this name.

    ValueError: there is no such benchmark.
    """
    entry = benchmark_of(name)
    return [json.loads(path.read_text()) for path in entry.files(folder) if name in (entry.name, path.stem)]


def action(name: str) -> Action:
    """The entry of an action. ValueError: there is none of that name."""
    return _named(name, ACTIONS, "action")


def _named(name: str, entries: Sequence[Any], kind: str) -> Any:
    by_name = {entry.name: entry for entry in entries}
    if name not in by_name:
        raise ValueError(f"no {kind} {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


def listing(prefix: str = "") -> str:
    """Every benchmark with its line, then every action. prefix: stands before a benchmark's name, without actions."""
    lines = [
        (f"{prefix}{entry.name}", entry.about if entry.paper is None else f"{entry.title}: {entry.about}")
        for entry in BENCHMARKS
    ]
    if not prefix:
        lines += [("all", "every benchmark, in one process"), *((entry.name, entry.about) for entry in ACTIONS)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines)
