"""Pictures of the embedded benchmark as a folder of PNG files, one folder a class: `python -m ... DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.data.embedded.shapes import class_names
from common.data.embedded.splits import SPLITS, indices, scene
from common.data.embedded.twemoji import CANVAS, VIEW
from common.errors import sentence
from common.progress import bar

REVISION = 2
"""Of the scenes."""


def write_folder(folder: Path, split: str = "test", pictures: int = 200) -> None:
    """Write the first ``pictures`` of a split, the part of each that a model sees, as DIR/NAME/NUMBER.png.

    ValueError: no such split, or fewer pictures than that.
    """
    numbers = indices(split, REVISION)
    if not 0 < pictures <= len(numbers):
        raise ValueError(f"{pictures} pictures of {split!r}: give 1 to {len(numbers)}")
    names, edge = class_names("all"), (CANVAS - VIEW) // 2
    for number in bar(numbers[:pictures], "drawing"):
        drawn, _ = scene(split, number, REVISION)
        file = folder / names[drawn.main.label] / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.render().crop((edge, edge, edge + VIEW, edge + VIEW)).save(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 a mistake, or what the disk refuses."""
    parser = argparse.ArgumentParser(prog="python -m common.data.embedded.folder", description=write_folder.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test", help=f"one of {', '.join(SPLITS[REVISION])} (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=200, help="how many (default %(default)s)")
    args = parser.parse_args(arguments)
    try:
        write_folder(args.folder, args.split, args.pictures)
    except (ValueError, OSError) as error:
        text = error if isinstance(error, ValueError) else sentence(error) or error
        print(f"embedded_folder: error: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
