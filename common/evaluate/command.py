"""`effclip evaluate`: zero-shot accuracy, retrieval and linear probe of a model on a data set, into JSON files.

Each task writes one file, which states its conditions. The file's name depends on everything that its numbers depend
on, so a task whose file exists is not computed again. torch is imported only after the command line was checked.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common.arguments import (
    DTYPES,
    CommandParser,
    add_first,
    add_model,
    folder_for_results,
    model_arguments,
    whole_number,
)
from common.evaluate.points import (
    add_image_size,
    add_point,
    at_size,
    behind,
    check_reducers,
    completed,
    mean_macs,
    model_at,
    read_point,
)
from common.evaluate.prompts import OWN, TEMPLATE_HELP, chosen_templates, prompts_hash, value_hash
from common.paths import check_writable, runs_directory, written_whole

if TYPE_CHECKING:
    from torch import Tensor

    from common.data.lookup import Captioned, Labelled
    from common.evaluate.tasks import Settings
    from common.models import Model
    from common.zeroshot import Template

EVALUATIONS = ("zeroshot", "retrieval", "linear-probe")
SHOTS, FEATURES, SEEDS = "full", "embedding", 3
"""What a linear probe's options are where they are not given."""
OF_TASK = {
    "zeroshot": ("template",),
    "retrieval": ("captions",),
    "linear-probe": ("shots", "features", "seeds"),
}
"""The options that one task alone reads."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip evaluate", description=__doc__.splitlines()[0])
    add = command.add_argument
    add_model(command)
    add(
        "--data",
        required=True,
        help="embedded, a set of the catalogue (food101; dtd@coop takes the coop protocol), webdataset:FOLDER "
        "of a set that CLIP_benchmark exported, a folder with one folder a class, or a .csv or .tsv with columns path "
        "and class",
    )
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--captions", help="Karpathy's json file, for retrieval on flickr30k or coco")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add("--tasks", default=EVALUATIONS[0], help=f"one or more of {','.join(EVALUATIONS)} (default %(default)s)")
    add("--split", help="default: the split that the papers report each task on")
    add("--template", help=TEMPLATE_HELP)
    add("--shots", help=f"linear probe: samples of each class, or full, such as 1,4,16,full (default {SHOTS})")
    add(
        "--features",
        choices=("embedding", "penultimate"),
        help="linear probe: of the joint embedding, or of what is before its projection, as in the papers of CLIP, "
        f"SLIP and MLIP (default {FEATURES})",
    )
    add("--seeds", type=int, help=f"linear probe: random draws of each number of shots (default {SEEDS})")
    add(
        "--limit",
        type=whole_number(1),
        help="evaluate only LIMIT pictures of each split: drawn by chance, the same each time; of shards the first",
    )
    add("--batch-size", type=whole_number(1), default=256, help="pictures in a batch (default %(default)s)")
    add("--workers", type=whole_number(0), default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--dtype", choices=DTYPES, default="float32", help="of the image tower (default %(default)s)")
    add("--out", type=folder_for_results, help="folder of the result files (default evaluations in $EFFCLIP_RUNS)")
    add_image_size(command)
    add_first(command, " (zeroshot alone)")
    add_point(command)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError: something is missing, or two arguments do not fit together."""
    args = parser().parse_args(arguments)
    args.tasks = _tasks(args.tasks)
    _check_used(args)
    args.shots, args.features = _shots(args.shots or SHOTS), args.features or FEATURES
    args.seeds = SEEDS if args.seeds is None else args.seeds
    named = model_arguments(args)
    args.point = read_point(args)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be at least 1")
    if args.threshold is not None and args.tasks != ["zeroshot"]:
        raise ValueError(f"--threshold {args.threshold:g} stops by the classes of zeroshot; take --tasks zeroshot")
    if args.first is not None and args.threshold is None:
        raise ValueError(f"--first {args.first} needs --threshold, the margin at which its answer stands")
    if args.reducer is not None:
        check_reducers([args.reducer])
    import torch

    from common.data.lookup import Place, source
    from common.evaluate.tasks import Settings
    from common.inference import chosen_device
    from common.models import load_model

    device = chosen_device(args.device)
    settings = Settings(args.batch_size, args.workers, device, args.dtype, args.limit, args.threshold)
    args.place = Place(args.root, args.captions, args.class_names)
    sources = {task: source(args.data, task, args.split, args.place) for task in args.tasks}
    model = behind(at_size(load_model(**named), args.image_size), args.first)
    if args.point is not None:
        # One tower serves all tasks, and only zeroshot has classes for a reducer to choose by.
        classes = partial(_classes, model, sources["zeroshot"], args, settings) if args.tasks == ["zeroshot"] else None
        args.point = completed(model, args.point, args.gmacs, classes)
        model = model_at(model, args.point, classes)
    # Plan all tasks before the first one runs: a mistake in the last one then costs nothing.
    plans = [_plan(task, data, model, args, settings) for task, data in sources.items()]
    args.out = args.out or runs_directory() / "evaluations"
    check_writable(args.out, "name another folder with --out")
    for plan in plans:
        _finish(plan, model, args, settings)
    if "cuda" in device:
        print(f"peak memory on {device}: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB")
    print(f"peak memory: {peak_memory():.0f} MB")
    return 0


