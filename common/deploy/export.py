"""`effclip export`: a model as a folder that runs without this suite, checked against it.

Each stage (``common.stages``) becomes one graph for any batch size; ONNX graphs share one file of weights. The class
embeddings, the text tower and predict.py go beside them, and export.json says everything that is not in the graphs.
A mistake in the command line is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import add_model, model_arguments, read_labels, read_templates
from common.deploy.standalone import standalone
from common.paths import written_whole

if TYPE_CHECKING:
    from common.deploy.model import Deployed
    from common.stages import Stage

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "open-clip": ".safetensors"}
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
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: what cannot be exported, and why."""
    args = parser().parse_args(arguments)
    names = read_labels(None, args.labels_file)
    templates = None if args.template is None else read_templates(args.template)
    folder = args.out or Path(args.model) / args.format
    if args.out is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model} is no folder, so --out must say where the graphs go")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder.absolute()} is there already; name a new folder with --out")
    if args.no_text and args.format != "onnx":
        raise ValueError(f"--no-text goes with --format onnx; {args.format} does not say it of the text tower")
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
    report = write_graphs(deployed, args.format, folder, names, templates, texts=not args.no_text)
    print("\n".join(lines(report)))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


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
) -> dict[str, Any]:
    """Write a folder whole: graphs, class embeddings and export.json, whose content is returned.

    For ONNX also predict.py and, with ``texts``, the text tower.
    form: "onnx" or "torch-export".  names, templates: of the classes; None: the model's defaults.
    ValueError: the format lacks an operation, or a graph's output differs from the model's.
    """
    from common.conditions import conditions
    from common.deploy.graphs import export_stages, parity, rates

    names, templates = names or deployed.class_names, templates or deployed.templates
    size, setting = deployed.model.image_size, deployed.setting()
    stages = deployed.paths.stages(setting)
    at_start = {name: value for name, value in conditions("paper").items() if name != "scale"}
    with written_whole(folder) as part:
        part.mkdir()
        files = [part / f"{stage.name}{FORMATS[form]}" for stage in stages]
        graphs = export_stages(stages, size, form, files)
        difference = parity(stages, graphs, size, _CHECKED)
        text, left_out = None, []
        if form == "onnx":
            (part / PROGRAM).write_text(standalone("common.deploy.predict"), encoding="utf-8")
            text, text_difference, left_out = _write_texts(deployed, part, texts)
            difference = max(difference, text_difference)
        if difference > TOLERANCE:
            raise ValueError(
                f"the graphs differ from the model by {difference:.1e}, more than {TOLERANCE:g}; try the other format"
            )
        report = {
            "version": EXPORT_VERSION,
            "model": deployed.model.name,
            "type": deployed.model.type,
            "format": form,
            "preprocess": {**asdict(deployed.model.preprocess), "orientation": "turned by EXIF"},
            "stages": [
                {"file": file.name, "inputs": stage.inputs, "outputs": stage.outputs}
                for stage, file in zip(stages, files, strict=True)
            ],
            "gmacs": _costs(stages, size),
            "setting": {deployed.setting_name: setting} if deployed.setting_name else {},
            **_classification(deployed, setting, names, templates, part),
            "text": text,
            "difference": difference,
            "images_per_second": rates(stages, graphs, size, _TIMED),
            "left_out": left_out if form == "onnx" else _left_out(len(stages), bool(names)),
            "conditions": at_start,
        }
        (part / "export.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


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
        "embed_dim": _embed_dim(deployed),
        "logit_scale": deployed.scale.item(),
        "class_names": list(names),
        "templates": list(templates),
        "gate": {"confidence": "margin", "threshold": setting if setting <= 1 else None} if has_levels else None,
        "calibration": None if calibration is None else asdict(calibration),
        "calibrated_on_these_classes": bool(
            calibration and names and calibration.prompts == deployed.prompts_hash(names, templates)
        ),
    }


def _embed_dim(deployed: Deployed) -> int:
    import torch

    size = deployed.model.image_size
    with torch.no_grad():
        return deployed.model.images.encode_image(torch.zeros(1, 3, size, size)).shape[-1]


def _write_texts(deployed: Deployed, folder: Path, wanted: bool) -> tuple[dict[str, Any] | None, float, list[str]]:
    """The text tower's entry, its greatest difference from the model, and why it was left out."""
    from common.deploy.text_export import export_texts, words_of

    if not wanted:
        return None, 0.0, ["the text tower, by --no-text: the classes stay those of classes.npy"]
    texts = deployed.model.text_encoder()
    if words_of(texts) is None:
        return None, 0.0, ["the text tower, whose tokenizer is not CLIP's: the classes stay those of classes.npy"]
    return *export_texts(texts, folder), []


def _costs(stages: Sequence[Stage], image_size: int) -> list[float] | None:
    """GMACs of one picture that exits after each stage; None where an operation has no known cost."""
    from common.deploy.paths import path_costs

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
    many = len(report["stages"])
    text = [f"{many} graph(s), any batch; greatest difference from the model {report['difference']:.1e}"]
    text.append(f"{'images/s':<16}{'batch':>6}{'model':>10}{report['format']:>14}")
    for path, rates in report["images_per_second"].items():
        for batch, (model, exported) in rates.items():
            text.append(f"{'to ' + path:<16}{batch:>6}{model:>10.0f}{exported:>14.0f}")
    return text + [f"left out: {reason}" for reason in report["left_out"]]
