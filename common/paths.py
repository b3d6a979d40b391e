"""Where runs and caches go, and how their files are written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def runs_directory() -> Path:
    """The folder of run directories and caches: `$EFFCLIP_RUNS`, or `runs` in the working directory."""
    return Path(os.environ.get("EFFCLIP_RUNS") or "runs")


def refuse_existing(folder: Path) -> None:
    """ValueError: a folder that something new would be written into holds something, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder.absolute()} is there already; name a new folder")


def check_writable(folder: Path, mend: str) -> None:
    """Make a folder, and try to write into it before hours of work end there. mend: the end of the message.

    ValueError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"nothing can be written into {folder.absolute()}: {error.strerror}; {mend}") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` at the end: readers see the whole file or folder, or none.

    The block writes a file there, or makes a folder. After an error nothing stays behind. Parent folders are made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
