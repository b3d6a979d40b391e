"""Command lines one after another in one fresh interpreter, and what they import."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "torchvision", "open_clip", "common"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program that runs another one, with its arguments, where neither torch nor this suite can be imported."""


class Answer(NamedTuple):
    """A command's exit code, what it printed on both streams, and the modules that were imported up to its end."""

    code: int
    printed: str
    imported: set[str]


def answers(lines, folder=None):
    """The answers of `effclip` to ``lines``, lists of words, run in ``folder``. AssertionError: one broke off."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return [Answer(code, printed, set(imported)) for code, printed, imported in json.loads(done.stdout)]


def main():
    """Answer the lines in the first argument, as JSON."""
    from common.cli import main as effclip

    found = []
    for words in json.loads(sys.argv[1]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = effclip(words)
            except SystemExit as stop:
                code = stop.code
        found.append((code, printed.getvalue(), [name for name in sys.modules if "." not in name]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
