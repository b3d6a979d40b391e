"""The models of the frontier: every method alone, controls, and early exit with token reduction in the fine level.

Shapes: B images, S picture size, E joint dim.

A composition needs no training. WaveCLIP's coarse level answers the images of which it is confident. For the others a
reducer thins the tokens of the fine level, while the cached coarse tokens stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mlip import shapes_runs
from benchmarks.patchrank.runs import COMMAND
from benchmarks.patchrank.tasks import COMMITTED, PRUNE_LAYER
from benchmarks.training import shapes
from benchmarks.waveclip.controls import CASCADE, HALF, LATER_WAVE, TRAINED_ON, WAVE
from common.clip import CLIP
from common.evaluate.points import greatest_keep, mean_macs
from common.reducer_registry import Entry, Setting, installed_reducers, named, setting_for
from common.reduction import ReducedTower
from common.tower import ImageTower
from mlip.model import MLIP
from patchrank.predictor import load_predictor
from patchrank.tower import PatchRankTower
from waveclip import WaveTower
from waveclip.reduced import ReducedWaveTower

LAYER = 1
"""The first of 4 blocks that sees fewer tokens; for EViT and merging the last whose attention sees all of them."""
FEW = ("random", "class-attention", "evit", "tome", "mlip-merging")
"""The reducers that are measured where time is short, on photographs of a user's."""
RANDOM = "random"
"""The reducer that every composition must beat, so that it is composed whether it is good or not."""
BUDGETS = (0.4, 0.6, 0.8, 0.9, 1.0)
"""Shares of the dense teacher's multiply-adds."""
FINE_KEEPS = (0.25, 0.5, 0.75)
"""Shares of the fine level's 27 patch tokens that stay."""
DENSE = "dense teacher"
RANKED = "teacher + rank predictor"
TRAINED = {
    RANKED: (COMMITTED / "shapes.safetensors", COMMAND),
    "CLIP trained as MLIP": (shapes_runs.BY_NAME["clip"].output, f"{shapes_runs.COMMAND} --only clip-0"),
    "MLIP": (shapes_runs.BY_NAME["mlip"].output, f"{shapes_runs.COMMAND} --only mlip-0"),
}
"""The methods with weights of their own: the file, and the command that trains it."""


SEEDED = {
    DENSE: "shapes-teacher",
    WAVE: "shapes-waveclip",
    TRAINED_ON: "shapes-longer",
    HALF: "shapes-half",
    LATER_WAVE: "shapes-waveclip-longer",
}
"""The methods that are trained once a seed: the family of their runs in ``benchmarks.training.shapes``."""


Students = Mapping[int, tuple[WaveTower, CLIP]]
"""WaveCLIPs of one level by training seed, each with the CLIP from which it started."""


@dataclass(frozen=True)
class Family:
    """One method, or two together, over its settings and its training seeds.

    models: by keep rate (None: no setting), a model for each of ``seeds``. Each has ``encode_image``; one with early
        exit is a WaveTower or a ReducedWaveTower.
    clips: for each of ``seeds`` the CLIP whose text tower and logit scale go with its models.
    reducer: the name of the reducer that needs no training and thins the tokens of its models; empty: there is none.
    left: by seed, the answers that trainings left whose weights are not here. They count in the accuracy; ``seeds`` are
        those of the models.
    cascade: two families without settings, the second of which answers where the first is unsure. It has no models of
        its own.
    """

    name: str
    models: Mapping[float | None, Sequence[nn.Module]]
    clips: Sequence[CLIP]
    seeds: Sequence[int] = (0,)
    composed: bool = False
    reducer: str = ""
    left: Mapping[int, Path] = field(default_factory=dict)
    cascade: tuple[Family, Family] | None = None

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the models, then those of which only the answers are here."""
        return *self.seeds, *self.left


class HalfResolution(nn.Module):
    """A CLIP of half the resolution, which halves the pictures itself; that is part of its work.

    interpolation: "area", the means of 2 x 2 pixels, or "bicubic", as it was trained.
    """

    def __init__(self, clip: CLIP, interpolation: str = "area") -> None:
        super().__init__()
        self.tower, self.interpolation = ReducedTower(clip.image_tower, {}), interpolation

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E]."""
        smooth = self.interpolation != "area"  # which weighs every pixel anyway
        return self.tower.encode_image(
            F.interpolate(images, scale_factor=0.5, mode=self.interpolation, antialias=smooth)
        )