def _classes(model: Model, data: Labelled, args: argparse.Namespace, settings: Settings) -> Tensor:
    """The class embeddings [C,E] of zero-shot classification."""
    from common.evaluate.tasks import classes_of

    return classes_of(model, data.class_names, chosen_templates(args.template, data, model)[1], settings)


def peak_memory() -> float:
    """The peak resident size of this process so far, in MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class Plan:
    """One task to run.

    named: what a table needs to know of the result.  depends: everything else that changes the numbers.
    """

    task: str
    data: Labelled | Captioned
    templates: tuple[Template, ...]
    named: dict[str, str]
    depends: dict[str, Any]

    @property
    def file(self) -> str:
        """The result file's name: equal exactly when a run would repeat an earlier one."""
        key = value_hash([self.named, self.depends])[:8]
        words = "-".join(self.named[part] for part in ("model", "data", "split", "task"))
        return f"{words}-{key}.json".replace(" ", "-").replace("/", "-")


def _plan(task: str, data: Labelled | Captioned, model: Model, args: argparse.Namespace, settings: Settings) -> Plan:
    from common.data.images import ORIENTATION
    from common.data.lookup import source, splits_of, version_within
    from common.evaluate.tasks import check_features
    from common.reducer_registry import REVISION

    templates: tuple[Template, ...] = ()
    depends = ({} if args.point is None else {"point": asdict(args.point)}) | {
        "weights": model.weights,
        **({} if model.first is None else {"first": model.first.weights}),
        "data_version": version_within(data, settings.limit),
        "orientation": ORIENTATION,
        "preprocess": asdict(model.preprocess),
        "dtype": settings.dtype,
        "limit": settings.limit,
    }
    if args.point is not None and args.point.reducer is not None:
        depends["reducers"] = REVISION
    if task == "linear-probe":
        check_features(model, args.features)
        depends |= {"weights": {"image": model.weights["image"]}, "shots": args.shots, "seeds": args.seeds}
        depends["features"] = args.features
        parts = {part: source(args.data, "training", part, args.place) for part in splits_of(args.data, "training")}
        versions = {part: version_within(training, settings.limit) for part, training in parts.items()}
        depends["training_versions"] = versions
    else:
        model.text_encoder()  # ValueError for a model without a text tower
    if task == "retrieval":
        depends["captions_hash"] = value_hash(data.captions)
    else:
        depends |= {"class_names_hash": value_hash(data.class_names), "classes": len(data.class_names)}
    if task == "zeroshot":
        choice, templates = chosen_templates(args.template, data, model)
        depends |= {
            "template": choice,
            "templates": len(templates),
            "templates_hash": prompts_hash(templates, data.class_names),
        }
    metric = "R@1" if task == "retrieval" else data.metric
    named = {"task": task, "model": model.name, "type": model.type, "data": args.data, "split": data.split}
    return Plan(task, data, templates, named | {"metric": metric}, depends)


