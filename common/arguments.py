"""Command-line arguments of several commands. Nothing here imports torch, so a mistake is answered at once."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

PREFIXES = ("hf-hub:", "local-dir:")
"""How models on the hub, and folders of other programs, are named."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Of weights files."""
DTYPES = ("float32", "bfloat16", "float16")
"""What an image tower may compute in; below float32 it runs under autocast."""


class CommandParser(argparse.ArgumentParser):
    """Answers a mistake in one line, without the usage, and guesses what a mistyped option should be."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Keep the words for ``error``."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message with a guess, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}{self._guess()}\n")

    def _guess(self) -> str:
        known = self._option_string_actions
        for word in (word.partition("=")[0] for word in self._words if word.startswith("--")):
            near = get_close_matches(word, known, 1)
            if near and not any(option.startswith(word) for option in known):
                return f"; did you mean {near[0]}?"
        return ""


def number(what: str, holds: Callable[[Any], bool], kind: type = float) -> Callable[[str], Any]:
    """A type for argparse: a number that fulfils a condition.

    what: the numbers that do, in words, with an example.  holds: the condition, which NaN must not fulfil.
    kind: int or float.
    """

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return read


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of ``least`` or more."""
    return number(f"a whole number of {least} or more", lambda value: value >= least, int)


GMACS = number("a number of GMACs above 0, such as 0.02", lambda value: value > 0)
"""A type for argparse: a budget for a picture."""
CONFIDENCE = number("a confidence in [0, 1], such as 0.5", lambda value: 0 <= value <= 1)
"""A type for argparse: a threshold of early exit."""


def folder_for_results(text: str) -> Path:
    """A type for argparse: a folder, which need not be there. A file is refused before hours of work end at it."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; name a folder")
    return Path(text)


def add_model(command: argparse.ArgumentParser, default: str | None = None, positional: bool = False) -> None:
    """Add the arguments that name a model.

    default: the description of the model used without --model; None: --model is required.
    positional: the model is the first argument instead of --model.
    """
    add = command.add_argument
    what = (
        "a model directory, a weights file of this suite, a folder of open_clip or transformers' CLIPModel "
        "(hf-hub:ORG/NAME for one on the hub), or an open_clip model name"
    )
    if positional:
        add("model", metavar="DIR", help=what)
    else:
        add("--model", required=default is None, help=what + (f"; default: {default}" if default else ""))
    add("--weights", help="for an open_clip name: one of its tags, or a local file")
    add("--quick-gelu", choices=("yes", "no"), help="the activation of a local file of open_clip weights")
    add(
        "--preprocess",
        metavar="TAG|clip",
        help="how pictures were prepared for a local file of open_clip weights: as for OpenAI's CLIP, or for a tag",
    )
    add("--text-model", help="whose text tower to use, for a model that is an image tower alone")


def add_first(command: argparse.ArgumentParser, remark: str = "") -> None:
    """Add the argument that names the first model of a cascade. remark: the end of its help."""
    command.add_argument(
        "--first",
        metavar="MODEL",
        help="a smaller model, a directory or weights file: it answers where its margin reaches the threshold, the "
        f"model elsewhere{remark}",
    )


def model_arguments(args: argparse.Namespace) -> dict[str, str | bool | None]:
    """The arguments of ``load_model`` and ``load``, from those that ``add_model`` added.

    ValueError: --model, or --first, is empty or a path where nothing is; said here, before torch is imported.
    """
    first = getattr(args, "first", None)
    if "" in (args.model, first):
        raise ValueError("the name of a model is empty, as of a variable that is not set; name a model")
    if first is not None:
        check_first(first)
    if args.model is not None and ("/" in args.model or Path(args.model).suffix in SUFFIXES):
        _check_there(args.model)
    elif args.model is not None:
        _check_name(args.model)
    quick_gelu = None if args.quick_gelu is None else args.quick_gelu == "yes"
    others = {name: getattr(args, name) for name in ("model", "weights", "text_model", "preprocess")}
    return {**others, "quick_gelu": quick_gelu}


def check_first(name: str) -> None:
    """ValueError: the first model of a cascade is no path, as of an open_clip name, to which no --weights belong."""
    _check_there(name, "; --first is a model directory, a weights file or hf-hub:ORG/NAME")


def _check_there(name: str, mend: str = "") -> None:
    """ValueError: nothing is at a path. mend: the end of the message."""
    if not name.startswith(PREFIXES) and not Path(name).exists():
        what = "weights" if Path(name).suffix in SUFFIXES else "model"
        raise ValueError(f"no {what} at {Path(name).absolute()}{mend}")


def _check_name(name: str) -> None:
    """ValueError: a name is like one of open_clip's models, but is none of them, and no file or folder.

    open_clip is not imported; its list may grow at run time, so a name that is like none of them is left to it.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None or Path(name).exists() or name.startswith(PREFIXES):
        return
    names = [file.stem for file in (Path(package.origin).parent / "model_configs").glob("*.json")]
    near = get_close_matches(name, sorted(names), 1)
    if near and name not in names:
        raise ValueError(f"{name!r} is no file or folder here and no open_clip model; did you mean {near[0]}?")


def read_templates(value: str, others: str = "") -> tuple[str, ...]:
    """The prompts that --template gives: one text with {}, or the lines of a .txt file.

    others: the end of the error message, for the other values that a command accepts.
    ValueError: there is no such file, or a text has no {}.
    """
    lines = tuple(_lines(value, "templates")) if value.endswith(".txt") else (value,)
    without = [line for line in lines if "{}" not in line]
    if without or not lines:
        wrong = repr(without[0]) if without else "the file"
        raise ValueError(f"--template {value}: {wrong} has no {{}} for the class name; give texts that do{others}")
    return lines


def read_labels(names: str | None, file: str | None) -> list[str] | None:
    """The class names of --labels "cat,dog" or --labels-file FILE (one a line); None where neither is given.

    ValueError: both are given, there is no such file, a name is repeated, or there are fewer than two names.
    """
    if names is None and file is None:
        return None
    if names is not None and file is not None:
        raise ValueError("--labels and --labels-file both name the classes; give one of them")
    parts = _lines(file, "labels") if file is not None else [part.strip() for part in names.split(",")]
    return checked_labels([part for part in parts if part])


def _lines(file: str, what: str) -> list[str]:
    """The lines of a text file that are not empty."""
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"no {what} at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def checked_labels(names: Sequence[str]) -> list[str]:
    """The names. ValueError: one text, fewer than two names, or one twice (ImageNet's 1,000 apart)."""
    if isinstance(names, str):
        raise ValueError(f"labels {names!r} are one text; give a list of names")
    names = list(names)
    twice = [name for name, times in Counter(names).items() if times > 1]
    if len(names) == 1000:  # ImageNet's, of which two are called missile
        twice = []
    if len(names) < 2 or twice:
        wrong = f"{twice[0]!r} twice" if twice else f"{len(names)} of them"
        raise ValueError(f"labels must be at least two different names, not {wrong}")
    return names
