"""The loader over shards: worker processes, a length, and going on where a trainer stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from common.data.account import Account
from common.data.reader import ShardDataset

if TYPE_CHECKING:
    from lightning import Trainer


def position(trainer: Trainer) -> tuple[int, int]:
    """The place of a run: (epoch, finished batches of it).

    A batch is finished after its optimiser step. Prefetched batches and an interrupted one do not count. Where the
    trainer overfits some batches, all of its epochs are the first one.
    """
    done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    epoch, finished = divmod(done, trainer.num_training_batches)
    return (0 if trainer.overfit_batches else epoch), finished


def begun(loader: DataLoader, again: bool) -> Iterator[dict[str, Any]]:
    """An iterator of a loader, which draws a seed from torch's generator that no loader here uses.

    again: it is not the first of a run. The draw is undone then, since a resumed run, whose generators are restored
    after its first iteration began, would else go on with other numbers than one that was never stopped.
    """
    state = torch.get_rng_state()
    batches = iter(loader)
    if again:
        torch.set_rng_state(state)
    return batches


class ShardLoader:
    """Iterates over a ShardDataset in worker processes, has a length, and continues where a trainer stopped.

    progress: returns (epoch, finished batches of it) when an iteration begins; by default each iteration is an epoch.
    length: batches of one iteration over all workers; None (remote shards of unknown size): ``len`` fails.

    It wraps a DataLoader instead of being one, because Lightning may take a DataLoader apart and rebuild it.
    Its dataset is called ``source`` because Lightning doubts the length of what has an iterable ``dataset``.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        num_workers: int,
        length: int | None,
        progress: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.source, self.length = dataset, length
        self._progress = progress
        self._iterations = 0
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0 and dataset.batches is not None,
        )

    @property
    def account(self) -> Account:
        """What became of the samples read so far, on this process."""
        return self.source.account()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of samples in these shards is unknown")
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator, so that this runs at the first batch: a resumed trainer asks for an iterator too early,
        # before its counters stand where the run goes on.
        self.source.set_position(*(self._progress() if self._progress else (self._iterations, 0)))
        batches = begun(self._loader, again=self._iterations > 0)
        self._iterations += 1
        yield from batches

    def stop(self) -> None:
        """End the worker processes, which would else wait for a next iteration."""
        workers, self._loader._iterator = self._loader._iterator, None
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()

    def state_dict(self) -> dict[str, int]:
        """The settings that determine the order of the samples; the trainer itself counts the batches.

        Lightning saves them in the checkpoint and passes them to ``load_state_dict``.
        """
        source = self.source
        state = {"shards": len(source.shards), "batch_size": source.batch_size, "seed": source.seed}
        return {**state, "processes": source.world, "workers": self._loader.num_workers}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warn where a resumed run continues in another order."""
        now = self.state_dict()
        changed = [
            f"{name} was {state[name]}, is {now[name]}" for name in now if state.get(name, now[name]) != now[name]
        ]
        if changed:
            from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # loaded already: a trainer resumes

            rank_zero_warn(
                f"{'; '.join(changed)}: this epoch continues in another order, so some of its samples come twice "
                "and others not at all; from the next epoch on every sample comes once"
            )
