"""`lightning` as processes of their own, forked from one that has imported the suite, so that many cost little."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
STEPS = 9  # of the tiny recipe; an epoch has 6 batches
_HERE = "tests.common.running.trainings"


class Ended(NamedTuple):
    """How a command ended: its exit code, or minus the signal that killed it, and what it printed."""

    code: int
    printed: str


@contextmanager
def commands(folder):
    """Gives a function (words, **environment) -> Ended, which runs one command from ``folder``.

    Whatever is wrong, no command shows a traceback: AssertionError.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, **pipes, cwd=folder, env=environment, text=True) as server:

        def run(*words, **variables):
            output = Path(folder, "printed.txt")
            request = {"words": [str(word) for word in words], "variables": variables, "output": str(output)}
            print(json.dumps(request), file=server.stdin, flush=True)
            ended = Ended(json.loads(server.stdout.readline()), output.read_text())
            assert "Traceback" not in ended.printed, ended.printed
            return ended

        yield run
        # Said in words, since loader workers that another test forked may hold this pipe open.
        print("null", file=server.stdin, flush=True)


def fit(run, place, name, workers, *words, **variables):
    """Train by the recipe; the run's files go below the folder of that name."""
    runs = str(place / name)
    line = ["fit", "-c", "tiny.yaml", "--data.init_args.num_workers", workers, *words]
    return run(*line, EFFCLIP_RUNS=runs, **variables)


def strike(step, number):
    """The words by which a training sends itself a signal."""
    setting = "--trainer.callbacks"
    return [f"{setting}+", f"{_HERE}.Strike", f"{setting}.at", step, f"{setting}.number", number]


def fill(folder, full, room):
    """The words by which a training finds its disk full between two steps."""
    setting = "--trainer.callbacks"
    where = [f"{setting}+", f"{_HERE}.FillDisk", f"{setting}.folder", folder]
    return [*where, f"{setting}.full", full, f"{setting}.room", room]


def serve():
    """Fork and run the requests of the standard input, one after the other, until one is null."""
    import gc

    import lightning.pytorch.cli  # noqa: F401  imported here once for all
    import torch

    from common.cli import main

    torch.set_num_threads(1)
    # No child looks for garbage among the half a million objects of the imports, and so none copies their memory.
    gc.collect()
    gc.freeze()
    for request in map(json.loads, sys.stdin):
        if request is None:
            return
        child = os.fork()
        if child == 0:
            os.environ.update(request["variables"])
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 99
            try:
                sys.argv = ["lightning", *request["words"]]
                code = main(request["words"]) or 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


if __name__ == "__main__":
    serve()
