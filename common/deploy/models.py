"""`effclip models`: which models the commands open: packaged ones, types of model directories, and open_clip's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points

from common.arguments import CommandParser
from common.packaged import packaged_models

_TYPES = "effclip.models"
"""The entry-point group of ``common.models``, which imports torch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = CommandParser(prog="effclip models", description=__doc__.splitlines()[0])
    command.add_argument("word", nargs="?", help="list open_clip's models with this in their name, and their weights")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0. ValueError: no model of open_clip has such a name."""
    word = parser().parse_args(arguments).word
    print("\n".join(_known() if word is None else _of_open_clip(word)))
    return 0


def _known() -> Iterator[str]:
    for model in packaged_models():
        yield f"{model.weights}\n    {model.about}"
    types = sorted(point.name for point in entry_points(group=_TYPES))
    yield f"model directories and weights files of the types {', '.join(types)}, by their path"
    yield "folders of open_clip and of transformers' CLIPModel, by their path; hf-hub:ORG/NAME names one on the hub"
    yield "open_clip's models by name, with --weights: `effclip models WORD` lists those with WORD in their name"


def _of_open_clip(word: str) -> Iterator[str]:
    import open_clip

    found = [name for name in open_clip.list_models() if word.lower() in name.lower()]
    if not found:
        raise ValueError(f"no model of open_clip has {word!r} in its name; a shorter word finds more, such as ViT-B")
    for name in found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        yield f"--model {name} --weights {tags or 'FILE (none is published)'}"
