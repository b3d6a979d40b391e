"""One list of token reducers: each says what it needs, where it stands, what it costs and where it comes from.

A class joins the list by ``@reducer(...)``; its docstring is its description in docs/reducers.md. This file knows no
reducer: the modules that define some are imported by whoever wants the list, all of them by ``installed_reducers``.

Shapes: C classes, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from math import isclose
from typing import Any, NamedTuple

from torch import Tensor, nn

from common.adapters.tower import AdaptedTower
from common.reduction import Place, Reducer
from common.tower import ImageTower

NEEDS = {
    "class token": "the class token, or its attention, for which a pooling head's query stands",
    "keys": "the keys of a block",
    "attention": "the whole attention matrix of a block",
    "grid": "every patch of a square grid, as in a whole tower",
    "places": "where patches stand in a square grid, of which some may be gone",
    "pixels": "the picture, of which tokens are patches",
    "readout": "the tower's last norm and projection, or what it pools of a token alone",
    "texts": "the embeddings of the classes, on which a picture's own embedding then depends",
    "training": "modules that a training has made for this tower",
}
"""What a reducer may read beside the patch tokens."""
REVISION = 2
"""Of the reducers' definitions, which results note as "reducers" in their conditions. 1 were those that differed from
released code: EViT rounded and averaged (now ``EViT(keep, "averaged")``), ToMe's sets were swapped, all tokens of A-ViT
halted with the class token, under another loss, and MLIP's merging was not at equal cost."""


class Setting(NamedTuple):
    """The tower, or the level of a tower, for which reducers are built.

    keep: share of the patch tokens that stay.  layer: the block at which the reducer works, or the first of several.
    patches: K, the patch tokens that enter.  blocks: L.  grid: patches a side; 0: the tokens are no square grid.
    tower: the tower whose tokens these are, for reducers that read its output; None: they cannot be built.
    trained: the modules of a reducer that is trained; None: it cannot be built.
    tiles: m, the tiles a side into which ``common.tiles`` cuts a picture; 1: it is not cut.
    texts: embeddings [C,E] of the classes that a picture is scored against; None: reducers that choose by them cannot
        be built.
    """

    keep: float
    layer: int
    patches: int
    blocks: int
    grid: int = 0
    tower: Any = None
    trained: nn.Module | None = None
    tiles: int = 1
    texts: Tensor | None = None


def setting_for(
    tower: ImageTower | AdaptedTower, keep: float, layer: int, tiles: int = 1, texts: Tensor | None = None
) -> Setting:
    """The setting of a whole tower at one keep rate, from block ``layer`` on."""
    blocks = len(tower.transformer.resblocks)
    return Setting(keep, layer, tower.grid**2, blocks, tower.grid, tower, tiles=tiles, texts=texts)


