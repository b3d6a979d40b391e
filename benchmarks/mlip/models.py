"""The models that MLIP's figures show: the two embedded ones, or model directories that the environment names.

    CLIP=DIR MLIP=DIR DATA=imagenet EFFCLIP_DATA=DIR make reproduce-mlip-fig2

CLIP and MLIP are model directories of `effclip convert` (Figure 6 takes MLIP alone and no DATA), DATA is a set as
`effclip evaluate --data` names it, CAPTIONS is Karpathy's file for retrieval. The result goes to OUT, else to
$EFFCLIP_RUNS/figures.

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.mlip.shapes_runs import BY_NAME, COMMAND, MLIP_ROW
from benchmarks.mlip.shapes_runs import CLIP as CLIP_ROW
from benchmarks.mlip.shapes_runs import GUIDE as GUIDE_RUN
from common.clip import CLIP
from common.conditions import conditions, digest
from common.data.lookup import REVISIONS, Captioned, Labelled, Place, source
from common.models import load_model
from common.paths import runs_directory
from mlip.model import MLIP

DATA = "embedded"
BASELINE, MODEL, GUIDE = BY_NAME[CLIP_ROW].output, BY_NAME[MLIP_ROW].output, GUIDE_RUN.output
"""The committed weights, of seed 0."""
MAKE = {
    GUIDE: f"{COMMAND} --only guide",
    BASELINE: f"{COMMAND} --only clip-0",
    MODEL: f"{COMMAND} --only mlip-0",
}
"""The weights that a benchmark may need with the command that trains each, in the order of training."""
TITLES = {"clip": "CLIP", "mlip": "MLIP"}
COMPARED = "Embedded scale, scenes of shape, two models trained alike from scratch (rows `clip` and `mlip`, seed 0)"
"""How notes describe the two models."""


_BATCH = 250


@dataclass(frozen=True)
class Subject:
    """The models of a figure, by the keys of TITLES, and the set that they are shown on.

    names: what notes call the models; None: they are the committed ones.
    """

    models: dict[str, CLIP]
    data: str = DATA
    names: dict[str, str] | None = None

    def pictures(self, task: str, split: str | None = None) -> Labelled | Captioned:
        """The set for a task; split: that of the embedded benchmark, where it is not the default."""
        place = Place(os.environ.get("EFFCLIP_DATA"), os.environ.get("CAPTIONS"))
        return source(self.data, task, split if self.data in REVISIONS else None, place)

    def batches(self, name: str, pictures: Labelled | Captioned, limit: int | None) -> Iterator[dict[str, Tensor]]:
        """{"image": [B,3,S,S]} as a model reads them, and "label" where there are labels, on its device.

        limit: how many of the first pictures, rounded up to whole batches; None: all.
        """
        model = self.models[name]
        device = next(model.parameters()).device
        loader = pictures.loader(model.preprocess, _BATCH, 1)
        for batch in islice(loader, None if limit is None else -(-limit // _BATCH)):
            yield {key: batch[key].to(device) for key in ("image", "label") if key in batch}


def shown(
    name: str,
    weights: dict[str, Path],
    measure: Callable[[Subject], dict[str, Any]],
    needs_data: bool = True,
    **setting: Any,
) -> dict[str, Any]:
    """The result ``name`` of the models that the environment names, else of the committed weights; see ``needing``.

    weights: the committed files, by the keys of TITLES.
    ValueError: the environment names some of the models alone, no data, or something that is no CLIP.
    """
    paths = {key: os.environ.get(TITLES[key]) for key in weights}
    data = os.environ.get("DATA")
    if not any(paths.values()):

        def committed() -> dict[str, Any]:
            return measure(Subject({key: MLIP.load(path).eval() for key, path in weights.items()}))

        return needing(name, tuple(weights.values()), committed, **setting)
    absent = [TITLES[key] for key, path in paths.items() if not path] + ["DATA"] * (needs_data and not data)
    if absent:
        raise ValueError(f"set {' and '.join(absent)} too, see benchmarks/mlip/models.py; or none, for embedded models")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = {key: load_model(path) for key, path in paths.items()}
    for key, model in loaded.items():
        options = getattr(model.images, "options", {})
        if not isinstance(model.images, CLIP) or (key == "clip" and _has_parts(options)):
            kind = f"a {model.type}" if not isinstance(model.images, CLIP) else "an MLIP with parts of its own"
            raise ValueError(f"{TITLES[key]}={paths[key]} is {kind}; name a model directory of {TITLES[key]}")
    names = {key: model.name for key, model in loaded.items()}
    subject = Subject({key: model.images.to(device) for key, model in loaded.items()}, data or "", names)
    scale = "embedded" if data and data.startswith("embedded") else "paper"
    stated = conditions(
        scale, seeds=1, weights={model.name: model.weights["image"] for model in loaded.values()}, **setting
    )
    about = names | ({"data": data} if needs_data else {})
    ending = re.sub(r"[^a-z0-9]+", "-", "-".join(about.values()).lower()).strip("-")
    result = {"name": f"{name}-{ending}", "conditions": stated, "missing": [], "subject": about}
    return result | measure(subject)


def _has_parts(options: dict[str, Any]) -> bool:
    """Whether an MLIP's options switch on something that a plain CLIP lacks."""
    return bool(options.get("frequency_layers") or options.get("keep_rates"))


def folder() -> Path:
    """Where a figure's result goes."""
    if not any(os.environ.get(title) for title in TITLES.values()):
        return RESULTS
    return Path(os.environ.get("OUT") or runs_directory() / "figures").expanduser()


def compared(result: dict[str, Any]) -> str:
    """How notes describe the two models of a result."""
    subject = result.get("subject")
    return COMPARED if subject is None else f"{subject['clip']} and {subject['mlip']} on {subject['data']}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly from first to last: sets of pictures may be sorted by class."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


def needing(name: str, weights: tuple[Path, ...], measure: Callable[[], dict[str, Any]], **setting: Any) -> dict:
    """The result ``name`` with what ``measure`` returns; without the weights, with the commands that train them.

    setting: conditions beside seed and weights.
    """
    absent = [path for path in weights if not path.is_file()]
    if MODEL in absent and not GUIDE.is_file():
        absent.append(GUIDE)  # MLIP's training reads it
    missing = [command for path, command in MAKE.items() if path in absent]
    known = {path.name: digest(path) for path in weights if path.is_file()}
    result = {"name": name, "conditions": conditions("embedded", seeds=1, weights=known, **setting), "missing": missing}
    return result if missing else result | measure()


def not_run(result: dict[str, Any]) -> dict[str, Any] | None:
    """The rendered form of a result whose weights were missing; None: they were there."""
    if not result["missing"]:
        return None
    commands = ", then ".join(f"`{command}`" for command in result["missing"])
    return {"md": f"Not run: {commands}, then `python -m benchmarks {result['name']}`.\n", "figures": {}}
