"""`effclip sweep`: accuracy or recall, cost, speed and memory of a model over reducers, keep rates and thresholds.

Every point is written down as soon as it is measured, so an interrupted sweep goes on where it stopped. torch is
imported only after the command line was checked.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Hashable, Sequence
from dataclasses import asdict
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
from common.evaluate.command import EVALUATIONS
from common.evaluate.points import (
    Point,
    add_image_size,
    at_size,
    behind,
    check_own,
    check_reducers,
    default_places,
    read_places,
    read_values,
    setting_of,
    tower_of,
)
from common.paths import runs_directory

if TYPE_CHECKING:
    from common.data.lookup import Place
    from common.evaluate.sweep.scoring import Scoring
    from common.evaluate.tasks import Settings
    from common.models import Model

ALL, OWN = "all", "own"
"""Words of --reducers."""
KEEPS, THRESHOLDS = "0.9..0.3", "0.1..0.9"
"""What --keep and --threshold are where they are not given."""
JOURNAL = "points.jsonl"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip sweep", description=__doc__.splitlines()[0])
    add = command.add_argument
    add_model(command)
    add(
        "--data",
        required=True,
        help="embedded, a set of the catalogue (food101), a folder with one folder a class, a .csv or .tsv "
        "table; as `effclip evaluate` takes them",
    )
    add(
        "--task",
        default=EVALUATIONS[0],
        choices=EVALUATIONS,
        help="what is scored at each setting, as by `effclip evaluate`; a linear probe learns from all training "
        "pictures, at each setting anew (default %(default)s)",
    )
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--captions", help="Karpathy's json file, for retrieval on flickr30k or coco")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add("--template", help="the prompts, as for `effclip evaluate`")
    add(
        "--reducers",
        help=f"names from docs/reducers.md such as divprune,tome,evit; {ALL}: every one; {OWN}: the model's own keep "
        f"rate or threshold. Default: {OWN} for a model with levels, else {ALL} and what is the model's own",
    )
    add("--keep", help=f"keep rates: 0.9..0.3, 0.9..0.3:0.2 or 0.7,0.5 (default {KEEPS})")
    add(
        "--place",
        action="append",
        help="the block of the reducers; 3,6,9: at each of them the share --keep of what is still there stays. Given "
        "several times, one after another. Default: after a quarter of the blocks",
    )
    add_image_size(command)
    add_first(command, " (zeroshot alone)")
    add("--threshold", help=f"of a model with levels, or of --first (default {THRESHOLDS})")
    add(
        "--budget",
        type=float,
        help="GMACs a picture: which setting is best within it on val; that one alone is reported on the split of "
        "which papers report",
    )
    add("--split", help="where the settings are compared; default: as `effclip evaluate`, with --budget val")
    add("--limit", type=whole_number(1), help="only LIMIT pictures of a split, as `effclip evaluate`")
    add("--batch-size", type=whole_number(1), default=64, help="pictures in a batch (default %(default)s)")
    add("--timed", default="1,8", help="batch sizes at which speed is measured, or no (default %(default)s)")
    add("--workers", type=whole_number(0), default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--dtype", choices=DTYPES, default="float32", help="of the image tower (default %(default)s)")
    add("--out", type=folder_for_results, help="folder of the results (default sweeps/MODEL-DATA in $EFFCLIP_RUNS)")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError: something is missing, or two arguments do not fit together."""
    args = parser().parse_args(arguments)
    args.keeps = read_values(KEEPS if args.keep is None else args.keep, "--keep")
    args.thresholds = read_values(THRESHOLDS if args.threshold is None else args.threshold, "--threshold")
    args.schedules = [read_places(text) for text in args.place or ()]
    args.batches = _batches(args.timed)
    if args.budget is not None and not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g} must be a number of GMACs above 0, such as 10")
    if args.template is not None and args.task != EVALUATIONS[0]:
        raise ValueError(f"--template {args.template} makes prompts of zeroshot; {args.task} has none, leave it out")
    named = model_arguments(args)
    args.reducers = None if args.reducers is None else args.reducers.replace(" ", "")
    words = [] if args.reducers is None else args.reducers.split(",")
    check_reducers(word for word in words if word not in (ALL, OWN))
    from common.data.lookup import Place, source
    from common.evaluate.sweep.journal import Journal
    from common.evaluate.sweep.measure import Measure
    from common.evaluate.sweep.run import sweep
    from common.evaluate.tasks import Settings
    from common.inference import chosen_device
    from common.models import load_model

    settings = Settings(args.batch_size, args.workers, chosen_device(args.device), args.dtype, args.limit)
    place = Place(args.root, args.captions, args.class_names)
    sources = [source(args.data, args.task, split, place) for split in _splits(args)]
    model = behind(at_size(load_model(**named), args.image_size), args.first)
    if args.task != "linear-probe":
        model.text_encoder()  # ValueError for a model without a text tower
    if args.task != EVALUATIONS[0] and setting_of(model) == "threshold":
        raise ValueError(f"{model.name} stops at a level by the classes of zeroshot; take --task zeroshot")
    asked = points(model, args)
    choice, scorings = _scorings(model, sources, place, settings, args)
    _say_fixed_rates(asked, args.keeps)
    asked = _distinct(asked, model)
    folder = args.out or runs_directory() / "sweeps" / _name(model, args)
    journal = Journal(folder / JOURNAL, _identity(model, choice, settings, args))
    sweep(Measure(model, settings.device, args.batches), asked, scorings, journal, args.budget)
    return 0


