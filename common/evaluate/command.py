"""`effclip evaluate`: zero-shot accuracy, retrieval and linear probe of a model on a data set, into JSON files.

Each task is one file that states its conditions, named by everything its numbers depend on; one that is there
is not computed again. torch is imported only after the command line was found right.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import add_model, model_arguments, read_templates
from common.paths import runs_directory

if TYPE_CHECKING:
    from common.data.lookup import Captioned, Labelled
    from common.evaluate.tasks import Settings
    from common.models import Model
    from common.zeroshot import Template

TASKS = ("zeroshot", "retrieval", "linear-probe")
ENSEMBLE, SINGLE, OWN = "ensemble", "single", "own"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip evaluate", description=__doc__.splitlines()[0])
    add = command.add_argument
    add_model(command)
    add(
        "--data",
        required=True,
        help="embedded, a set of the catalogue (food101, or dtd@coop by that protocol), webdataset:FOLDER of a set "
        "that CLIP_benchmark exported, a folder with one folder a class, or a .csv or .tsv with path and class",
    )
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--captions", help="Karpathy's json file, for retrieval on flickr30k or coco")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add("--tasks", default=TASKS[0], help=f"some of {','.join(TASKS)} (default %(default)s)")
    add("--split", help="default: the one that each task is reported on")
    add(
        "--template",
        help=f"{ENSEMBLE} (all of the data set's), {SINGLE} (its first), a text with {{}} for the class name, or a "
        f".txt file of such lines; default: {ENSEMBLE}, but for a model directory of tuned prompts the templates that "
        "they were tuned for",
    )
    add("--shots", default="full", help="linear probe: full, or samples of each class, as 1,4,16,full")
    add("--seeds", type=int, default=3, help="linear probe: draws of few shots (default %(default)s)")
    add("--limit", type=int, help="the first so many pictures of each split, for a quick look")
    add("--batch-size", type=int, default=256, help="pictures at a time (default %(default)s)")
    add("--workers", type=int, default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--dtype", default="float32", help="of the image tower: float32, bfloat16 or float16 (default %(default)s)")
    add("--out", type=Path, help="folder of the result files (default evaluations in $EFFCLIP_RUNS)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError, for a user: what cannot be found or does not go together."""
    said = parser().parse_args(arguments)
    said.tasks, said.shots = _tasks(said.tasks), _shots(said.shots)
    if said.seeds < 1:
        raise ValueError(f"--seeds {said.seeds} must be at least 1")
    import torch

    from common.data.lookup import Place, source
    from common.evaluate.tasks import Settings
    from common.models import load_model

    device = said.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(said.batch_size, said.workers, device, said.dtype, said.limit)
    said.place = Place(said.root, said.captions, said.class_names)
    sources = {task: source(said.data, task, said.split, said.place) for task in said.tasks}
    model = load_model(**model_arguments(said))
    # All are planned before the first is run, so that a mistake in the last one costs nothing.
    plans = [_plan(task, of, model, said, settings) for task, of in sources.items()]
    for plan in plans:
        _finish(plan, model, said, settings)
    if "cuda" in device:
        print(f"peak memory on {device}: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB")
    print(f"peak memory: {peak_memory():.0f} MB")
    return 0


def peak_memory() -> float:
    """The greatest resident size of this process so far, in MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class Plan:
    """One task to run. named: what a table needs to know; depends: all else that changes the numbers."""

    task: str
    of: Labelled | Captioned
    templates: tuple[Template, ...]
    named: dict[str, str]
    depends: dict[str, Any]

    @property
    def file(self) -> str:
        """The result file's name: equal exactly when a run would repeat an earlier one."""
        key = _hash([self.named, self.depends])[:8]
        words = "-".join(self.named[part] for part in ("model", "data", "split", "task"))
        return f"{words}-{key}.json".replace(" ", "-").replace("/", "-")


