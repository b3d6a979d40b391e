"""Every engine in a process of its own, which answers pictures and times passes over them when its turn comes.

Shapes: B images, S pixels, M images to be timed, L levels of a model or cascade, C classes, E joint dim.

So an engine that crashes takes no other with it, and their compilers and thread pools do not meet.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.together.deploy_engines import REFERENCE, REFERENCE_INT8, Engine, Prepared, ending
from common.cascade import cascaded
from common.deploy.graphs import Graph, reason
from common.stages import run_chain
from common.timing import Timed, timed
from waveclip import MarginGate, ProgressiveClassifier

_LOOK, _IDLE, _LOOKS = 0.01, 0.1, 100
"""A process is idle when it computes for less than a tenth of 10 ms; it looks at most 100 times."""
_PATIENCE = 10  # seconds
_FORKS = multiprocessing.get_context("forkserver")
"""Forks of a process that imports everything once and computes nothing: none has the threads or memory of another."""
_FORKS.set_forkserver_preload(["benchmarks.__main__", __name__])


class Levels:
    """Graphs as the tower of a ``ProgressiveClassifier``."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs, self.steps = graphs, len(graphs)

    def tokens_in(self, step: int) -> int:
        """Not counted here."""
        return 0

    def begin(self, images: Tensor) -> tuple[Tensor, Any]:
        """images [B,3,S,S] -> z [B,E] of the first level, and what the next one needs."""
        return self._run(0, (images,))

    def refine(self, state: Any, rows: Tensor) -> tuple[Tensor, Any]:
        """The next level's z [K,E] of ``rows`` (long [K]) alone, and what the one after it needs."""
        step, tensors = state
        return self._run(step, tuple(tensor[rows] for tensor in tensors))

    def _run(self, step: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        z, *tensors = self._graphs[step](*inputs)
        return z.float(), (step + 1, tuple(tensors))


@dataclass(frozen=True, eq=False)
class Part:
    """A model, its unit class embeddings [C,E], and the images [M,3,S,S] that it sees when it is timed."""

    prepared: Prepared
    classes: Tensor
    images: Tensor


Work = Mapping[str, Sequence[Part]]
"""What every engine runs, by its name: one model, or the two of a cascade. One model may stand in two of them."""


class Loaded:
    """A model's graphs, ready to answer in this process."""

    def __init__(self, graphs: Sequence[Graph], part: Part) -> None:
        self._graphs, self.images = graphs, part.images
        self._classes, self._scale = part.classes, part.prepared.scale
        self._probabilities = self.classifier(0.0).probabilities

    def classifier(self, threshold: float) -> ProgressiveClassifier:
        """Early exit among its own levels."""
        gate = MarginGate(threshold)
        return ProgressiveClassifier(Levels(self._graphs), self._classes, self._scale, gate).eval()

    def levels(self, images: Tensor) -> Tensor:
        """Images [B,3,S,S] -> class probabilities [L,B,C] of every level."""
        return torch.stack([self._probabilities(z.float()) for z, *_ in run_chain(self._graphs, images)])

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A ``Run`` of all levels, for a member of a cascade."""
        return self.levels(images)[-1], torch.zeros(len(images)).long()


class Runner:
    """One engine at work in this process. graphs, own_threads: as of ``Engine``."""

    def __init__(self, graphs: Callable[[Prepared], list[Graph]], work: Work, own_threads: bool = False) -> None:
        parts = dict.fromkeys(chain.from_iterable(work.values()))  # a model that stands in two is loaded once
        loaded = {part: Loaded(graphs(part.prepared), part) for part in parts}
        if own_threads:  # torch's, which compare margins here, would take the cores from the engine's
            torch.set_num_threads(1)
        self._models = {side: [loaded[part] for part in parts] for side, parts in work.items()}

    @torch.no_grad()
    def answer(
        self, side: str, images: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Margins [L-1,B] of all levels but the last, and whether each level is right, bool [L,B].

        images: [B,3,S,S] for each model of the side; None: those to be timed.
        labels: long [B]; None: the last level is taken to be right.
        """
        models = self._models[side]
        images = [model.images for model in models] if images is None else images
        levels = torch.cat([model.levels(x) for model, x in zip(models, images, strict=True)])
        guesses = levels.argmax(-1)
        return MarginGate(0.0).confidence(levels[:-1]), guesses == (guesses[-1] if labels is None else labels)

    @torch.no_grad()
    def time(self, side: str, threshold: float, batch: int) -> Timed:
        """A pass over the images to be timed, ``batch`` at once, with early exit at a threshold; returns when idle."""
        models = self._models[side]
        batches = list(zip(*(model.images.split(batch) for model in models), strict=True))
        spent = timed(partial(_all, self._early_exit(side, threshold), batches))
        _settle()
        return spent

    def _early_exit(self, side: str, threshold: float) -> Callable[..., Any]:
        """What a deployed model or cascade does with images [B,3,S,S] for each of its models."""
        if len(self._models[side]) == 1:
            return self._models[side][0].classifier(threshold)
        first, second = self._models[side]
        return cascaded(first.run, second.run, threshold)


def _all(classify: Callable[..., Any], batches: Sequence[Sequence[Tensor]]) -> None:
    for images in batches:
        classify(*images)


def _settle() -> None:
    """Wait until this process is idle: thread pools look for work in a loop for a while after their last call."""
    for _ in range(_LOOKS):
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _IDLE * _LOOK:
            return


def give_back_memory() -> None:
    """Collect what is no longer used, and return it to the system."""
    gc.collect()
    _trim()


def _trim() -> None:
    """Return what was freed to the system, which the C library otherwise keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


class Workers:
    """The engines' processes, of which one works at a time.

    lost: engines that failed, and how; the others go on.
    """

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        self._processes: dict[str, _Process] = {}

    def begin(self, name: str, engine: Engine, work: Work) -> None:
        """Start an engine's process, which makes its ``Runner``. ValueError: as ``ask``."""
        self._processes[name] = _Process()
        self.ask(name, "", engine.graphs, work, engine.own_threads)

    def ask(self, name: str, method: str, *given: Any) -> Any:
        """What a method of the engine's ``Runner`` returns; None: the engine is lost.

        ValueError: the engine is a reference, with which every row is compared.
        """
        if name in self.lost:
            return None
        try:
            return self._processes[name].ask(method, *given)
        except _Lost as error:
            self.lost[name] = str(error)
        if name in (REFERENCE, REFERENCE_INT8):
            raise ValueError(
                f"{name}: {self.lost[name]}; there is no table without it, as every row is compared with it"
            )
        warnings.warn(f"{name}: {self.lost[name]}; the table goes on without it", stacklevel=2)
        return None

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.end()


@contextmanager
def workers(engines: Mapping[str, Engine], work: Work) -> Iterator[Workers]:
    """Processes that have the work before them, and end with the context. ValueError: as ``Workers.ask``."""
    started = Workers()
    try:
        for name, engine in engines.items():  # one by one: loading measures how linear maps are fastest
            started.begin(name, engine, work)
        yield started
    finally:
        started.end()


class _Lost(Exception):
    """An engine failed; the message says how."""


class _Process:
    """A process that waits, asleep, for calls of its ``Runner``."""

    def __init__(self) -> None:
        self._pipe, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        self._process.start()
        theirs.close()  # so that its death ends the pipe

    def ask(self, method: str, *given: Any) -> Any:
        """The result of a method of the ``Runner``; "": make it. _Lost: the call or the process failed."""
        try:
            # By value: torch's own way through shared memory would need as much of it as there are pictures.
            self._pipe.send_bytes(pickle.dumps((method, given)))
            failure, found = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            raise _Lost(f"its process ended with {ending(self._process.exitcode)}") from None
        if failure:
            raise _Lost(failure)
        return found

    def end(self) -> None:
        """End the process; one that does not end by itself is killed."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        self._process.kill()


def _serve(pipe: Connection, threads: int) -> None:
    """Answer the calls of a ``_Process`` until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's parent's, which ends the pipe
    torch.set_num_threads(threads)
    runner = None
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        method, failure, found = "", "", None
        try:
            method, given = pickle.loads(call)
            if method:
                found = getattr(runner, method)(*given)
            else:
                runner = Runner(*given)
        except Exception as error:  # engines raise their own types
            failure = f"{type(error).__name__}: {reason(error)}"
        call = given = None
        # Every engine's process keeps little. Collecting takes a quarter of a second, so it waits for copied models.
        if not method:
            give_back_memory()
        elif method != "time":
            _trim()
        pipe.send_bytes(pickle.dumps((failure, found)))
