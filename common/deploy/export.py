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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import add_model, model_arguments, read_labels, read_templates
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
PROGRAM, EXPORT_VERSION = "predict.py", 1
_CHECKED, _TIMED = (1, 3), (1, 32)
"""Batch sizes for the check and for the timing; graphs are exported with another one."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip export", description=__doc__.splitlines()[0])
    add_model(command, positional=True)
    add = command.add_argument
    add("--format", required=True, choices=FORMATS, help="open-clip: weights that open_clip loads, of a plain CLIP")
    add("--out", type=Path, help="a new folder (default: one of the format's name in the model directory)")
    add("--labels-file", help="classes whose embeddings go along, one a line; default: the model's own, if it has some")
    add("--template", help="a prompt with {} for the class name, or a .txt file of such; default: the model's own")
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
    add("--split", default="val", help="(default %(default)s)")
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--limit", type=int, help="the first so many pictures")
    add("--min-agreement", type=float, default=0.95, help="least share of equal labels (default %(default)s)")
    return command


def keep_rates(text: str) -> tuple[float, ...]:
    """Numbers with commas between them. ArgumentTypeError: something else."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of keep rates, such as 0.3,0.5") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: what cannot be exported, and why."""
    args = parser().parse_args(arguments)
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

    deployed = load(**model_arguments(args), device="cpu")
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
    from common.deploy.reduced import Reduction
    from common.evaluate.tasks import Settings

    data = source(args.data, "zeroshot", args.split, Place(args.root))
    return Reduction(args.dtype, data, args.min_agreement, Settings(workers=1, limit=args.limit))


def write_open_clip(deployed: Deployed, folder: Path) -> None:
    """Write a plain CLIP as a folder that open_clip loads. ValueError: the model is of another type."""
    if deployed.model.type != "CLIP":
        raise ValueError(
            f"{deployed.model.name} is of type {deployed.model.type}, for which open_clip has no image tower; only "
            "a plain CLIP can go back"
        )
    clip = deployed.model.images
    clip.save_pretrained(folder)
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

    For ONNX also predict.py and, with ``texts``, the text tower.
    form: "onnx" or "torch-export".  names, templates: of the classes; None: the model's defaults.
    reduction: fewer bits than fp32, of ONNX.  keep: rates of further graphs, of a model with a keep rate, in fp32.
    ValueError: the format lacks an operation, a graph's output differs from the model's, fewer bits change more labels
        than the reduction allows, or the model has no such keep rate.
    """
    from common.conditions import conditions
    from common.deploy.graphs import export_stages, onnx_graph, parity, rates

    names, templates = names or deployed.class_names, templates or deployed.templates
    size, setting = deployed.model.image_size, deployed.setting()
    stages, others = deployed.paths.stages(setting), _at_rates(deployed, keep)
    at_start = {name: value for name, value in conditions("paper").items() if name != "scale"}
    with written_whole(folder) as part:
        part.mkdir()
        answers = _classification(deployed, setting, names, templates, part)  # first: an unknown word is said at once
        files = [part / f"{stage.name}{FORMATS[form]}" for stage in (*stages, *others.values())]
        graphs = export_stages(stages, size, form, files, list(others.values()))
        chains = _chains(stages, others, graphs)
        difference = max(parity(*chain, size, _CHECKED) for chain in chains)
        extra = {"difference": difference, "left_out": _left_out(len(stages), bool(names))}
        if form == "onnx":
            (part / PROGRAM).write_text(standalone("common.deploy.predict"), encoding="utf-8")
            extra |= _write_texts(deployed, part, texts, extra["difference"])
        if extra["difference"] > TOLERANCE:
            raise ValueError(
                f"the graphs differ from the model by {extra['difference']:.1e}, more than {TOLERANCE:g}; "
                "try the other format"
            )
        extra["bytes"] = {"fp32": _bytes(part)}
        report = {
            **_model(deployed, form, stages, files[: len(stages)]),
            "keep_rates": _keep_rates(deployed, stages, others, files),
            **answers,
            **extra,
            "conditions": at_start,
        }
        _write_json(report, part)
        if reduction is not None:
            report |= _reduce(deployed, reduction, files, report)
            chains = _chains(stages, others, [onnx_graph(file) for file in files])
        report["images_per_second"] = {
            path: speed for chain in chains for path, speed in rates(*chain, size, _TIMED).items()
        }
        _write_json(report, part)
    return report


