"""`effclip sweep`: accuracy, cost, speed and memory of a model over reducers, keep rates, places and thresholds.

Every point is written down as soon as it is measured, so an interrupted sweep goes on where it stopped. torch is
imported only after the command line was checked.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.arguments import add_model, model_arguments
from common.evaluate.points import Point, default_places, read_places, read_values, tower_of
from common.paths import runs_directory

if TYPE_CHECKING:
    from common.evaluate.tasks import Settings
    from common.models import Model

ALL, OWN = "all", "own"
"""Words of --reducers."""
JOURNAL = "points.jsonl"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip sweep", description=__doc__.splitlines()[0])
    add = command.add_argument
    add_model(command)
    add(
        "--data",
        required=True,
        help="embedded, shapes, a set of the catalogue (food101), a folder with one folder a class, a .csv or .tsv "
        "table; as `effclip evaluate` takes them",
    )
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add("--template", help="the prompts, as for `effclip evaluate`")
    add(
        "--reducers",
        help=f"names from docs/reducers.md such as divprune,tome,evit; {ALL}: every one; {OWN}: the model's own keep "
        f"rate or threshold. Default: {OWN} for a model with levels, else {ALL} and what is the model's own",
    )
    add("--keep", default="0.9..0.3", help="keep rates: 0.9..0.3, 0.9..0.3:0.2 or 0.7,0.5 (default %(default)s)")
    add(
        "--place",
        action="append",
        help="the block of the reducers; 3,6,9: at each of them the share --keep of what is still there stays. Given "
        "several times, one after another. Default: after a quarter of the blocks",
    )
    add("--threshold", default="0.1..0.9", help="of a model with levels (default %(default)s)")
    add(
        "--budget",
        type=float,
        help="GMACs a picture: which setting is best within it on val; that one alone is reported on the split of "
        "which papers report",
    )
    add("--split", help="where the settings are compared; default: as `effclip evaluate`, with --budget val")
    add("--limit", type=int, help="only the first LIMIT pictures of a split")
    add("--batch-size", type=int, default=64, help="pictures in a batch (default %(default)s)")
    add("--timed", default="1,8", help="batch sizes at which speed is measured, or no (default %(default)s)")
    add("--workers", type=int, default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--dtype", default="float32", help="image tower: float32, bfloat16 or float16 (default %(default)s)")
    add("--out", type=Path, help="folder of the results (default sweeps/MODEL-DATA in $EFFCLIP_RUNS)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError: something is missing, or two arguments do not fit together."""
    args = parser().parse_args(arguments)
    args.keeps, args.thresholds = read_values(args.keep, "--keep"), read_values(args.threshold, "--threshold")
    args.schedules = [read_places(text) for text in args.place or ()]
    args.batches = _batches(args.timed)
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g} must be a number of GMACs above 0, such as 10")
    named = model_arguments(args)
    from common.data.lookup import Place, source
    from common.evaluate.prompts import chosen_templates
    from common.evaluate.sweep.journal import Journal
    from common.evaluate.sweep.measure import Measure
    from common.evaluate.sweep.run import sweep
    from common.evaluate.tasks import Settings
    from common.inference import chosen_device
    from common.models import load_model

    settings = Settings(args.batch_size, args.workers, chosen_device(args.device), args.dtype, args.limit)
    place = Place(args.root, None, args.class_names)
    splits = _splits(args.data, args.split, args.budget is not None)
    sources = [source(args.data, "zeroshot", split, place) for split in splits]
    model = load_model(**named)
    model.text_encoder()  # ValueError for a model without a text tower
    choice, templates = chosen_templates(args.template, sources[0], model)
    asked = points(model, args)
    folder = args.out or runs_directory() / "sweeps" / f"{model.name}-{args.data}".replace("/", "-").replace(" ", "-")
    journal = Journal(folder / JOURNAL, _identity(model, choice, settings, args))
    sweep(Measure(model, templates, settings, args.batches), asked, sources, journal, args.budget)
    return 0


def points(model: Model, args: argparse.Namespace) -> list[Point]:
    """The points of a sweep, the whole model first.

    ValueError: a name that is not on the list, a block that the tower lacks, or the model's own setting where it has
    none.
    """
    from common.adaptive import paths_of
    from common.reducer_registry import installed_reducers, named

    own = paths_of(model.images).setting_name
    everything = sorted(installed_reducers())
    default = [OWN] if own == "threshold" else [*([OWN] if own else []), *everything]
    names = default if args.reducers is None else args.reducers.split(",")
    names = [name for word in names for name in (everything if word == ALL else [word])]
    schedules = _schedules(model, args.schedules)
    chosen = [Point()]
    for name in dict.fromkeys(names):
        if name == OWN and own is None:
            raise ValueError(f"--reducers {OWN}: {model.name} has neither levels nor a keep rate; name a reducer")
        if name == OWN:
            values = args.thresholds if own == "threshold" else args.keeps
            chosen += [Point(**{own: value}) for value in values]
        else:
            named(name)
            chosen += [Point(name, keep, places) for places in schedules for keep in args.keeps]
    return chosen


def _schedules(model: Model, given: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The schedules of --place, or the default one. ValueError: blocks that do not ascend, or that the tower lacks."""
    from common.reducer_registry import check_layers

    try:
        default = default_places(model)
    except ValueError:
        return given or [()]  # each reducer will say why it cannot work
    for places in given:
        check_layers(places, len(tower_of(model).transformer.resblocks))
    return given or [default]


def _splits(data: str, split: str | None, budget: bool) -> tuple[str, ...]:
    """Where settings are compared, and with a budget also where the best one is reported."""
    from common.data.lookup import splits_of

    known = splits_of(data, "zeroshot")
    if not budget:
        return (split or known[0],)
    compared = split or "val"
    if compared == known[0] or compared not in known:
        raise ValueError(
            f"--budget compares settings on {compared!r} and reports the best on {known[0]!r}, which must be another "
            f"split; {data} has {', '.join(known)}. Name one with --split, or make folders val and test"
        )
    return compared, known[0]


def _identity(model: Model, choice: str, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of all points depend on."""
    import torch

    machine = torch.cuda.get_device_name() if "cuda" in settings.device else f"{platform.machine()} CPU"
    return {
        "model": model.name,
        "type": model.type,
        "weights": model.weights,
        "preprocess": asdict(model.preprocess),
        "data": args.data,
        "template": choice,
        "limit": settings.limit,
        "dtype": settings.dtype,
        "timed": list(args.batches),
        "machine": f"{machine}, {torch.get_num_threads()} threads" if args.batches else None,
    }


def _batches(text: str) -> tuple[int, ...]:
    """The batch sizes of --timed; none for "no". ValueError: no whole numbers above 0."""
    words = [] if text == "no" else text.split(",")
    wrong = [word for word in words if not word.isdigit() or not int(word)]
    if wrong:
        raise ValueError(f"--timed {text}: {wrong[0]!r} is no number of pictures; give such as 1,8, or no")
    return tuple(sorted({int(word) for word in words}))
