"""`effclip calibrate`: the threshold, or keep rate, for a budget or an accuracy, from labelled pictures.

The result is saved with the model, and `effclip classify` uses it. A mistake in the command line is answered before
torch is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING

from common.arguments import (
    GMACS,
    CommandParser,
    add_first,
    add_model,
    model_arguments,
    number,
    read_templates,
    whole_number,
)
from common.paths import check_writable

if TYPE_CHECKING:
    from common.data.lookup import Labelled
    from common.deploy.calibration import Calibration, Outcomes, Wish
    from common.deploy.model import Deployed
    from common.evaluate.tasks import Settings

_ACCURACY = number("a fraction in (0, 1), such as 0.60", lambda value: 0 < value < 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip calibrate", description=__doc__.splitlines()[0])
    add = command.add_argument
    add("--data", required=True, help="embedded, a set of the catalogue, a folder of class folders, or a table")
    wish = command.add_mutually_exclusive_group(required=True)
    wish.add_argument("--gmacs", type=GMACS, help="mean budget for a picture, 10^9 multiply-adds of the image tower")
    wish.add_argument("--accuracy", type=_ACCURACY, help="the top-1 accuracy to reach, as 0.60, at the least cost")
    add_model(command, default="the packaged model")
    add_first(command)
    add("--split", help="default: val")
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add(
        "--template",
        help="a prompt with {} for the class name, or a .txt file of such; default: the data set's, for a folder or "
        "table of your own the model's, for a model of tuned prompts the templates that they were tuned for",
    )
    add(
        "--calibration",
        metavar="NAME|FILE",
        help="where the result goes: a name, or a .json file; default: with the model, where classify looks for it",
    )
    add("--limit", type=whole_number(1), help="so many pictures alone, as `effclip evaluate`")
    add("--batch-size", type=whole_number(1), default=256, help="pictures at a time (default %(default)s)")
    add("--workers", type=whole_number(0), default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: something is missing, or no setting meets the wish."""
    args = parser().parse_args(arguments)
    templates = None if args.template is None else read_templates(args.template)
    named = model_arguments(args)
    from common.data.lookup import Place, source
    from common.deploy.calibration import Wish, calibration_file
    from common.deploy.model import load
    from common.evaluate.tasks import Settings

    wish = Wish(args.gmacs, args.accuracy)
    split = split_for(args.data, args.split)
    data = source(args.data, "zeroshot", split, Place(args.root, None, args.class_names))
    deployed = load(**named, device=args.device, first=args.first)
    settings = Settings(args.batch_size, args.workers, deployed.device, limit=args.limit)
    file = deployed.calibration_file if args.calibration is None else calibration_file(args.calibration)
    check_writable(file.parent, "name a .json file elsewhere with --calibration")
    calibration = calibrate(deployed, data, args.data, wish, templates, settings)
    print("\n".join(lines(calibration)), flush=True)  # before the file, which may fail
    calibration.write(file)
    print(f"saved: {file}")
    return 0


def split_for(data: str, split: str | None) -> str:
    """The split on which to choose: the one that is named, val, or all of what is not divided.

    ValueError: there is none but test.
    """
    from common.data.lookup import splits_of

    splits = splits_of(data, "zeroshot")
    chosen = split or ("val" if "val" in splits else splits[0])
    if split is None and chosen == "test":
        raise ValueError(f"{data} has no val, and a test split is for reporting; name what to use with --split")
    return chosen


