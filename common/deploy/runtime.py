"""An exported model without torch: Python's standard library, numpy, Pillow and ONNX Runtime.

``EarlyExit(FOLDER).classify(pictures)`` runs a folder of `effclip export --format onnx`. A picture stops at the first
level whose margin reaches the threshold, and only the others go on. A level refines what the one before it kept of
them, or, of a cascade, is another model that starts anew from the picture as it sees it. export.json holds everything
that is not in the graphs. The folder's predict.py is this code with a command line (``common.deploy.predict``).

Shapes: B pictures, S pixels, C classes, E joint dim.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from common.arguments import checked_labels
from common.data.ahead import read_in_order
from common.data.prepared import open_upright
from common.deploy.description import description
from common.deploy.member import Member, views_of
from common.deploy.sessions import session_options

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""What can run the graphs, and ONNX Runtime's name of it."""
ALL_LEVELS = 2.0
"""A threshold that no margin reaches."""
Source = str | Path | BytesIO | Image.Image


@dataclass(frozen=True)
class Answer:
    """One picture's class, the level at which it stopped and its GMACs in the image tower; or the error instead."""

    picture: str
    label: str | None = None
    probability: float | None = None
    level: int | None = None
    gmacs: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Exits:
    """embeddings [B,E] and class probabilities [B,C] of the level [B] at which each picture stopped.

    Embeddings of a cascade are [B,0]: those of two models lie in two spaces.
    """

    embeddings: np.ndarray
    probabilities: np.ndarray
    levels: np.ndarray


