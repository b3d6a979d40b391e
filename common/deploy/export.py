"""`effclip export`: a model as a folder that runs without this suite, checked against it.

Each stage (``common.stages``) becomes one graph for any batch size; ONNX graphs share one file of weights. The class
embeddings, the text tower and predict.py go beside them, and export.json says everything that is not in the graphs.
A mistake in the command line is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.arguments import (
    CommandParser,
    add_first,
    add_model,
    model_arguments,
    number,
    read_labels,
    read_templates,
    whole_number,
)
from common.deploy.standalone import standalone
from common.paths import written_whole

if TYPE_CHECKING:
    from common.deploy.graphs import Graph
    from common.deploy.model import Deployed
    from common.deploy.reduced import Reduction
    from common.stages import Stage

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "open-clip": ".safetensors"}
DTYPES = ("fp32", "fp16", "bf16", "int8", "int8-static")
TOLERANCE = 1e-4
"""The greatest allowed difference between the outputs of an exported graph and of the model."""
PROGRAM = "predict.py"
_Item = TypeVar("_Item")
_KEEP = number("a share of the tokens in (0, 1], such as 0.5", lambda value: 0 < value <= 1)
_CHECKED, _TIMED = (1, 3), (1, 32)
"""Batch sizes for the check and for the timing; graphs are exported with another one."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip export", description=__doc__.splitlines()[0])
    add_model(command, positional=True)
    add_first(command)
    add = command.add_argument
    add("--format", required=True, choices=FORMATS, help="open-clip: weights that open_clip loads, of a plain CLIP")
    add("--out", type=Path, help="a new folder (default: one of the format's name in the model directory)")
    add("--labels-file", help="classes whose embeddings go along, one a line; default: the model's own, if it has some")
    add("--template", help="a prompt with {} for the class name, or a .txt file of such; default: the model's own")
    add(
        "--calibration",
        metavar="NAME|FILE",
        help="what `effclip calibrate` stored, which the folder follows; default: that of a model directory",
    )
    add("--no-text", action="store_true", help="of onnx: leave the text tower out, which other class names need")
    add(
        "--keep",
        type=keep_rates,
        default=(),
        help='of onnx: graphs at other keep rates too, as "0.3,0.5", on one weights file',
    )
    fewer = command.add_argument_group("fewer bits, of onnx: held to the answers of the model on labelled pictures")
    add = fewer.add_argument
    add(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="int8: linear maps, with activations' ranges found as they come; int8-static: found beforehand, on "
        "pictures drawn from --data; fp16, bf16: weights (default %(default)s)",
    )
    add("--data", help="the pictures: embedded, a set of the catalogue, a folder of class folders, or a table")
    add("--split", help="default: val, of undivided pictures all")
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--limit", type=whole_number(1), help="so many pictures alone, as `effclip evaluate`")
    add(
        "--min-agreement", type=float, default=0.95, help="least share of equal labels at a level (default %(default)s)"
    )
    return command


