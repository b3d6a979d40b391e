"""One setting of a model: a token reducer in its tower, its own keep rate, or its threshold of early exit.

The names of settings and the command line are read without torch.

Shapes: C classes, E joint dim.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from common.arguments import whole_number

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.adapters import AdaptedTower
    from common.flops import Macs
    from common.models import Model
    from common.tower import ImageTower

Classes = Callable[[], "Tensor"]
"""Gives the embeddings [C,E] of the classes that pictures are scored against; few settings ask for them."""

_HUNDREDTHS = 100
"""Keep rates within a budget are found to 1 %."""


@dataclass(frozen=True)
class Point:
    """A setting; without any field, the whole model.

    reducer: its name on the list; None: the model's own setting.
    keep: the share of the patch tokens that stay, at each of ``places``.
    places: the blocks at which the reducer works, in ascending order.
    threshold: the confidence at which an image stops, for a model with levels or a cascade.
    """

    reducer: str | None = None
    keep: float | None = None
    places: tuple[int, ...] = ()
    threshold: float | None = None

    @property
    def name(self) -> str:
        """In words, such as "divprune, keep 0.6, place 3"."""
        place = "+".join(map(str, self.places))
        parts = {"keep": self.keep, "place": place or None, "threshold": self.threshold}
        words = [f"{name} {value}" for name, value in parts.items() if value is not None]
        return ", ".join(([self.reducer] if self.reducer else []) + words) or "whole model"


def add_point(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a single setting."""
    add = command.add_argument
    add("--reducer", help="a token reducer in the image tower, by its name in docs/reducers.md, with --keep or --gmacs")
    add("--keep", type=float, help="share of the patch tokens that stay; without --reducer, of a model that prunes")
    add("--place", help="the block of the reducer, or several such as 3,6,9; default: after a quarter of the blocks")
    add("--threshold", type=float, help="confidence at which a picture stops, for a model with levels (zeroshot alone)")
    add("--gmacs", type=float, help="the greatest keep rate within so many GMACs a picture, instead of --keep")


def add_image_size(command: argparse.ArgumentParser) -> None:
    """Add the argument of ``at_size``."""
    command.add_argument(
        "--image-size",
        type=whole_number(1),
        help="pixels of larger pictures, a multiple of the model's: a thumbnail and tiles of the model's size pass its "
        "tower, among which a reducer with a budget over tiles (docs/reducers.md) shares it",
    )


def behind(model: Model, first: str | None) -> Model:
    """The model behind the one that --first names; None: as it is.

    ValueError: see ``load_first`` and ``led_by`` of ``common.cascade``.
    """
    if first is None:
        return model
    from common.cascade import led_by, load_first

    return led_by(model, load_first(first))


def setting_of(model: Model) -> str | None:
    """The name of the model's own setting: "threshold", also of a cascade, "keep", or None."""
    from common.adaptive import paths_of

    return paths_of(model.images).setting_name if model.first is None else "threshold"


def check_own(model: Model, name: str, value: str) -> None:
    """ValueError: the model has no setting of its own of this name, "threshold" or "keep", to take a ``value``."""
    own = setting_of(model)
    if name == "threshold" != own:
        raise ValueError(f"threshold {value}: {model.name} has no levels to stop at; leave it out")
    if name == "keep" != own:
        mend = "give a threshold" if own == "threshold" else "name a reducer"
        raise ValueError(f"keep {value}: {model.name} prunes no tokens by itself; {mend}")


def check_reducers(names: Iterable[str]) -> None:
    """ValueError: a name that is not on the list of reducers. It needs torch, but neither a model nor data."""
    from common.reducer_registry import installed_reducers, named

    installed_reducers()
    for name in names:
        named(name)


def read_places(text: str | None) -> tuple[int, ...]:
    """The blocks that "3,6,9" names; none for None. ValueError: no whole numbers, or not in ascending order."""
    words = [] if text is None else text.split(",")
    wrong = [word for word in words if not word.strip().isdigit()]
    if wrong:
        raise ValueError(f"--place {text}: {wrong[0]!r} is no number of a block; give one, or several such as 3,6,9")
    places = tuple(int(word) for word in words)
    if list(places) != sorted(set(places)):
        order = ",".join(map(str, sorted(set(places))))
        raise ValueError(f"--place {text}: blocks stand in ascending order, each of them once; give {order}")
    return places