def _finish(plan: Plan, model: Model, args: argparse.Namespace, settings: Settings) -> None:
    """Run one task, print its numbers and write its file. A task whose file exists is only reported."""
    from common.conditions import conditions
    from common.data.lookup import scale_of

    what = f"{plan.task} on {args.data} {plan.data.split}"
    what += "" if args.point is None else f" at {args.point.name}"
    what += ", the model's own templates" if plan.depends.get("template") == OWN else ""
    file = args.out / plan.file
    if file.is_file():
        print(f"{what}: done before, {file} (delete it to run again)")
        return
    at_start = conditions(
        scale_of(args.data, model.image_size),
        **plan.depends,
        batch=settings.batch_size,
        workers=settings.workers,
        evaluated_on=settings.device,
        files=model.files,
        device_hours=_device_hours(model),
    )
    metrics = _run(plan, model, args, settings)
    if args.point is not None or args.image_size is not None:
        metrics |= _costs(model, metrics.get("exits", ()))
    account = plan.data.account
    account.delivered = account.delivered or metrics["samples"]
    after = {"samples": metrics["samples"], "account": account.to_dict()}
    result = plan.named | {"metrics": metrics, "conditions": at_start | after}
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    cost = f"; {metrics['gmacs']:.4g} GMACs a picture" if "gmacs" in metrics else ""
    print(f"{what}, {metrics['samples']:,} pictures: {summary(result)}{cost}\n  {account}\n  {file}")


def _device_hours(model: Model) -> float | None:
    """Hours of training times devices, as a model directory records them; None: not recorded."""
    from common.directory import read

    return None if model.folder is None else read(model.folder).run.get("device_hours")


def _costs(model: Model, exits: Sequence[float]) -> dict[str, float]:
    """GMACs of a picture in both conventions; nothing where an operation's cost is not known."""
    try:
        macs = mean_macs(model.images, model.image_size, exits)
    except ValueError:
        return {}
    return {"gmacs": macs.gmacs, "gmacs_paper": macs.gmacs_paper}


def _run(plan: Plan, model: Model, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from common.data.lookup import source, splits_of
    from common.evaluate import tasks

    if plan.task == "zeroshot":
        return tasks.zero_shot(model, plan.data, plan.templates, settings)
    if plan.task == "retrieval":
        return tasks.retrieval(model, plan.data, settings)
    parts = splits_of(args.data, "training")
    training = {part: source(args.data, "training", part, args.place) for part in parts}
    return tasks.linear_probe(model, plan.data, training, args.shots, args.seeds, settings, args.features)


def summary(result: dict[str, Any]) -> str:
    """One line of a result's numbers, in %."""
    metrics = result["metrics"]
    if result["task"] == "retrieval":
        sides = {"image to text": metrics["image_to_text"], "text to image": metrics["text_to_image"]}
        return "; ".join(
            f"{side} " + ", ".join(f"R@{k} {100 * recalls[f'R@{k}']:.1f}" for k in (1, 5, 10))
            for side, recalls in sides.items()
        )
    results = metrics["shots"] if result["task"] == "linear-probe" else {"": metrics}
    return "; ".join(
        f"{shots + ' shots: ' if shots.isdigit() else ''}top-1 {100 * row['top1']:.1f}, top-5 {100 * row['top5']:.1f}, "
        f"mean per class {100 * row['mean_per_class']:.1f}"
        for shots, row in results.items()
    )


def _tasks(text: str) -> list[str]:
    tasks = list(dict.fromkeys(text.split(",")))
    unknown = [task for task in tasks if task not in EVALUATIONS]
    if unknown:
        raise ValueError(f"--tasks {text}: there is no task {unknown[0]!r}; the tasks are {', '.join(EVALUATIONS)}")
    return tasks


def _check_used(args: argparse.Namespace) -> None:
    """ValueError: an option of a task that does not run."""
    for task, options in OF_TASK.items():
        for option in options:
            value = getattr(args, option)
            if value is not None and task not in args.tasks:
                raise ValueError(f"--{option} {value} is read by {task} alone; add it to --tasks, or leave it out")


def _shots(text: str) -> list[int | str]:
    words = text.split(",")
    wrong = [word for word in words if word != "full" and not (word.isdigit() and int(word))]
    if wrong:
        raise ValueError(f"--shots {text}: {wrong[0]!r} is neither a number of samples of each class nor full")
    return [word if word == "full" else int(word) for word in words]