def keep_rates(text: str) -> tuple[float, ...]:
    """Shares of the tokens, with commas between them. ArgumentTypeError: something else."""
    return tuple(_KEEP(word) for word in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: what cannot be exported, and why."""
    args = parser().parse_args(arguments)
    named = model_arguments(args)
    names = read_labels(None, args.labels_file)
    templates = None if args.template is None else read_templates(args.template)
    folder = args.out or Path(args.model) / args.format
    if args.out is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model} is no folder, so --out must say where the graphs go")
    if not folder.name:  # "." cannot be replaced under the feet of a shell
        raise ValueError(f"{folder.absolute()} is the working directory; name a new folder with --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder.absolute()} is there already; name a new folder with --out")
    if args.no_text and args.format != "onnx":
        raise ValueError(f"--no-text goes with --format onnx; {args.format} does not say it of the text tower")
    if (args.dtype != "fp32") != (args.data is not None) or (args.data and args.format != "onnx"):
        raise ValueError(
            f"--dtype {args.dtype} with --data {args.data}: graphs in fewer bits are of --format onnx, and need "
            "labelled pictures on which they are compared with the model; fp32 needs none"
        )
    if args.first is not None and args.format == "open-clip":
        raise ValueError("--first with --format open-clip: a cascade is exported as graphs; export the models alone")
    if args.keep and (args.format != "onnx" or args.dtype != "fp32"):
        raise ValueError(
            f"--keep with --format {args.format} and --dtype {args.dtype}: several keep rates in one folder are of "
            "onnx in fp32; export a folder for each rate"
        )
    if not 0 <= args.min_agreement <= 1:
        raise ValueError(f"--min-agreement {args.min_agreement:g} must be a share in [0, 1], such as 0.95")
    if args.format == "open-clip" and (names or templates):
        raise ValueError("--labels-file and --template go with graphs; open_clip has the text tower itself")
    from common.deploy.model import load

    deployed = load(**named, device="cpu", calibration=args.calibration, first=args.first)
    if args.format == "open-clip":
        try:
            write_open_clip(deployed, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # the folder was new, and half an export is useless
            raise
        print(f"{folder}: open_clip.create_model('local-dir:{folder}')")
        return 0
    reduction = None if args.data is None else _reduction(args)
    report = write_graphs(deployed, args.format, folder, names, templates, not args.no_text, reduction, args.keep)
    print("\n".join(lines(report)))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def _reduction(args: argparse.Namespace) -> Reduction:
    from common.data.lookup import Place, source
    from common.deploy.calibrate import split_for
    from common.deploy.reduced import Reduction
    from common.evaluate.tasks import Settings

    data = source(args.data, "zeroshot", split_for(args.data, args.split), Place(args.root))
    return Reduction(args.dtype, data, args.min_agreement, Settings(workers=1, limit=args.limit), args.data)


def write_open_clip(deployed: Deployed, folder: Path) -> None:
    """Write a plain CLIP as a folder that open_clip loads. ValueError: the model is of another type."""
    from common import directory
    from common.deploy.card import licence
    from common.models import OPEN_CLIP

    if deployed.model.type == OPEN_CLIP:
        raise ValueError(f"{deployed.model.name} is open_clip's already; its own save_pretrained writes such a folder")
    if deployed.model.type != "CLIP":
        raise ValueError(
            f"{deployed.model.name} is of type {deployed.model.type}, for which open_clip has no image tower; only "
            "a plain CLIP can go back"
        )
    clip = deployed.model.images
    run = {} if deployed.model.folder is None else directory.read(deployed.model.folder).run
    clip.save_pretrained(folder, "\n".join(licence(run)))
    vocabulary = clip.architecture["text_cfg"].get("vocabulary")
    if vocabulary is not None:
        print(f"its vocabulary is cut to {len(vocabulary):,} ids: make text ids by common.tokenizer, not by open_clip")


def write_graphs(
    deployed: Deployed,
    form: str,
    folder: Path,
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    texts: bool = True,
    reduction: Reduction | None = None,
    keep: Sequence[float] = (),
) -> dict[str, Any]:
    """Write a folder whole: graphs, class embeddings and export.json, whose content is returned.

    For ONNX also predict.py and, with ``texts``, the text tower. A cascade has two of what belongs to a model.
    form: "onnx" or "torch-export".  names, templates: of the classes; None: the model's defaults.
    reduction: fewer bits than fp32, of ONNX.  keep: rates of further graphs, of a model with a keep rate, in fp32.
    ValueError: the format lacks an operation, a graph's output differs from the model's, fewer bits change more labels
        than the reduction allows, or the model has no such keep rate.
    """
    from common.conditions import conditions
    from common.deploy.export_entries import classification_entries, keep_rate_entries, model_entries
    from common.deploy.graphs import export_stages, onnx_graph, parity

    names, templates = _named(deployed, names, reduction), templates or deployed.templates
    setting, others = deployed.setting(), _at_rates(deployed, keep)
    own = own_chains(deployed, setting)
    chains = [*own, *(([stage], deployed.model.image_size) for stage in others.values())]
    stages = [stage for chain, _ in own for stage in chain]
    at_start = {name: value for name, value in conditions("paper").items() if name != "scale"}
    with written_whole(folder) as part:
        part.mkdir()
        # Classes first: an unknown word is said at once.
        answers = classification_entries(deployed, setting, names, templates, part)
        files = [part / f"{stage.name}{FORMATS[form]}" for chain, _ in chains for stage in chain]
        run = _with_graphs(chains, export_stages(chains, form, files))
        difference = max(parity(*chain, _CHECKED) for chain in run)
        extra = {"difference": difference, "left_out": _left_out(len(stages), part)}
        if form == "onnx":
            extra = _write_beside(deployed, part, texts, answers, difference)
        if extra["difference"] > TOLERANCE:
            raise ValueError(
                f"the graphs differ from the model by {extra['difference']:.1e}, more than {TOLERANCE:g}; "
                "try the other format"
            )
        extra["bytes"] = {"fp32": _bytes(part)}
        report = {
            **model_entries(deployed, form, stages, files[: len(stages)]),
            "keep_rates": keep_rate_entries(deployed, stages, others, files),
            **answers,
            **extra,
            "conditions": at_start,
        }
        _write_json(report, part)
        if reduction is not None:
            report |= _reduce(deployed, reduction, [graphs for _, graphs, _ in _with_graphs(own, files)], report)
            run = _with_graphs(chains, [onnx_graph(file) for file in files])
        report["images_per_second"] = _speeds(deployed, run)
        _write_json(report, part)
    return report


def _named(deployed: Deployed, names: Sequence[str] | None, reduction: Reduction | None) -> Sequence[str]:
    """The classes of an export. ValueError: the pictures of a reduction have others."""
    from common.deploy.reduced import check_classes

    names = names or deployed.class_names
    if reduction is not None:
        names = names or reduction.data.class_names
        check_classes(reduction, names)
    return names


def _write_beside(
    deployed: Deployed, folder: Path, texts: bool, answers: dict[str, Any], difference: float
) -> dict[str, Any]:
    """Write predict.py and the text towers, which each model's entries in ``answers`` then name.

    The greatest difference of any graph, and why a text tower was left out.
    """
    from common.deploy.text_export import write_texts

    (folder / PROGRAM).write_text(standalone("common.deploy.predict"), encoding="utf-8")
    entries, left_out, text_difference = write_texts(deployed.members, folder, texts)
    for member, entry in zip(answers.get("members", [answers]), entries, strict=True):
        member["text"] = entry
    return {"difference": max(difference, text_difference), "left_out": left_out}


def _at_rates(deployed: Deployed, rates: Sequence[float]) -> dict[float, Stage]:
    """The one stage of each keep rate other than the model's setting, named by its rate."""
    if rates and deployed.setting_name != "keep":
        raise ValueError(f"--keep: {deployed.name} has no keep rate to choose; leave it out")
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"--keep {rate:g} must be a share of the tokens in (0, 1], such as 0.5")
    others = sorted({*rates} - {deployed.setting()})
    return {rate: replace(deployed.paths.stages(rate)[0], name=f"keep_{rate:g}") for rate in others}


