"""The tables of docs/reducers.md, from the list of reducers: what each needs and costs, and its docstring.

Shapes: K patch tokens, D width, H heads, E joint dim, C classes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

import torch

import mlip.merging
import patchrank.reducers
from benchmarks.cells import table
from common.reducer_registry import NEEDS, REDUCERS, Entry, Setting, at
from common.reduction import Place
from patchrank.reducers.base import Call, TokenReducer
from patchrank.reducers.tiles import EvenTiles, TileBudget

assert patchrank.reducers and mlip.merging  # their reducers are on the list

KEEP, LAYER, BLOCKS, GRID, WIDTH, HEADS, EMBED, PATCH = 0.6, 3, 12, 14, 768, 12, 512, 16
"""The setting of the costs: ViT-B/16 at 224 px, 60 % of the patches from block 3 on."""
CLASSES = 1000
"""C: as many as ImageNet has names."""
TILES = 2
"""Tiles a side of a larger picture."""
EXCEPTIONS = {
    "batch": "A picture's answer depends on its batch",
    "identity": "Keep 1 is not the tower itself",
    "levels": "Not in WaveCLIP's levels",
}


def tower_macs(places: Mapping[Place, TokenReducer], tiles: int = 1) -> tuple[int, int]:
    """Multiply-adds of a picture in ViT-B/16 with reducers: in all, and of the reducers themselves.

    By closed form, in the convention of ``common.flops`` with attention's products.
    tiles: a side; 1: the picture is not cut. The views run through the blocks one by one until a budget joins them.
    """
    patches, own, views = GRID**2, 0, 1 if tiles == 1 else 1 + tiles**2
    total = views * (3 * PATCH**2 * WIDTH * patches + 5 * WIDTH * (patches + 1))
    for block in range(BLOCKS):
        for half in ("before", "middle", "after"):
            tokens = patches + 1
            if half == "middle":
                total += views * ((5 * WIDTH + 4 * WIDTH**2) * tokens + 2 * WIDTH * tokens**2)
            if half == "after":
                total += views * (5 * WIDTH + 8 * WIDTH**2) * tokens
            reducer = places.get(at(block, half))
            if reducer is not None:
                own += reducer.macs(Call(patches, 1, WIDTH, HEADS, ran=half != "before", embed_dim=EMBED))
                patches = reducer.left(patches)
                views = 1 if isinstance(reducer, TileBudget) else views
    return total + 5 * WIDTH * (patches + 1) + WIDTH * EMBED + own, own


def _at_the_setting(entry: Entry) -> dict[Place, TokenReducer]:
    with torch.device("meta"):
        modules = entry.untrained and entry.untrained(WIDTH, BLOCKS, GRID**2)
        texts = torch.empty(CLASSES, EMBED)
    rate = entry.rate(KEEP)
    return entry.reducers(Setting(rate, LAYER, GRID**2, BLOCKS, GRID, tower=object(), trained=modules, texts=texts))


def overview() -> str:
    """A row for each reducer: what it needs, where it stands, and its cost at one setting."""
    rows = []
    for name, entry in sorted(REDUCERS.items()):
        places = _at_the_setting(entry)
        total, own = tower_macs(places)
        where = entry.place + (", several blocks" if len(places) > 1 else "")
        needs = ", ".join(entry.needs) or "–"
        rows.append([f"`{name}`", entry.title, where, needs, f"{total / 1e9:.2f}", f"{own / 1e6:.1f}"])
    head = ["name", "reducer", "place", "needs", "GMACs", "own, million MACs"]
    dense = tower_macs({})[0] / 1e9
    note = (
        f"Costs by closed form: the image tower of ViT-B/16 at 224 px ({dense:.2f} GMACs, attention's products "
        f"included), {100 * KEEP:.0f} % of the patches from block {LAYER} on. A reducer of several blocks loses as "
        "many tokens over them; DiffRate has the nearest of its released schedules, half resolution keeps a quarter; "
        "DynamicViT's rate is that of the first of its three stages; Recoverable Compression reads the texts of "
        f"{CLASSES:,} classes. "
        "Place: before a block, in its middle, or after it. “Own” is what choosing and merging cost, comparisons and "
        "sums being free. "
        f"Needs: {'; '.join(f'*{need}*, {about}' for need, about in NEEDS.items())}."
    )
    return f"{table(head, rows, left=(0, 1, 2, 3))}\n\n{note}\n"


def in_tiles() -> str:
    """A row for each budget over tiles: how many tokens it leaves of a picture, and its cost at one setting."""
    rows = [["the thumbnail alone", GRID**2, f"{tower_macs({})[0] / 1e9:.2f}", ""]]
    everything = EvenTiles(1, TILES, GRID)
    total, own = tower_macs({at(LAYER, "after"): everything}, TILES)
    rows.append(["all tokens", everything.left(GRID**2), f"{(total - own) / 1e9:.2f}", ""])
    for name, entry in sorted(REDUCERS.items()):
        if entry.tiled is not None:
            places = entry.reducers(Setting(KEEP, LAYER, GRID**2, BLOCKS, GRID, tiles=TILES))
            total, own = tower_macs(places, TILES)
            left = places[LAYER, "after"].left(GRID**2)
            rows.append([f"`{name}`", left, f"{total / 1e9:.2f}", f"{own / 1e6:.1f}"])
    head = ["budget", "patch tokens", "GMACs", "own, million MACs"]
    note = (
        f"By closed form: ViT-B/16 on pictures of {TILES * GRID * PATCH} px, a thumbnail and {TILES**2} tiles, joined "
        f"after block {LAYER}, where budgets keep {100 * KEEP:.0f} %. “Own” as above."
    )
    return f"{table(head, rows, left=(0,))}\n\n{note}\n"


def descriptions() -> str:
    """A section for each reducer: its docstring, where it comes from, and what differs from the released code.

    A class that is on the list twice is described once, under its first name.
    """
    return "\n\n".join(_section(entry) for _, entry in sorted(REDUCERS.items())) + "\n"


def _section(entry: Entry) -> str:
    origin = f"Source: {entry.source}. Licence: {entry.licence}."
    form = "".join(f", {name}={value!r}" for name, value in entry.options.items())
    call = f"{entry.cls.__name__}(keep{form})" if form else entry.cls.__name__
    lines = [f"### {entry.title}", f"`{entry.name}` is `{call}`. {origin}"]
    first = next(other for other in REDUCERS.values() if other.cls is entry.cls)
    if entry is first:
        lines.append(_markdown(inspect.getdoc(entry.cls)))
    else:
        anchor = re.sub(r"[^\w -]", "", first.title.lower()).replace(" ", "-")
        lines.append(f"Described under [{first.title}](#{anchor}).")
    lines.append(f"Own cost: {_own_cost(entry)}")
    if entry.needs:
        lines.append(f"Needs: {', '.join(entry.needs)}.")
    if entry.differs:
        lines.append(f"Differs: {entry.differs}")
    lines += [f"{EXCEPTIONS[kind]}: {reason}." for kind, reason in entry.exceptions.items()]
    return "\n\n".join(lines)


def _own_cost(entry: Entry) -> str:
    """What a reducer's own multiply-adds are for, in the words of its ``macs``."""
    words = inspect.getdoc(next(iter(_at_the_setting(entry).values())).macs)
    return "none." if words == inspect.getdoc(TokenReducer.macs) else words[0].lower() + " ".join(words[1:].split())


_ARGUMENT = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): (.*)$", re.S)


def _markdown(docstring: str) -> str:
    """A docstring with its arguments as a list; what it says of errors is left out."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        # An argument begins a line, or stands behind two spaces.
        pieces: list[str] = []
        for line in re.split(r"\n|(?<=\.)  +", paragraph):
            begins = _ARGUMENT.match(line) or line.startswith("ValueError: ")
            if begins or not pieces:
                pieces.append(line)
            else:
                pieces[-1] += " " + line.strip()
        for piece in pieces:
            found = _ARGUMENT.match(piece)
            if found:
                names = ", ".join(f"`{name}`" for name in found[1].split(", "))
                parts.append(f"- {names}: {found[2]}")
            elif not piece.startswith("ValueError: "):
                parts.append(piece)
    text = ""
    for before, part in zip(["", *parts], parts, strict=False):
        joined = "\n" if before.startswith("- ") and part.startswith("- ") else "\n\n"
        text += (joined if text else "") + part
    return text