def _name(model: Model, args: argparse.Namespace) -> str:
    """The name of the results' folder."""
    parts = [model.name, args.data, *([] if args.task == EVALUATIONS[0] else [args.task])]
    return "-".join(parts).replace("/", "-").replace(" ", "-")


def _scorings(
    model: Model, sources: Sequence[Any], place: Place, settings: Settings, args: argparse.Namespace
) -> tuple[str | None, list[Scoring]]:
    """The --template in force, None without one; and the scoring of the task on each of ``sources``."""
    from common.data.lookup import source, splits_of
    from common.evaluate.prompts import chosen_templates
    from common.evaluate.sweep.pictures import Pictures
    from common.evaluate.sweep.scoring import LinearProbe, Retrieval, ZeroShot

    pictures = [Pictures(model, data, settings) for data in sources]
    if args.task == "retrieval":
        return None, [Retrieval(model, shown, settings) for shown in pictures]
    if args.task == "linear-probe":
        parts = splits_of(args.data, "training")
        training = {part: Pictures(model, source(args.data, "training", part, place), settings) for part in parts}
        return None, [LinearProbe(model, shown, settings, training) for shown in pictures]
    choice, templates = chosen_templates(args.template, sources[0], model)
    return choice, [ZeroShot(model, shown, settings, templates) for shown in pictures]


def points(model: Model, args: argparse.Namespace) -> list[Point]:
    """The points of a sweep, the whole model first.

    ValueError: a name that is not on the list, a block that the tower lacks, the model's own setting where it has none,
    or a --threshold, --keep or --place that no point has.
    """
    from common.reducer_registry import installed_reducers, named

    own = setting_of(model)
    everything = sorted(installed_reducers())
    default = [OWN] if own == "threshold" or not _takes_reducers(model) else [*([OWN] if own else []), *everything]
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
            rates = named(name).rates or args.keeps
            chosen += [Point(name, keep, places) for places in schedules for keep in rates]
    _check_used(chosen, model, args)
    return chosen


def _takes_reducers(model: Model) -> bool:
    """Whether the model has no setting of its own, or another tower beside it for reducers."""
    try:
        tower_of(model)
    except ValueError:
        return setting_of(model) is None  # each reducer will say why it cannot work
    return True


