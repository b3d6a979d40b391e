"""`effclip calibrate`: the threshold, or keep rate, for a budget or an accuracy, from labelled pictures.

What is found is saved with the model, and `effclip classify` uses it. torch is imported only after the command line
was found right.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from common.arguments import add_model, model_arguments, read_templates

if TYPE_CHECKING:
    from common.data.lookup import Labelled
    from common.deploy.calibration import Calibration, Outcomes, Wish
    from common.deploy.model import Deployed
    from common.evaluate.tasks import Settings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="effclip calibrate", description=__doc__.splitlines()[0])
    add = command.add_argument
    add("--data", required=True, help="embedded, a set of the catalogue, a folder with one folder a class, or a table")
    wish = command.add_mutually_exclusive_group(required=True)
    wish.add_argument("--gmacs", type=float, help="mean budget for a picture, 10^9 multiply-adds of the image tower")
    wish.add_argument("--accuracy", type=float, help="the top-1 accuracy to reach, as 0.60, at the least cost")
    add_model(command, default="the packaged model")
    add("--split", help="default: val")
    add("--root", default=os.environ.get("EFFCLIP_DATA"), help="folder of the catalogue's sets (default $EFFCLIP_DATA)")
    add("--class-names", help="text file with one name a line, for a folder or table of your own")
    add(
        "--template",
        help="a prompt with {} for the class name, or a .txt file of such; default: the data set's, but for a model "
        "directory of tuned prompts the templates that they were tuned for",
    )
    add("--limit", type=int, help="the first so many pictures")
    add("--batch-size", type=int, default=256, help="pictures at a time (default %(default)s)")
    add("--workers", type=int, default=1, help="processes that read pictures (default %(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0. ValueError, for a user: what cannot be found or cannot be met."""
    said = parser().parse_args(arguments)
    templates = None if said.template is None else read_templates(said.template)
    from common.data.lookup import Place, source, splits_of
    from common.deploy.calibration import Wish
    from common.deploy.model import load
    from common.evaluate.tasks import Settings

    wish = Wish(said.gmacs, said.accuracy)
    splits = splits_of(said.data, "zeroshot")
    split = said.split or ("val" if "val" in splits else splits[0])
    if said.split is None and split == "test":
        raise ValueError(f"{said.data} has no val, and a test split is for reporting; name what to use with --split")
    of = source(said.data, "zeroshot", split, Place(said.root, None, said.class_names))
    deployed = load(**model_arguments(said), device=said.device)
    settings = Settings(said.batch_size, said.workers, deployed.device, limit=said.limit)
    found = calibrate(deployed, of, said.data, wish, templates, settings)
    found.write(deployed.calibration_file)
    print("\n".join(lines(found)))
    print(f"saved: {deployed.calibration_file}")
    return 0


def calibrate(
    deployed: Deployed,
    of: Labelled,
    name: str,
    wish: Wish,
    templates: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Calibration:
    """Choose the setting for a wish on labelled pictures.

    name: of the data, to be kept.
    templates: prompts; None: the data's own, or the model's where its texts were tuned for them.
    ValueError: a model without a setting, or a wish that no setting meets.
    """
    from common.conditions import conditions
    from common.deploy.calibration import Calibration, choose, thinned
    from common.evaluate.tasks import Settings

    settings, own = settings or Settings(device=deployed.device), deployed.model.templates
    templates = tuple(templates or own or of.templates)
    if deployed.knob is None:
        raise ValueError(
            f"{deployed.model.name} has one cost, {deployed.costs[0]:.4g} GMACs a picture, and nothing to calibrate; "
            "a model with levels or keep rates has"
        )
    at_start = conditions(of.scale, data=name, split=of.split, data_version=of.version, limit=settings.limit)
    outcomes = observe(deployed, of, templates, settings)
    return Calibration(
        deployed.knob,
        {"gmacs": wish.gmacs, "accuracy": wish.accuracy},
        choose(outcomes, wish),
        thinned(outcomes),
        len(outcomes.correct),
        deployed.costs,
        deployed.model.weights,
        deployed.prompts_hash(of.class_names, templates),
        at_start | {"classes": len(of.class_names), "templates": len(templates), "own_templates": templates == own},
    )


def observe(deployed: Deployed, of: Labelled, templates: Sequence[str], settings: Settings) -> Outcomes:
    """What every path of a model says of labelled pictures, one pass over them."""
    import numpy as np
    import torch

    from common.deploy.calibration import Outcomes
    from common.evaluate.tasks import first
    from common.progress import bar

    classes, paths = deployed.classes(of.class_names, templates), deployed.paths
    batches = iter(first(of.loader(deployed.model.image_size, settings.batch_size, settings.workers), settings.limit))
    start = next(batches, None)
    if start is None:
        raise ValueError("the data has no picture; check the path and the split")
    correct, confidence = [], []
    for batch in bar(chain([start], batches), "observing"):
        scores, sure = paths.every(batch["image"].to(deployed.device), classes, deployed.scale)
        correct.append((scores.argmax(-1).cpu() == batch["label"]).T)
        confidence += [] if sure is None else [sure.T.cpu()]
    right = torch.cat(correct).numpy()
    if confidence:
        return Outcomes(np.asarray(deployed.costs), right, torch.cat(confidence).double().numpy())
    # What ranks tokens costs too: a rate near 1 may cost more than keeping all, and is no choice then.
    costs = np.asarray(deployed.costs)
    worth = [place for place, cost in enumerate(costs) if (cost < costs[place + 1 :]).all()]
    return Outcomes(costs[worth], right[:, worth], None, [paths.rates[place] for place in worth])


def lines(found: Calibration) -> list[str]:
    """What was chosen, in words."""
    point, (low, high), (least, most) = found.point, found.point.gmacs_interval, found.point.accuracy_interval
    asked = " ".join(f"{name} {value:g}" for name, value in found.wish.items() if value is not None)
    prompts = ", the model's own templates" if found.conditions.get("own_templates") else ""
    return [
        f"for {asked}: {found.knob} {point.setting:.6g}, from {found.pictures:,} pictures{prompts}",
        f"mean cost {point.gmacs:.4g} GMACs; on as many new pictures {low:.4g} to {high:.4g} (95 %)",
        f"accuracy {100 * point.accuracy:.2f} %; on those {100 * least:.2f} to {100 * most:.2f} %",
        f"the paths cost {', '.join(f'{cost:.4g}' for cost in found.costs)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
