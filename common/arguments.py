"""Command-line arguments that several commands share. No torch here: a mistake in the line is answered at once."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def add_model(command: argparse.ArgumentParser, default: str | None = None, positional: bool = False) -> None:
    """The model and what belongs to it: --model, or the first word.

    default: what is taken where a line does not name one; None: every line must.
    """
    add = command.add_argument
    what = "a model directory, a weights file of this suite, or an open_clip model name"
    if positional:
        add("model", metavar="DIR", help=what)
    else:
        add("--model", required=default is None, help=what + (f"; default: {default}" if default else ""))
    add("--weights", help="for an open_clip name: one of its tags, or a local file")
    add("--quick-gelu", choices=("yes", "no"), help="the activation of a local file of open_clip weights")
    add("--text-model", help="whose text tower to use, for a model that is an image tower alone")


def model_arguments(said: argparse.Namespace) -> dict[str, str | bool | None]:
    """What ``load_model`` and ``load`` take, from the arguments that ``add_model`` added."""
    quick_gelu = None if said.quick_gelu is None else said.quick_gelu == "yes"
    return {"model": said.model, "weights": said.weights, "quick_gelu": quick_gelu, "text_model": said.text_model}


def read_templates(said: str, others: str = "") -> tuple[str, ...]:
    """The prompts that --template means: a text with {}, or a .txt file of such lines.

    others: the other values that the command knows. ValueError: no such file, or a text without {}.
    """
    if said.endswith(".txt"):
        lines = tuple(_lines(said, "templates"))
    else:
        lines = (said,)
    without = [line for line in lines if "{}" not in line]
    if without or not lines:
        wrong = repr(without[0]) if without else "the file"
        raise ValueError(f"--template {said}: {wrong} has no {{}} for the class name; give texts that do{others}")
    return lines


def read_labels(said: str | None, file: str | None) -> list[str] | None:
    """The class names of --labels "cat,dog" or --labels-file FILE (one a line); None where neither is given.

    ValueError: both, no such file, one that is named twice, or fewer than two.
    """
    if said is None and file is None:
        return None
    if said is not None and file is not None:
        raise ValueError("--labels and --labels-file both name the classes; give one of them")
    parts = _lines(file, "labels") if file is not None else [part.strip() for part in said.split(",")]
    return checked_labels([part for part in parts if part])


def _lines(file: str, what: str) -> list[str]:
    """The lines of a text file that have something on them."""
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"no {what} at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark, which is no letter
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def checked_labels(names: Sequence[str]) -> list[str]:
    """The names. ValueError: fewer than two, or one twice (ImageNet's 1,000 apart)."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if len(names) == 1000:  # ImageNet's, of which two are called missile
        twice = []
    if len(names) < 2 or twice:
        wrong = f"{twice[0]!r} twice" if twice else f"{len(names)} of them"
        raise ValueError(f"labels must be at least two different names, not {wrong}")
    return list(names)