def calibrate(
    deployed: Deployed,
    data: Labelled,
    name: str,
    wish: Wish,
    templates: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Calibration:
    """Choose the setting that meets a wish on labelled images.

    name: the name of the data, which the result records.
    templates: prompts; None: the data's, or the model's where its texts were tuned for them or the data has none.
    ValueError: the model has no setting, or no setting meets the wish.
    """
    from common.conditions import conditions
    from common.data.lookup import scale_of, version_within
    from common.deploy.calibration import Calibration, choose, thinned
    from common.evaluate.tasks import Settings

    settings = settings or Settings(device=deployed.device)
    tuned = any(member.model.templates for member in deployed.members)
    own = deployed.templates if tuned or not data.templates else ()
    templates = tuple(templates or own or data.templates)
    if deployed.setting_name is None:
        raise ValueError(
            f"{deployed.name} has one cost, {deployed.costs[0]:.4g} GMACs a picture, and nothing to calibrate; a model "
            "with levels or keep rates has, and so has a cascade (--first)"
        )
    scale = scale_of(name, deployed.model.image_size)
    version = version_within(data, settings.limit)
    at_start = conditions(scale, data=name, split=data.split, data_version=version, limit=settings.limit)
    at_start["preprocess"] = asdict(deployed.model.preprocess)
    if deployed.first is not None:
        at_start["first_preprocess"] = asdict(deployed.first.model.preprocess)
    outcomes = observe(deployed, data, templates, settings)
    return Calibration(
        deployed.setting_name,
        {"gmacs": wish.gmacs, "accuracy": wish.accuracy},
        choose(outcomes, wish),
        thinned(outcomes),
        len(outcomes.correct),
        deployed.costs,
        deployed.weights,
        deployed.prompts_hash(data.class_names, templates),
        at_start | {"classes": len(data.class_names), "templates": len(templates), "own_templates": templates == own},
    )


def observe(deployed: Deployed, data: Labelled, templates: Sequence[str], settings: Settings) -> Outcomes:
    """The outcome of every path of a model on labelled images, in one pass. ValueError: there is no image."""
    import numpy as np
    import torch

    from common.deploy.calibration import Outcomes
    from common.evaluate.tasks import pictures_of_each
    from common.progress import bar

    observed = deployed.observer(deployed.classes_of_all(data.class_names, templates))
    batches = pictures_of_each(deployed.preprocesses, data, settings)
    start = next(batches, None)
    if start is None:
        raise ValueError("the data has no picture; check the path and the split")
    correct, confidence = [], []
    for images, labels in bar(chain([start], batches), "observing"):
        scores, certainty = observed(*(x.to(deployed.device) for x in images))
        correct.append((scores.argmax(-1).cpu() == labels).T)
        confidence += [] if certainty is None else [certainty.T.cpu()]
    costs, right = np.asarray(deployed.costs), torch.cat(correct).numpy()
    if confidence:
        return Outcomes(costs, right, torch.cat(confidence).double().numpy())
    # Ranking tokens costs too, so a rate near 1 may cost more than keeping all of them. Such rates are left out.
    worth = [path for path, cost in enumerate(costs) if (cost < costs[path + 1 :]).all()]
    return Outcomes(costs[worth], right[:, worth], None, [deployed.paths.rates[path] for path in worth])


def lines(calibration: Calibration) -> list[str]:
    """The chosen setting in words."""
    point = calibration.point
    (low, high), (least, most) = point.gmacs_interval, point.accuracy_interval
    wish = " ".join(f"{name} {value:g}" for name, value in calibration.wish.items() if value is not None)
    prompts = ", the model's own templates" if calibration.conditions.get("own_templates") else ""
    chosen, dearest = f"{calibration.knob} {point.setting:.6g}", calibration.costs[-1]
    if (calibration.wish["gmacs"] or 0) >= dearest:
        every = "all levels" if calibration.knob == "threshold" else "the whole model"
        chosen = f"every picture may take {every} ({dearest:.3g}): no {calibration.knob} is needed"
    return [
        f"for {wish}: {chosen}, from {calibration.pictures:,} pictures{prompts}",
        f"mean cost {point.gmacs:.4g} GMACs; on as many new pictures {low:.4g} to {high:.4g} (95 %)",
        f"accuracy {100 * point.accuracy:.2f} %; on those {100 * least:.2f} to {100 * most:.2f} %",
        f"the paths cost {', '.join(f'{cost:.4g}' for cost in calibration.costs)}",
    ]