def own_chains(deployed: Deployed, setting: float | None) -> list[tuple[Sequence[Stage], int]]:
    """The model's stages with its image size; of a cascade each model's one stage, which begins with its pictures."""
    from common.stages import EncodeImage, Stage

    if deployed.first is None:
        return [(deployed.paths.stages(setting), deployed.model.image_size)]
    models = [member.model for member in deployed.members]
    return [
        ([Stage(f"level_{place}", EncodeImage(model.images), ("images",), ("embedding",))], model.image_size)
        for place, model in enumerate(models)
    ]


def _with_graphs(
    chains: Sequence[tuple[Sequence[Stage], int]], graphs: Sequence[_Item]
) -> list[tuple[Sequence[Stage], Sequence[_Item], int]]:
    """Each chain's stages, their graphs or files, and the image size."""
    left = iter(graphs)
    return [(stages, list(islice(left, len(stages))), size) for stages, size in chains]


def _speeds(
    deployed: Deployed, run: Sequence[tuple[Sequence[Stage], Sequence[Graph], int]]
) -> dict[str, dict[int, tuple[float, float]]]:
    """``rates`` of every path; one through a cascade takes the time of both models."""
    from common.deploy.graphs import rates

    found = {path: speeds for chain in run for path, speeds in rates(*chain, _TIMED).items()}
    if deployed.first is not None:
        first, second = found.values()
        found["level_1"] = {
            batch: tuple(1 / (1 / a + 1 / b) for a, b in zip(first[batch], second[batch], strict=True))
            for batch in _TIMED
        }
    return found