def read_values(text: str, option: str) -> list[float]:
    """Numbers such as "0.9..0.3" (steps of 0.1), "0.9..0.3:0.2" (of 0.2) and "0.7,0.5", in their order.

    ValueError: something else, or a number out of the option's range.
    """
    values: list[float] = []
    for part in text.split(","):
        ends, _, step = part.partition(":")
        first, dots, last = ends.partition("..")
        try:
            start, stop, width = Decimal(first), Decimal(last if dots else first), Decimal(step or "0.1")
            if not (start.is_finite() and stop.is_finite() and width > 0) or (step and not dots):
                raise InvalidOperation
        except InvalidOperation as error:
            raise ValueError(
                f"{option} {text}: {part!r} is no number and no range; write 0.7, 0.7,0.5 or 0.9..0.3 (:0.2 for steps "
                "of 0.2)"
            ) from error
        count = int(abs(stop - start) / width)
        values += [float(start + (width if stop > start else -width) * n) for n in range(count + 1)]
    for value in values:
        _check_range(option, value)
    return list(dict.fromkeys(values))


def _check_range(option: str, value: float) -> None:
    """ValueError: a --keep outside (0, 1] or a --threshold outside [0, 1]; some reducers would take it all the same."""
    if option == "--keep" and not 0 < value <= 1:
        raise ValueError(f"--keep {value:g}: the share of the tokens that stay lies in (0, 1]; give one from there")
    if option == "--threshold" and not 0 <= value <= 1:
        raise ValueError(f"--threshold {value:g}: confidence lies in [0, 1]; give a number from there")


def read_point(args: argparse.Namespace) -> Point | None:
    """The setting that ``add_point``'s arguments name; None: none of them is given.

    ValueError: arguments that do not go together. ``fitted`` turns --gmacs into a keep rate.
    """
    places = read_places(args.place)
    if args.reducer is None and places:
        raise ValueError(f"--place {args.place} is the block of a reducer; name it with --reducer")
    if sum(value is not None for value in (args.keep, args.gmacs, args.threshold)) > 1:
        raise ValueError("--keep, --gmacs and --threshold are three ways to say one thing; give one of them")
    if args.reducer is not None and (args.keep is None) == (args.gmacs is None):
        raise ValueError(f"--reducer {args.reducer} needs --keep, the share of tokens that stay, or --gmacs")
    for option, value in (("--keep", args.keep), ("--threshold", args.threshold)):
        if value is not None:
            _check_range(option, value)
    if args.gmacs is not None and not args.gmacs > 0:
        raise ValueError(f"--gmacs {args.gmacs:g} must be a number of GMACs above 0, such as 10")
    point = Point(args.reducer, args.keep, places, args.threshold)
    return None if point == Point() and args.gmacs is None else point


def tower_of(model: Model) -> ImageTower | AdaptedTower:
    """The tower of a model for reducers. ValueError: it has none, or scores by more than this tower's embedding."""
    from common.adapters import adapt
    from common.adaptive import LevelModel

    if hasattr(model.images, "class_scorer"):
        raise ValueError(f"{model.name} (type {model.type}) scores by every token, so none can be taken away")
    if isinstance(model.images, LevelModel):
        raise ValueError(f"{model.name} runs level by level, and a reducer shortens a whole tower; set its threshold")
    if setting_of(model) == "keep" and not hasattr(model.images, "whole_tower"):
        raise ValueError(f"{model.name}'s tower was trained with its own reducer, which no other replaces; give --keep")
    return adapt(model.images)


def at_size(model: Model, image_size: int | None) -> Model:
    """The model for pictures of so many pixels, which it sees in tiles; None or its own size: as it is.

    ValueError: see ``tower_of`` and ``common.tiles.tiles_a_side``.
    """
    from common.tiles import TiledTower

    if image_size in (None, model.image_size):
        return model
    if setting_of(model) == "keep":
        raise ValueError(
            f"--image-size {image_size}: {model.name} prunes by itself, and not in tiles; name the plain CLIP, with a "
            "reducer that has a budget over tiles"
        )
    try:
        tower = tower_of(model)
    except ValueError as error:
        raise ValueError(f"--image-size {image_size}: tiles need one whole tower; leave it out ({error})") from error
    images = TiledTower(tower, image_size).eval()
    preprocess = replace(model.preprocess, size=image_size)
    return replace(model, name=f"{model.name} {image_size} px", images=images, preprocess=preprocess)