def _at_rates(deployed: Deployed, rates: Sequence[float]) -> dict[float, Stage]:
    """The one stage of each keep rate other than the model's setting, named by its rate."""
    if rates and deployed.setting_name != "keep":
        raise ValueError(f"--keep: {deployed.model.name} has no keep rate to choose; leave it out")
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"--keep {rate:g} must be a share of the tokens in (0, 1], such as 0.5")
    others = sorted({*rates} - {deployed.setting()})
    return {rate: replace(deployed.paths.stages(rate)[0], name=f"keep_{rate:g}") for rate in others}


def _chains(
    stages: Sequence[Stage], others: Mapping[float, Stage], graphs: Sequence[Graph]
) -> list[tuple[Sequence[Stage], Sequence[Graph]]]:
    """Stages with their graphs: the model's own, then each further keep rate's."""
    beside = zip(others.values(), graphs[len(stages) :], strict=True)
    return [(stages, graphs[: len(stages)]), *(([stage], [graph]) for stage, graph in beside)]


def _keep_rates(
    deployed: Deployed, stages: Sequence[Stage], others: Mapping[float, Stage], files: Sequence[Path]
) -> list[dict[str, Any]]:
    """File and GMACs of every keep rate, ascending; empty where there is one graph alone."""
    if not others:
        return []
    by_rate = {deployed.setting(): stages[0], **others}
    entries = [
        {"keep": rate, "file": file.name, "gmacs": _costs([stage], deployed.model.image_size)}
        for (rate, stage), file in zip(by_rate.items(), files, strict=True)
    ]
    return sorted(entries, key=lambda entry: entry["keep"])


def _write_json(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "export.json").write_text(text + "\n", encoding="utf-8")


def _bytes(folder: Path) -> int:
    """The size of the image tower's graphs and weights."""
    texts = ("text.", "tokenizer.", PROGRAM, "classes.", "export.")
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith(texts))


def _reduce(deployed: Deployed, reduction: Reduction, files: Sequence[Path], report: dict[str, Any]) -> dict[str, Any]:
    """Write the graphs in fewer bits, and return the entries of export.json that change."""
    from common.deploy.reduced import STATIC, compare, draw, recalibrated, reduce_graphs

    folder = files[0].parent
    drawn = draw(deployed, reduction) if reduction.dtype == STATIC else {}
    reduce_graphs(files, reduction.dtype, list(drawn.values()))
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
        calibration = recalibrated(deployed.calibration, outcomes, prompts)
        changed |= {"calibration": asdict(calibration), "calibrated_on_these_classes": True}
        if deployed.follows_calibration:  # else all levels run, as in fp32
            setting = calibration.point.setting
            changed |= {"setting": {calibration.knob: setting}, "gate": _gate(setting)}
    return changed


def _model(deployed: Deployed, form: str, stages: Sequence[Stage], files: Sequence[Path]) -> dict[str, Any]:
    """What the graphs are, and what pictures they take."""
    from common.data.images import ORIENTATION

    return {
        "version": EXPORT_VERSION,
        "model": deployed.model.name,
        "type": deployed.model.type,
        "format": form,
        "dtype": "fp32",
        "preprocess": {**asdict(deployed.model.preprocess), "orientation": ORIENTATION},
        "stages": [
            {"file": file.name, "inputs": stage.inputs, "outputs": stage.outputs}
            for stage, file in zip(stages, files, strict=True)
        ],
        "gmacs": _costs(stages, deployed.model.image_size),
    }