def _write_json(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "export.json").write_text(text + "\n", encoding="utf-8")


def _bytes(folder: Path) -> int:
    """The size of the image tower's graphs and weights."""
    texts = ("text", "tokenizer.", PROGRAM, "classes", "export.")
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith(texts))


def _reduce(
    deployed: Deployed, reduction: Reduction, chains: Sequence[Sequence[Path]], report: dict[str, Any]
) -> dict[str, Any]:
    """Write the graphs in fewer bits, and return the entries of export.json that change.

    chains: the files of the graphs of each of ``members``.
    """
    from common.deploy.export_entries import gate
    from common.deploy.reduced import STATIC, compare, draw, recalibrated, reduce_graphs

    folder = chains[0][0].parent
    drawn = draw(deployed, reduction) if reduction.dtype == STATIC else {}
    reduce_graphs(chains, reduction.dtype, list(zip(*drawn.values(), strict=True)))
    result, outcomes = compare(deployed, folder, reduction, drawn.keys())
    if drawn:
        result["range_pictures"] = len(drawn)
    changed: dict[str, Any] = {
        "dtype": reduction.dtype,
        "compared": {**result, "split": reduction.data.split, "data_version": reduction.data.version},
        "bytes": report["bytes"] | {reduction.dtype: _bytes(folder)},
    }
    if report["calibration"] is not None and outcomes.confidence is not None:
        prompts = deployed.prompts_hash(report["class_names"], report["templates"])
        calibration = recalibrated(deployed.calibration, outcomes, prompts, reduction, report["conditions"])
        changed |= {"calibration": asdict(calibration), "calibrated_on_these_classes": True}
        if deployed.follows_calibration:  # else all levels run, as in fp32
            setting = calibration.point.setting
            changed |= {"setting": {calibration.knob: setting}, "gate": gate(setting)}
    return changed


def _left_out(stages: int, folder: Path) -> list[str]:
    """What the export leaves out, and why."""
    from common.deploy.text_export import class_files

    files = class_files(folder)
    reasons = ["the text tower: its work is done once, " + (f"in {files}" if files else "by labels that you name")]
    if stages > 1:
        reasons.append(
            "the loop over levels: its batch shrinks by what the gate finds, which a graph cannot say; run the next "
            "level's graph on the rows whose margin is below the threshold"
        )
    return reasons


def _compared(level: dict[str, Any]) -> str:
    """What fewer bits change of a level's answers."""
    (before, after), (difference, low, high) = (
        [100 * value for value in level[name]] for name in ("accuracy", "difference")
    )
    return (
        f"{100 * level['agreement']:.2f} % of the labels are those of the model; accuracy {before:.2f} % to "
        f"{after:.2f} %: {difference:+.2f} [{low:+.2f}, {high:+.2f}] points (95 %)"
    )


def lines(report: dict[str, Any]) -> list[str]:
    """The result in words: the graphs, their accuracy and their speed."""
    many = max(len(report["stages"]), len(report["keep_rates"]))
    of = "the model, in fp32," if "compared" in report else "the model"
    text = [f"{many} graph(s), any batch; greatest difference from {of} {report['difference']:.1e}"]
    if "compared" in report:
        found, dtype = report["compared"], report["dtype"]
        sizes = " to ".join(f"{report['bytes'][name] / 1e6:.3g} MB" for name in ("fp32", dtype))
        ranges = found.get("range_pictures")
        text += [
            f"{dtype}, compared on {found['pictures']:,} pictures"
            + (f"; {ranges:,} other pictures chose the ranges" if ranges else ""),
            *(
                f"to {Path(stage['file']).stem}: {_compared(level)}"
                for stage, level in zip(report["stages"], found["levels"], strict=True)
            ),
            f"graphs and weights {sizes}",
        ]
    text.append(f"{'images/s':<16}{'batch':>6}{'model':>10}{report['format']:>14}")
    for path, rates in report["images_per_second"].items():
        for batch, (model, exported) in rates.items():
            text.append(f"{'to ' + path:<16}{batch:>6}{model:>10.0f}{exported:>14.0f}")
    return text + [f"left out: {reason}" for reason in report["left_out"]]
