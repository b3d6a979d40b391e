"""`effclip datasets`: the names that --data takes, with their splits and the number of their pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from common.arguments import CommandParser

_SHOWN = {1: " in their own colours", 2: " in random tints, so that shape tells names apart"}
"""How the pictures of each revision show their emoji."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return CommandParser(prog="effclip datasets", description=__doc__.splitlines()[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0."""
    parser().parse_args(arguments)
    print("\n".join(_rows()))
    return 0


def _rows() -> Iterator[str]:
    from common.data import catalogue
    from common.data.embedded.splits import SPLITS
    from common.data.lookup import EMBEDDED_TASKS, REVISIONS

    for name, revision in REVISIONS.items():
        pictures = ", ".join(f"{split} {count:,}" for split, (count, _) in SPLITS[revision].items())
        yield f"{name:<18}drawn here, of emoji{_SHOWN[revision]}, needs no download: {pictures}"
    yield f"{'':<18}few-shot tasks drawn here: {', '.join(EMBEDDED_TASKS)}"
    for name in catalogue.names():
        entry = catalogue.entry(name)
        pictures = ", ".join(f"{split} {part.count:,}" for split, part in entry.splits.items())
        classes = f"{entry.num_classes:,} classes" if entry.num_classes else entry.task
        yield f"{name:<18}{entry.title}, {classes}: {pictures}"
    yield f"{'FOLDER':<18}pictures of your own, one folder a class; or a .csv or .tsv with columns path and class"
    yield f"{'webdataset:FOLDER':<18}a set that CLIP_benchmark exported"