def _check_used(chosen: Sequence[Point], model: Model, args: argparse.Namespace) -> None:
    """ValueError: a --threshold, --keep or --place that changes no point."""
    for name in ("threshold", "keep"):
        text = getattr(args, name)
        if text is not None and all(getattr(point, name) is None for point in chosen):
            check_own(model, name, text)
            raise ValueError(f"--{name} {text}: it is {model.name}'s own; add {OWN} to --reducers {args.reducers}")
    if args.place and all(point.reducer is None for point in chosen):
        raise ValueError(f"--place {args.place[0]} is the block of a reducer; name it with --reducers")
    if args.first is not None and all(point.threshold is None for point in chosen):
        raise ValueError(f"--first {args.first} answers behind a threshold; add {OWN} to --reducers {args.reducers}")


def _say_fixed_rates(asked: Sequence[Point], keeps: Sequence[float]) -> None:
    """Print a line for each reducer that cannot have the keep rates that were asked for."""
    from common.reducer_registry import named

    for name in dict.fromkeys(point.reducer for point in asked if point.reducer is not None):
        rates = named(name).rates
        if rates and set(rates) != set(keeps):
            only = ", ".join(map(str, rates))
            print(f"{name} keeps {only} of the patches whatever --keep says; it is measured there")


def _distinct(asked: Sequence[Point], model: Model) -> list[Point]:
    """The points without those at which a reducer does what it does at an earlier one; prints a line for each such."""
    from common.reducer_registry import named, setting_for

    if not _takes_reducers(model) or setting_of(model) == "threshold":
        return list(asked)
    first: dict[tuple[Hashable, ...], Point] = {}
    for point in asked:
        key: tuple[Hashable, ...] = (point,)
        if point.reducer is not None and point.places and (same := named(point.reducer).same) is not None:
            key = (point.reducer, point.places, same(setting_for(tower_of(model), point.keep, point.places[0])))
        known = first.setdefault(key, point)
        if known != point:
            print(f"{point.name} is the same setting as keep {known.keep:g}; it is measured there")
    return list(first.values())


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


def _splits(args: argparse.Namespace) -> tuple[str, ...]:
    """Where settings are compared, and with a budget also where the best one is reported."""
    from common.data.lookup import splits_of

    known = splits_of(args.data, args.task)
    if args.budget is None:
        return (args.split or known[0],)
    if args.task == "linear-probe":
        raise ValueError("--budget chooses on val, on which a linear probe's penalty is chosen; leave it out")
    compared = args.split or "val"
    if len(known) == 1 and known[0] != "all":
        raise ValueError(
            f"--budget compares settings on one split and reports the best on another; {args.data} has one split "
            f"alone for {args.task}, {known[0]}; leave --budget out"
        )
    if compared == known[0] or compared not in known:
        mend = "Make folders val and test" if known[0] == "all" else "Name one with --split"
        raise ValueError(
            f"--budget compares settings on {compared!r} and reports the best on {known[0]!r}, which must be another "
            f"split; {args.data} has {', '.join(known)}. {mend}"
        )
    return compared, known[0]


def _identity(model: Model, choice: str | None, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers of all points depend on."""
    import torch

    from common.reducer_registry import REVISION

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
        **({} if model.first is None else {"first": model.first.weights}),
        "reducers": REVISION,
        # A journal without a task is of zeroshot.
        **({} if args.task == EVALUATIONS[0] else {"task": args.task}),
    }


def _batches(text: str) -> tuple[int, ...]:
    """The batch sizes of --timed; none for "no". ValueError: no whole numbers above 0."""
    words = [] if text == "no" else text.split(",")
    wrong = [word for word in words if not word.isdigit() or not int(word)]
    if wrong:
        raise ValueError(f"--timed {text}: {wrong[0]!r} is no number of pictures; give such as 1,8, or no")
    return tuple(sorted({int(word) for word in words}))