def _classification(
    deployed: Deployed, setting: float | None, names: Sequence[str], templates: Sequence[str], folder: Path
) -> dict[str, Any]:
    """How embeddings become answers: classes, whose embeddings are written, scale, gate and calibration."""
    import numpy as np

    has_levels = deployed.setting_name == "threshold"
    calibration = deployed.calibration if deployed.setting_name else None
    if names:
        classes = deployed.classes(names, templates).float().cpu().numpy()
        np.save(folder / "classes.npy", classes, allow_pickle=False)
    return {
        "setting": {deployed.setting_name: setting} if deployed.setting_name else {},
        "embed_dim": _embed_dim(deployed),
        "logit_scale": deployed.scale.item(),
        "class_names": list(names),
        "templates": list(templates),
        "gate": _gate(setting) if has_levels else None,
        "calibration": None if calibration is None else asdict(calibration),
        "calibrated_on_these_classes": bool(
            calibration and names and calibration.prompts == deployed.prompts_hash(names, templates)
        ),
    }


def _gate(threshold: float | None) -> dict[str, Any]:
    """A threshold that no margin reaches is None: every picture goes through all levels."""
    return {"confidence": "margin", "threshold": None if threshold is None or threshold > 1 else threshold}


def _embed_dim(deployed: Deployed) -> int:
    import torch

    size = deployed.model.image_size
    with torch.no_grad():
        return deployed.model.images.encode_image(torch.zeros(1, 3, size, size)).shape[-1]


def _write_texts(deployed: Deployed, folder: Path, wanted: bool, difference: float) -> dict[str, Any]:
    """The entries of the text tower: itself, the greatest difference of any graph, and why it was left out."""
    from common.deploy.text_export import export_texts, words_of

    texts, rest = deployed.model.text_encoder(), "the classes stay those of classes.npy"
    if not wanted:
        return {"text": None, "left_out": [f"the text tower, by --no-text: {rest}"]}
    if words_of(texts) is None:
        return {"text": None, "left_out": [f"the text tower, whose tokenizer is not CLIP's: {rest}"]}
    try:
        entry, text_difference = export_texts(texts, folder)
    except ValueError as error:  # the image tower is worth having without it
        for path in folder.glob("text.*"):
            path.unlink()
        return {"text": None, "left_out": [f"{error}; {rest}"]}
    return {"text": entry, "left_out": [], "difference": max(difference, text_difference)}


def _costs(stages: Sequence[Stage], image_size: int) -> list[float] | None:
    """GMACs of one picture that exits after each stage; None where an operation has no known cost."""
    from common.adaptive import path_costs

    try:
        return [macs.gmacs for macs in path_costs(stages, image_size)]
    except ValueError:
        return None


def _left_out(stages: int, classes: bool) -> list[str]:
    """What the export leaves out, and why."""
    reasons = ["the text tower: its work is done once, " + ("in classes.npy" if classes else "by labels that you name")]
    if stages > 1:
        reasons.append(
            "the loop over levels: its batch shrinks by what the gate finds, which a graph cannot say; run the next "
            "level's graph on the rows whose margin is below the threshold"
        )
    return reasons


def lines(report: dict[str, Any]) -> list[str]:
    """The result in words: the graphs, their accuracy and their speed."""
    many = max(len(report["stages"]), len(report["keep_rates"]))
    of = "the model, in fp32," if "compared" in report else "the model"
    text = [f"{many} graph(s), any batch; greatest difference from {of} {report['difference']:.1e}"]
    if "compared" in report:
        found, dtype = report["compared"], report["dtype"]
        (before, after), (difference, low, high) = (
            [100 * value for value in found[name]] for name in ("accuracy", "difference")
        )
        sizes = " to ".join(f"{report['bytes'][name] / 1e6:.3g} MB" for name in ("fp32", dtype))
        text += [
            f"{dtype}: of {found['pictures']:,} labels {100 * found['agreement']:.2f} % are those of the model"
            + (f"; {found['range_pictures']:,} other pictures chose the ranges" if "range_pictures" in found else ""),
            f"accuracy {before:.2f} % to {after:.2f} %: {difference:+.2f} [{low:+.2f}, {high:+.2f}] points (95 %)",
            f"graphs and weights {sizes}",
        ]
    text.append(f"{'images/s':<16}{'batch':>6}{'model':>10}{report['format']:>14}")
    for path, rates in report["images_per_second"].items():
        for batch, (model, exported) in rates.items():
            text.append(f"{'to ' + path:<16}{batch:>6}{model:>10.0f}{exported:>14.0f}")
    return text + [f"left out: {reason}" for reason in report["left_out"]]