@dataclass(frozen=True)
class Entry:
    """A reducer of the list.

    name: as commands take it.  title: as tables print it.
    cls: its class, whose docstring describes it; several entries may share one.
    place: "before", "middle" or "after" a block, where it stands.
    build: ``Setting`` -> reducers by their places.  tiled: the same for a picture in tiles, which they join in one
        sequence; None: it works in one picture alone.
    needs: of NEEDS.  source: the publication.  licence: of the released code.
    differs: what this implementation does otherwise; empty: nothing that is known.
    exceptions: properties of all other reducers that it lacks, by name, each with the reason; of "batch" (a picture's
        answer does not depend on its batch), "identity" (keep 1 changes nothing), "levels" (works in WaveCLIP's
        levels).
    untrained: (width D, blocks L, patches K) -> the modules with which its training begins; None: it is not trained.
    options: arguments of ``cls`` beside the keep rate, where it has another form than the class by itself.
    rates: the only keep rates that it can have; none: it can have any.
    same: what settings have in common at which it does the same; None: no two keep rates are known to.
    """

    name: str
    title: str
    cls: type
    place: str
    build: Callable[[Setting], dict[Place, Reducer]]
    needs: tuple[str, ...]
    source: str
    licence: str
    differs: str
    exceptions: dict[str, str]
    untrained: Callable[[int, int, int], nn.Module] | None = None
    tiled: Callable[[Setting], dict[Place, Reducer]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    same: Callable[[Setting], Hashable] | None = None

    def rate(self, keep: float) -> float:
        """The keep rate at which it works where ``keep`` is asked for: ``keep``, or the nearest of ``rates``."""
        return min(self.rates, key=lambda rate: abs(rate - keep), default=keep)

    def reducers(self, setting: Setting) -> dict[Place, Reducer]:
        """The reducers of one setting, by their places. ValueError: a setting that lacks what this reducer needs."""
        if not isclose(setting.keep, self.rate(setting.keep)):
            only = " or ".join(f"{rate:g}" for rate in self.rates)
            raise ValueError(f"{self.name} keeps {only} of the patches, never {setting.keep:g}; give keep {only}")
        if setting.tiles > 1 and self.tiled is None:
            able = ", ".join(sorted(name for name, entry in REDUCERS.items() if entry.tiled))
            raise ValueError(f"{self.name} has no budget over the tiles of a picture; take one of {able}")
        if setting.tiles > 1:
            return self.tiled(setting)
        if "grid" in self.needs and setting.grid**2 != setting.patches:
            raise ValueError(
                f"{self.name} needs every patch of a square grid; {setting.patches} tokens of a grid of "
                f"{setting.grid} are none"
            )
        if "pixels" in self.needs and not setting.grid:
            raise ValueError(f"{self.name} reads the pixels of each patch; the tokens of a level are no patches")
        if "places" in self.needs and not setting.grid:
            raise ValueError(f"{self.name} reads where patches stand; the tokens of a level stand in no square grid")
        if "readout" in self.needs and setting.tower is None:
            raise ValueError(f"{self.name} reads the tower's output; give the tower")
        if "texts" in self.needs and setting.texts is None:
            raise ValueError(
                f"{self.name} chooses tokens by the classes' texts, so a picture has no embedding of its own; classify "
                "zero-shot with it, or take a reducer without texts such as class-attention"
            )
        if "training" in self.needs and setting.trained is None:
            raise ValueError(f"{self.name} is trained, and a plain tower has not learned it; open a model of that type")
        return self.build(setting)


REDUCERS: dict[str, Entry] = {}
"""Every reducer that was imported, by its name."""
GROUP = "effclip.reducers"
"""The entry-point group of the modules that define reducers."""


def installed_reducers() -> dict[str, Entry]:
    """``REDUCERS``, after every module of the entry points ``GROUP`` was imported. ValueError: there is none."""
    for point in entry_points(group=GROUP):
        point.load()
    if not REDUCERS:
        raise ValueError(f"this installation names no reducers (entry points {GROUP}); `effclip doctor` says the mend")
    return REDUCERS


def schedule(
    entry: Entry,
    tower: ImageTower | AdaptedTower,
    keep: float,
    layers: Sequence[int],
    tiles: int = 1,
    texts: Tensor | None = None,
) -> dict[Place, Reducer]:
    """A reducer at several blocks: at each of ``layers``, the share ``keep`` of the patches that are still there stays.

    A reducer that spreads over several blocks by itself takes the first block alone.
    tiles, texts: see ``Setting``.
    ValueError: layers that do not ascend, several for such a reducer or for tiles, or a tower that lacks what it needs.
    """
    check_layers(layers, len(tower.transformer.resblocks))
    if tiles > 1 and len(layers) > 1:
        raise ValueError(f"places {list(layers)}: the tiles of a picture are joined at one block; give one place")
    setting = setting_for(tower, keep, layers[0], tiles, texts)
    places: dict[Place, Reducer] = {}
    for layer in layers:
        built = entry.reducers(setting._replace(layer=layer))
        if len(built) > 1 and len(layers) > 1:
            raise ValueError(f"{entry.name} spreads over several blocks from one on; give its first block as the place")
        places |= built
        if built:  # no reducer where nothing is to go
            setting = setting._replace(patches=next(iter(built.values())).left(setting.patches))
    return places


def check_layers(layers: Sequence[int], blocks: int) -> None:
    """ValueError: numbers of blocks that do not ascend, or that a tower of so many ``blocks`` lacks; or none."""
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"places {list(layers)} must be numbers of blocks in ascending order")
    if not 0 <= layers[0] <= layers[-1] < blocks:
        raise ValueError(f"places {list(layers)}: the blocks of this tower are 0 to {blocks - 1}; give some of those")


def at(layer: int, place: str) -> Place:
    """The place "before", in the "middle" of or "after" a block."""
    return layer if place == "before" else (layer, place)


def reducer(
    name: str,
    title: str,
    *,
    source: str,
    licence: str,
    place: str = "before",
    needs: tuple[str, ...] = (),
    differs: str = "",
    build: Callable[[Setting], dict[Place, Reducer]] | None = None,
    exceptions: dict[str, str] | None = None,
    untrained: Callable[[int, int, int], nn.Module] | None = None,
    tiled: Callable[[Setting], dict[Place, Reducer]] | None = None,
    options: Mapping[str, Any] | None = None,
    rates: tuple[float, ...] = (),
    same: Callable[[Setting], Hashable] | None = None,
) -> Callable[[type], type]:
    """Put a class on the list; see ``Entry``. A class may join more than once, under another name and in another form.

    build: None is one reducer, ``cls(keep, **options)``, at ``place`` of ``layer``.
    """
    assert set(needs) <= set(NEEDS) and name not in REDUCERS and ("training" in needs) == bool(untrained), name

    def register(cls: type) -> type:
        builder = build or (lambda setting: {at(setting.layer, place): cls(setting.keep, **(options or {}))})
        stated = (name, title, cls, place, builder, needs, source, licence, differs)
        REDUCERS[name] = Entry(*stated, exceptions or {}, untrained, tiled, options or {}, rates, same)
        return cls

    return register


def named(name: str) -> Entry:
    """The entry of a name. ValueError: there is none."""
    if name not in REDUCERS:
        near = get_close_matches(name.lower(), REDUCERS, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no reducer {name!r}{guess or ';'} there are {', '.join(sorted(REDUCERS))}")
    return REDUCERS[name]