def training_free() -> list[str]:
    """The names of all reducers that a tower can have untrained, and for the texts of any classes."""
    return [name for name, entry in installed_reducers().items() if not {"training", "texts"} & {*entry.needs}]


def families(
    teachers: Mapping[int, CLIP],
    students: Students,
    reducers: Sequence[str],
    budgets: Sequence[float] = BUDGETS,
    controls: Sequence[Family] | None = None,
) -> list[Family]:
    """Every method alone whose weights exist, the dense teacher first.

    teachers: by training seed, 0 first.  reducers: names.  budgets: shares of the teacher's multiply-adds; a reducer,
        and the rank predictor, stands at its greatest keep rate within each of them below 1, since within 1 that is the
        teacher itself.
    controls: those of these teachers; None: those of the embedded one, and the methods that were trained for it.
    """
    clips, seeds = list(teachers.values()), tuple(teachers)
    towers = [clip.image_tower for clip in clips]
    dense = [ReducedTower(tower, {}) for tower in towers]
    limits = [share * _gmacs(dense[0]) for share in budgets if share < 1]
    methods = [Family(DENSE, {None: dense}, clips, seeds)]
    for entry in map(named, reducers):
        builders = [partial(_reduced, tower, entry) for tower in towers]
        # What costs more than every budget, such as ZOO-Prune's released form, is on no frontier.
        if models := fitted_to(builders, limits, entry.rate):
            methods.append(Family(f"teacher + {entry.title}", models, clips, seeds, reducer=entry.name))
    embedded = controls is None
    methods += [*trained(clips[0], limits), *embedded_controls()] if embedded else controls
    runs = dict(shapes.FAMILIES)[SEEDED[WAVE]] if embedded else ()
    left = {run.seed: path for run in runs if run.seed not in students and (path := shapes.file(run.name)).is_file()}
    waves, started = zip(*students.values(), strict=True)
    return [*methods, Family(WAVE, {None: waves}, started, tuple(students), left=left)]


def _reduced(tower: ImageTower, entry: Entry, keep: float) -> ReducedTower:
    """A tower with a reducer from block LAYER on."""
    return ReducedTower(tower, entry.reducers(setting_for(tower, keep, LAYER)))


def _gmacs(model: ReducedTower | PatchRankTower) -> float:
    return mean_macs(model, model.tower.image_size).gmacs


def fitted_to(
    builders: Sequence[Callable[[float], nn.Module]],
    limits: Sequence[float],
    rate: Callable[[float], float] = float,
) -> dict[float, list[nn.Module]]:
    """A reducer's models at its greatest keep rate, to 1 %, within each budget of GMACs that it can meet.

    builders: keep rate -> model, one of each training seed; all cost the same.
    rate: the keep rate at which it works where one is asked for, see ``Entry.rate``.
    """
    models = {}
    cost = cache(lambda keep: _gmacs(builders[0](rate(keep))))  # the searches for all budgets meet the same rates
    for limit in limits:
        # Some cost more than the least budget however few tokens stay.
        with suppress(ValueError):
            keep = rate(greatest_keep(cost, limit))
            models[keep] = [build(keep) for build in builders]
    return models


def compose(reducers: Sequence[str], students: Students, smoke: bool = False) -> list[Family]:
    """WaveCLIPs whose fine level has fewer tokens, for each of ``reducers`` that works in a level.

    smoke: one keep rate.
    """
    methods, keeps = [], FINE_KEEPS[1:2] if smoke else FINE_KEEPS
    waves, started = zip(*students.values(), strict=True)
    for entry in (entry for entry in map(named, reducers) if "levels" not in entry.exceptions):
        rates = dict.fromkeys(map(entry.rate, keeps))
        models = {keep: [_fine(wave, entry, keep) for wave in waves] for keep in rates}
        name, seeds = f"{WAVE} + {entry.title}", tuple(students)
        methods.append(Family(name, models, started, seeds, composed=True, reducer=entry.name))
    return methods