def default_places(model: Model) -> tuple[int, ...]:
    """The block after a quarter of them: 3 of 12, 1 of 4. ValueError: see ``tower_of``."""
    return (len(tower_of(model).transformer.resblocks) // 4,)


def images_at(model: Model, point: Point, classes: Classes | None = None) -> nn.Module:
    """The image side of a model at a setting; a threshold leaves it as it is. It shares the model's weights.

    classes: of the pictures, for a reducer that chooses by them; None: they are not scored by classes.
    ValueError: a setting that this model does not have, or a reducer that cannot work in its tower, and why.
    """
    from common.cascade import Cascade
    from common.reducer_registry import installed_reducers, named, schedule
    from common.reduction import ReducedTower
    from common.tiles import TiledTower

    if point.reducer is not None:
        installed_reducers()
        entry, tower, places = named(point.reducer), tower_of(model), point.places or default_places(model)
        if isinstance(model.images, TiledTower):
            reducers = schedule(entry, tower, point.keep, places, model.images.tiles)
            return TiledTower(tower, model.image_size, reducers).eval()
        texts = classes() if classes is not None and "texts" in entry.needs else None
        return ReducedTower(tower, schedule(entry, tower, point.keep, places, texts=texts)).eval()
    for name, value in (("threshold", point.threshold), ("keep", point.keep)):
        if value is not None:
            check_own(model, name, f"{value:g}")
    if point.threshold is not None and model.first is not None:
        return Cascade(model.first, model)
    if setting_of(model) == "keep":
        return model.images.at(1.0 if point.keep is None else point.keep)
    return model.images


def mean_macs(images: nn.Module, image_size: int, exits: Sequence[float] = ()) -> Macs:
    """The mean cost of a picture of S pixels in ``images_at``.

    exits: the share of the pictures that stop at each level, those of the last levels may be missing; none: no picture
        stops before the last.
    ValueError: an operation whose cost is not known.
    """
    from common.adaptive import path_costs
    from common.flops import expected_macs
    from common.stages import stages_of

    costs = path_costs(stages_of(images), image_size)
    return expected_macs(costs, [*exits, *[0.0] * (len(costs) - len(exits))]) if exits else costs[-1]


def completed(model: Model, point: Point, gmacs: float | None = None, classes: Classes | None = None) -> Point:
    """A point with its places, and with the keep rate of a budget where there is one. ValueError: see ``fitted``."""
    if point.reducer is not None and not point.places:
        point = replace(point, places=default_places(model))
    return point if gmacs is None else fitted(model, point, gmacs, classes)


def model_at(model: Model, point: Point, classes: Classes | None = None) -> Model:
    """The model at a point, under a name that says so; a threshold is left to ``Settings``.

    classes, ValueError: see ``images_at``.
    """
    name = f"{model.name} {point.name.replace(',', '')}"
    return replace(model, name=name, images=images_at(model, point, classes))


def fitted(model: Model, point: Point, gmacs: float, classes: Classes | None = None) -> Point:
    """The point at the greatest keep rate, to 1 %, at which a picture costs at most ``gmacs``.

    ValueError: not even 1 % does, or the cost of the model follows another setting.
    """
    if point.reducer is None and setting_of(model) != "keep":
        mend = "name a --reducer"
        if model.first is not None:
            mend = "let `effclip sweep --budget` choose the threshold of a cascade"
        elif setting_of(model) == "threshold":
            mend = f"find one by `effclip calibrate --gmacs {gmacs:g}` and give it as --threshold"
        raise ValueError(f"--gmacs {gmacs:g}: {model.name} has no keep rate that this could set; {mend}")

    def cost(keep: float) -> float:
        return mean_macs(images_at(model, replace(point, keep=keep), classes), model.image_size).gmacs

    return replace(point, keep=greatest_keep(cost, gmacs))


def greatest_keep(cost: Callable[[float], float], gmacs: float) -> float:
    """The greatest keep rate, to 1 %, that costs at most ``gmacs``.

    cost: a keep rate in (0, 1] -> GMACs of a picture; a ValueError says that so few tokens are too few.
    ValueError: not even 1 % does.
    """

    def cost_if_it_works(hundredths: int) -> float | None:
        try:
            return cost(hundredths / _HUNDREDTHS)
        except ValueError:  # so few tokens that the reducer cannot work
            return None

    def fits(hundredths: int) -> bool:
        found = cost_if_it_works(hundredths)
        return found is None or found <= gmacs  # if any rate fits where it cannot work, a higher one

    # The rate ``low`` fits; every rate above ``high`` does not. Near 1, ranking may cost more than it saves.
    low, high = (_HUNDREDTHS,) * 2 if cost(1.0) <= gmacs else (0, _HUNDREDTHS - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    if not low or cost_if_it_works(low) is None:
        rates = range(low + 1, _HUNDREDTHS + 1)
        least = next(found for rate in rates if (found := cost_if_it_works(rate)) is not None)
        raise ValueError(f"--gmacs {gmacs:g}: a picture costs {least:.4g} GMACs at least; give that or more")
    return low / _HUNDREDTHS