class EarlyExit:
    """An exported folder, ready to classify.

    folder: of `effclip export --format onnx`.  provider: one of PROVIDERS; where it is missing, the CPU runs, and a
    warning says so.  threads: of ONNX Runtime; None: its own choice.  keep: one of the folder's keep rates; None: the
    one that the model was exported at.
    ValueError: it is no such folder, or the provider or keep rate is unknown.
    """

    def __init__(
        self, folder: str | Path, provider: str = "cpu", threads: int | None = None, keep: float | None = None
    ) -> None:
        self.folder, self.threads = Path(folder), threads
        if provider not in PROVIDERS:
            raise ValueError(f"provider {provider!r} is none of {', '.join(PROVIDERS)}")
        self.about = description(self.folder)
        """export.json, for the chosen keep rate."""
        if keep is not None:
            self.about |= _at_rate(self.about, keep)
        self.names: list[str] = self.about["class_names"]
        self.templates: list[str] = self.about["templates"]
        parts = self.about.get("members", [self.about])
        self.members = [Member(self.folder, about, len(self.names), self._session) for about in parts]
        """The models, one alone unless it is a cascade."""
        self.threshold: float | None = (self.about["gate"] or {}).get("threshold")
        """The threshold of calls that give none; None: every picture goes through all levels."""
        self._providers = self._available(PROVIDERS[provider])
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._session(self.about["stages"][0]["file"])  # the first answers at once whether the folder is whole

    def _available(self, provider: str) -> list[str]:
        cpu, have = PROVIDERS["cpu"], onnxruntime.get_available_providers()
        if provider not in have:
            _fall_back(provider, f"this onnxruntime has {', '.join(have)}")
            return [cpu]
        return [provider] if provider == cpu else [provider, cpu]

    def _session(self, file: str) -> onnxruntime.InferenceSession:
        if file not in self._sessions:
            options = session_options(self.threads)
            options.log_severity_level = 3  # errors; what falls back to the CPU is said below
            try:
                session = onnxruntime.InferenceSession(str(self.folder / file), options, providers=self._providers)
            except Exception as error:  # onnxruntime has a type for each of its reasons
                raise ValueError(f"{self.folder / file} cannot be run ({error}); export it anew") from error
            if session.get_providers()[0] != self._providers[0]:
                _fall_back(self._providers[0], "it could not be started")
                self._providers = session.get_providers()
            self._sessions[file] = session
        return self._sessions[file]

    @property
    def classes(self) -> np.ndarray | None:
        """The class embeddings [C,E] of the last level; None: the folder names no classes."""
        return self.members[-1].classes

    @property
    def embed_dim(self) -> int:
        """E of ``Exits.embeddings``; 0 of a cascade."""
        return self.members[0].about["embed_dim"] if len(self.members) == 1 else 0

    @property
    def levels(self) -> int:
        """How many levels the model has; 1 where every picture takes the whole way."""
        return len(self.about["stages"])

    def name_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        """Classify among other classes from now on. templates: prompts with {}; None: the folder's.

        ValueError: fewer than two names, one twice, a template without {}, no text tower in the folder, or a word
        that is not in a model's vocabulary.
        """
        names, templates = checked_labels(names), list(templates or self.templates)
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(f"templates {templates} must be texts with {{}} for the class name")
        for member, classes in [(member, member.embedded(names, templates)) for member in self.members]:
            member.classes = classes
        self.names, self.templates = names, templates

    def threshold_for(self, gmacs: float) -> float | None:
        """The calibrated threshold for a mean budget of a picture. ValueError: it cannot be met, or is not known."""
        costs, calibration = self.about["gmacs"], self.about["calibration"]
        if costs is None or not gmacs >= costs[0]:
            least = "an unknown number of" if costs is None else f"{costs[0]:.4g}"
            raise ValueError(f"gmacs {gmacs:g}: a picture costs {least} GMACs at least; give that or more")
        if gmacs >= costs[-1]:
            return None if self.levels == 1 else ALL_LEVELS
        if calibration is None:
            raise ValueError(
                f"gmacs {gmacs:g}: this folder was exported without a calibration; run `effclip calibrate` and export "
                "again, or give a threshold"
            )
        point = calibration["point"]
        points = [*calibration["curve"], [point["setting"], point["gmacs"], point["accuracy"]]]
        return max((cost, setting) for setting, cost, _ in points if cost <= gmacs * (1 + 1e-9))[1]

    def pixels(self, source: Source) -> list[np.ndarray]:
        """A picture as each of ``members`` sees it, before normalisation: uint8 [S,S,3]. ValueError: a damaged one."""
        return views_of(open_upright(source), self.members)

    def normalised(self, pictures: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """What ``pixels`` gives of each picture -> float32 [B,3,S,S] for each of ``members``."""
        by_member = zip(*pictures, strict=True)
        return [member.normalised(views) for member, views in zip(self.members, by_member, strict=True)]

    def __call__(self, images: np.ndarray | Sequence[np.ndarray], threshold: float | None = None) -> Exits:
        """Run normalised images [B,3,S,S], of a cascade for each of ``members``.

        Each level computes the pictures that go on, and no others.

        threshold: the margin, largest less second largest probability, at which a picture stops; above 1: all levels.
        None: the folder's. Without classes every picture goes through all levels, and probabilities are [B,0].
        ValueError: a threshold below 0, or NaN.
        """
        threshold = self.threshold if threshold is None else threshold
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold {threshold:g} must be a margin in [0, 1], or {ALL_LEVELS:g} for all levels")
        images = [images] if isinstance(images, np.ndarray) else images
        live, state = np.arange(len(images[0])), []
        for step in range(self.levels):
            z, *state = self._run(step, state, images, live)
            p, z = self.probabilities(z, step), z[:, : self.embed_dim]
            if step == 0:
                found = Exits(z.copy(), p.copy(), np.zeros(len(live), int))
            # Every live picture is answered now; later levels overwrite the answers of those that go on.
            found.embeddings[live], found.probabilities[live], found.levels[live] = z, p, step
            if step == self.levels - 1:
                break
            stops = np.zeros(len(live), bool)
            if threshold is not None and self.classes is not None:
                stops = margins(p) >= threshold
            rows = np.flatnonzero(~stops)
            if not len(rows):
                break
            live, state = live[rows], [tensor[rows] for tensor in state]
        return found

    def all_levels(self, images: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
        """Normalised images, as of ``__call__`` -> the unit embeddings [B,E] of every level."""
        images = [images] if isinstance(images, np.ndarray) else images
        levels, state, live = [], [], np.arange(len(images[0]))
        for step in range(self.levels):
            z, *state = self._run(step, state, images, live)
            levels.append(z)
        return levels

    def probabilities(self, z: np.ndarray, level: int = 0) -> np.ndarray:
        """Unit embeddings [B,E] of a level -> class probabilities [B,C]; see ``Member.probabilities``."""
        return self.members[self._member(level)].probabilities(z)

    def _member(self, level: int) -> int:
        return self.about["stages"][level].get("member", 0)

    def _run(
        self, level: int, state: Sequence[np.ndarray], images: Sequence[np.ndarray], live: np.ndarray
    ) -> list[np.ndarray]:
        """The outputs of a level for the rows ``live`` of the images, whose state the level before it kept."""
        stage, member = self.about["stages"][level], self._member(level)
        if level == 0 or member != self._member(level - 1):  # a model begins with its pictures
            state = [images[member] if len(live) == len(images[member]) else images[member][live]]
        return self._session(stage["file"]).run(None, dict(zip(stage["inputs"], state, strict=True)))

    def classify(
        self,
        sources: Iterable[Source],
        threshold: float | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        read: Callable[[Source], list[np.ndarray]] | None = None,
    ) -> Iterator[tuple[Answer, np.ndarray]]:
        """An answer and an embedding [E] for each picture, in order; a damaged picture has an error, and NaN.

        threshold: see ``__call__``.  workers: threads that read pictures, two batches ahead; None: one a core, at
        most 8.  read: in place of ``pixels``.
        ValueError, at once: batch_size or workers is below 1.
        """
        if isinstance(sources, str | Path):
            raise ValueError(f"{sources} is one name; give a list of pictures")
        workers = min(8, os.cpu_count() or 1) if workers is None else workers
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        one = partial(_pixels_or_error, read=read or self.pixels)
        pictures = read_in_order(one, sources, workers, 2 * batch_size)
        batches = iter(lambda: list(islice(pictures, batch_size)), [])
        return (answer for batch in batches for answer in self._answers(batch, threshold))

    def _answers(
        self, batch: Sequence[tuple[str, list[np.ndarray] | str]], threshold: float | None
    ) -> Iterator[tuple[Answer, np.ndarray]]:
        sound = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        found, row = self(self.normalised(sound), threshold) if sound else None, 0
        for name, pixels in batch:
            if isinstance(pixels, str):
                yield Answer(name, error=pixels), np.full(self.embed_dim, np.nan, np.float32)
            else:
                yield self._answer(name, found, row), found.embeddings[row]
                row += 1

    def _answer(self, name: str, found: Exits, row: int) -> Answer:
        level, costs = int(found.levels[row]), self.about["gmacs"]
        scores = found.probabilities[row]
        best = int(scores.argmax()) if len(scores) else None
        return Answer(
            name,
            None if best is None else self.names[best],
            None if best is None else float(scores[best]),
            level if self.levels > 1 else None,
            None if costs is None else costs[level],
        )


def margins(probabilities: np.ndarray) -> np.ndarray:
    """probabilities [B,C] -> largest less second largest [B]."""
    second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
    return first - second


def keep_within(folder: str | Path, gmacs: float) -> float | None:
    """The greatest keep rate of an exported folder within a budget of a picture; None: it has one graph alone.

    ValueError: the smallest rate costs more, or it is no such folder.
    """
    rates = [entry for entry in description(Path(folder)).get("keep_rates") or () if entry["gmacs"] is not None]
    within = [entry["keep"] for entry in rates if entry["gmacs"][0] <= gmacs * (1 + 1e-9)]
    if rates and not within:
        least = min(rates, key=lambda entry: entry["gmacs"][0])
        raise ValueError(
            f"gmacs {gmacs:g}: a picture costs {least['gmacs'][0]:.4g} GMACs at least, at keep rate {least['keep']:g}; "
            "give that or more"
        )
    return max(within, default=None)


def _at_rate(about: dict[str, Any], keep: float) -> dict[str, Any]:
    """The entries of export.json that a keep rate changes."""
    by_rate = {entry["keep"]: entry for entry in about.get("keep_rates", ())}
    if keep not in by_rate:
        there = f"the rates {', '.join(map(str, by_rate))}" if by_rate else "no other keep rate"
        raise ValueError(
            f"keep {keep:g}: this folder has {there}; `effclip export MODEL --format onnx --keep {keep:g}` writes it"
        )
    entry = by_rate[keep]
    stage = {**about["stages"][0], "file": entry["file"]}
    return {"stages": [stage], "gmacs": entry["gmacs"], "setting": {"keep": keep}}


def _fall_back(provider: str, reason: str) -> None:
    warnings.warn(f"{provider} does not run here ({reason}): the CPU runs instead", stacklevel=3)


def _pixels_or_error(
    name: str, source: Source, read: Callable[[Source], list[np.ndarray]]
) -> tuple[str, list[np.ndarray] | str]:
    try:
        return name, read(source)
    except ValueError as error:
        return name, str(error)
