"""The rows of Patch Ranking's tables, and the results of its runs that each row is made of.

Shapes: S seeds, M images in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.equal_cost import between
from benchmarks.patchrank.evaluate import FEWER, MORE, RIVALS
from benchmarks.patchrank.methods import DENSE, OURS
from benchmarks.patchrank.runs import KINDS
from benchmarks.patchrank.tasks import KEEP, SEEDS, Task, restored
from benchmarks.patchrank.trained_rivals import DROPPING_UNTRAINED, MERGING_UNTRAINED, REDUCED, TRAINED_RIVALS

Known = Mapping[str, Mapping[str, Any]]
"""Results by name, see ``benchmarks.patchrank.runs.results``."""


@dataclass(frozen=True)
class Source:
    """The result files of a row, and their entries that count. Both names may contain {task}, a file's also {seed}."""

    file: str
    entries: tuple[str, ...]

    def files(self, task: Task) -> list[str]:
        """Names of the results: one for each seed, or one for all seeds."""
        return list(dict.fromkeys(self.file.format(task=task.key, seed=seed) for seed in SEEDS))

    def seeds_of(self, task: Task, known: Known) -> list[int]:
        """The seeds whose results there are for a task; none where all seeds have one result."""
        files = {seed: self.file.format(task=task.key, seed=seed) for seed in SEEDS}
        return [seed for seed, file in files.items() if file in known] if "{seed}" in self.file else []

    def entries_of(self, task: Task, known: Known) -> list[Mapping[str, Any]]:
        """The entries that there are for a task, seed by seed."""
        names = [name.format(task=task.key) for name in self.entries]
        tests = [known[file]["test"] for file in self.files(task) if file in known]
        return [test[name] for test in tests for name in names if name in test]


def pruned(keep: float) -> Source:
    """Patch Ranking with the task's own predictor, without tuning."""
    return Source("{task}-predictor-seed{seed}", (str(keep),))


def attended(keep: float) -> Source:
    """Class attention."""
    return Source("{task}-baselines", (f"class attention {keep}",))


def tuned(kind: str, keep: float, at: float | None = None) -> Source:
    """A model with prompts tuned at keep 1.0 or .6. at: the keep rate of the evaluation; None: that of the tuning."""
    return Source(f"{{task}}-{kind}-{keep}-seed{{seed}}", (str(at or keep),))


def name_of_tuned(kind: str, keep: float) -> str:
    """The row of a tuned model."""
    return f"{DENSE if keep == 1 else OURS} + {KINDS[kind]} prompts"


TRAINING_FREE = {
    "class attention": attended(KEEP),
    "random": Source("{task}-baselines", tuple(f"random {draw}" for draw in SEEDS)),
    **{name: Source("{task}-baselines", (name,)) for name in RIVALS[1:]},
}
BASELINES = {
    **TRAINING_FREE,
    "A-ViT": Source("{task}-avit-seed{seed}", ("halting",)),
    **{name: Source(f"{{task}}-{rival.recipe}-seed{{seed}}", (REDUCED,)) for name, rival in TRAINED_RIVALS.items()},
    MERGING_UNTRAINED: Source("{task}-merging_blocks", (REDUCED,)),
    DROPPING_UNTRAINED: Source("{task}-attention_blocks", (REDUCED,)),
}
ROWS = {
    DENSE: Source("{task}-baselines", (DENSE,)),
    **BASELINES,
    OURS: pruned(KEEP),
    **{name_of_tuned(kind, keep): tuned(kind, keep) for keep in (1.0, KEEP) for kind in KINDS},
}
"""The rows of Table 1."""


def correct(entries: Sequence[Mapping[str, Any]]) -> Tensor:
    """The right answers of entries, bool [S,M]."""
    return torch.stack([restored(entry) for entry in entries])


def planned(row: str) -> int:
    """The number of runs of a row or curve: one for each training seed, one in all where nothing is trained."""
    return len(SEEDS) if row not in ROWS or "{seed}" in ROWS[row].file else 1


def at_equal_cost(name: str, task: Task, known: Known, budget: float) -> Tensor | None:
    """A rival's answers where it costs ``budget`` GMACs, [1,M] in [0,1]; None: not run.

    They lie between those of its two neighbours in cost, as an accuracy interpolated linearly does.
    """
    sides = [Source("{task}-baselines", (f"{name}, {side}",)).entries_of(task, known) for side in (FEWER, MORE)]
    if not all(sides):
        return None
    (fewer,), (more,) = sides
    return between(budget, *((side["gmacs"], correct([side])) for side in (fewer, more)))