def _fine(wave: WaveTower, entry: Entry, keep: float) -> ReducedWaveTower:
    """A WaveCLIP whose last level has a reducer."""
    level, blocks = wave.steps - 1, len(wave.transformer.resblocks)
    setting = Setting(keep, LAYER, wave.tokens_in(level) - 1, blocks, tower=wave)
    return ReducedWaveTower(wave, {level: entry.reducers(setting)})


def trained(teacher: CLIP, limits: Sequence[float]) -> list[Family]:
    """The methods of TRAINED whose weights exist; the rank predictor prunes the teacher to each budget of GMACs."""
    methods = []
    for name, (path, _) in TRAINED.items():
        if not path.is_file():
            continue
        if name == RANKED:
            predictor = load_predictor(path, teacher.image_tower, PRUNE_LAYER).eval()
            build = partial(PatchRankTower, teacher.image_tower, predictor, prune_layer=PRUNE_LAYER)
            methods.append(Family(name, fitted_to([lambda keep, build=build: build(keep=keep)], limits), [teacher]))
        else:
            clip = MLIP.load(path).eval()
            methods.append(Family(name, {None: [clip.image_tower]}, [clip]))
    return methods


def weights_of(method: str) -> dict[int, Path]:
    """The weights of a method of SEEDED by training seed, as far as they are trained."""
    runs = dict(shapes.FAMILIES)[SEEDED[method]]
    return {run.seed: run.weights for run in runs if run.weights.is_file()}


def embedded_controls() -> list[Family]:
    """What benchmarks/protocol.md sets beside WaveCLIP and has weights."""
    clips = ({seed: CLIP.load(path).eval() for seed, path in weights_of(name).items()} for name in (TRAINED_ON, HALF))
    methods = controls_of(*clips)
    students, teacher = weights_of(LATER_WAVE), weights_of(TRAINED_ON).get(0)
    if students and teacher:
        waves = [WaveTower.load(path).eval() for path in students.values()]
        clips = [CLIP.load(teacher).eval()] * len(waves)
        methods.append(Family(LATER_WAVE, {None: waves}, clips, tuple(students)))
    return methods


def controls_of(trained_on: Mapping[int, CLIP], half: Mapping[int, CLIP], interpolation: str = "area") -> list[Family]:
    """The CLIPs beside a WaveCLIP by training seed, and the cascade of both of the seeds that both have.

    interpolation: see ``HalfResolution``.
    """
    towers = (
        [ReducedTower(clip.image_tower, {}) for clip in trained_on.values()],
        [HalfResolution(clip, interpolation) for clip in half.values()],
    )
    second, first = (
        Family(name, {None: models}, list(clips.values()), tuple(clips))
        for name, models, clips in zip((TRAINED_ON, HALF), towers, (trained_on, half), strict=True)
    )
    both = tuple(seed for seed in half if seed in trained_on)
    cascade = [Family(CASCADE, {None: ()}, (), both, cascade=(first, second))] if both else []
    return [method for method in (second, first) if method.seeds] + cascade


def missing() -> dict[str, str]:
    """What lacks weights, a method or some of its training seeds, with the command that trains it."""
    result = {name: command for name, (path, command) in TRAINED.items() if not path.is_file()}
    planned, finished = len(shapes.SEEDS), {name: weights_of(name).keys() for name in SEEDED}
    commands = {name: f"make retrain ONLY='{family}-*'" for name, family in SEEDED.items()}
    for name, seeds in finished.items():
        if len(seeds) < planned:
            what = f"compositions with {WAVE}" if name == WAVE else name  # WaveCLIP's own answers are stored
            lacking = f"{what}, {planned - len(seeds)} of {planned} training seeds" if seeds else name
            result[lacking] = commands[name]
    if not finished[HALF] & finished[TRAINED_ON]:
        parts = [name for name in (HALF, TRAINED_ON) if not finished[name]] or [HALF, TRAINED_ON]
        result[CASCADE] = " && ".join(commands[name] for name in parts)
    return result