def _plan(task: str, of: Labelled | Captioned, model: Model, said: argparse.Namespace, settings: Settings) -> Plan:
    from common.data.images import ORIENTATION
    from common.data.lookup import source, splits_of

    templates: tuple[Template, ...] = ()
    depends = {
        "weights": model.weights,
        "data_version": of.version,
        "orientation": ORIENTATION,
        "dtype": settings.dtype,
        "limit": settings.limit,
    }
    if task == "linear-probe":
        depends |= {"weights": {"image": model.weights["image"]}, "shots": said.shots, "seeds": said.seeds}
        parts = {part: source(said.data, "training", part, said.place) for part in splits_of(said.data, "training")}
        depends["training_versions"] = {part: training.version for part, training in parts.items()}
    else:
        model.text_encoder()  # refuses an image tower alone
    if task == "retrieval":
        depends["captions_hash"] = _hash(of.captions)
    else:
        depends |= {"class_names_hash": _hash(of.class_names), "classes": len(of.class_names)}
    if task == "zeroshot":
        called, templates = _templates(said.template, of, model)
        # A template that is a function is known by the prompts it makes.
        texts = [t if isinstance(t, str) else [t(name) for name in of.class_names] for t in templates]
        depends |= {"template": called, "templates": len(templates), "templates_hash": _hash(texts)}
    metric = "R@1" if task == "retrieval" else of.metric
    named = {"task": task, "model": model.name, "type": model.type, "data": said.data, "split": of.split}
    return Plan(task, of, templates, named | {"metric": metric}, depends)


def _finish(plan: Plan, model: Model, said: argparse.Namespace, settings: Settings) -> None:
    """Run one task, print its numbers and write its file, or say that the file is there."""
    from common.conditions import conditions

    what = f"{plan.task} on {said.data} {plan.of.split}"
    what += ", the model's own templates" if plan.depends.get("template") == OWN else ""
    file = (said.out or runs_directory() / "evaluations") / plan.file
    if file.is_file():
        print(f"{what}: done before, {file} (delete it to run again)")
        return
    at_start = conditions(
        plan.of.scale,
        **plan.depends,
        batch=settings.batch_size,
        workers=settings.workers,
        evaluated_on=settings.device,
        files=model.files,
    )
    metrics = _run(plan, model, said, settings)
    account = plan.of.account
    account.delivered = account.delivered or metrics["samples"]
    after = {"samples": metrics["samples"], "account": account.to_dict()}
    result = plan.named | {"metrics": metrics, "conditions": at_start | after}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(file)
    print(f"{what}, {metrics['samples']:,} pictures: {summary(result)}\n  {account}\n  {file}")


def _run(plan: Plan, model: Model, said: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from common.data.lookup import source, splits_of
    from common.evaluate import tasks

    if plan.task == "zeroshot":
        return tasks.zero_shot(model, plan.of, plan.templates, settings)
    if plan.task == "retrieval":
        return tasks.retrieval(model, plan.of, settings)
    parts = splits_of(said.data, "training")
    training = {part: source(said.data, "training", part, said.place) for part in parts}
    return tasks.linear_probe(model, plan.of, training, said.shots, said.seeds, settings)


def _templates(said: str | None, of: Labelled, model: Model) -> tuple[str, tuple[Template, ...]]:
    """What ``--template`` is called in a result, and the templates that it means for a model on a data set.

    ValueError: no such file, or a text without {}.
    """
    if said is None and model.templates:
        return OWN, model.templates
    if said in (None, ENSEMBLE):
        return ENSEMBLE, tuple(of.templates)
    if said == SINGLE:
        return SINGLE, tuple(of.templates[:1])
    return said, read_templates(said, f", {ENSEMBLE} or {SINGLE}")


def summary(result: dict[str, Any]) -> str:
    """One line of a result's numbers, in %."""
    metrics = result["metrics"]
    if result["task"] == "retrieval":
        sides = {"image to text": metrics["image_to_text"], "text to image": metrics["text_to_image"]}
        return "; ".join(
            f"{side} " + ", ".join(f"R@{k} {100 * found[f'R@{k}']:.1f}" for k in (1, 5, 10))
            for side, found in sides.items()
        )
    found = metrics["shots"] if result["task"] == "linear-probe" else {"": metrics}
    return "; ".join(
        f"{shots + ' shots: ' if shots.isdigit() else ''}top-1 {100 * of['top1']:.1f}, top-5 {100 * of['top5']:.1f}, "
        f"mean per class {100 * of['mean_per_class']:.1f}"
        for shots, of in found.items()
    )


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def _tasks(text: str) -> list[str]:
    found = list(dict.fromkeys(text.split(",")))
    unknown = [task for task in found if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks {text}: there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    return found


def _shots(text: str) -> list[int | str]:
    words = text.split(",")
    wrong = [word for word in words if word != "full" and not (word.isdigit() and int(word))]
    if wrong:
        raise ValueError(f"--shots {text}: {wrong[0]!r} is neither a number of samples of each class nor full")
    return [word if word == "full" else int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
