"""Checkpoints by the clock, at every stop, and before a cluster takes the machine away."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from common.run_folder import job

LAST = ModelCheckpoint.CHECKPOINT_NAME_LAST + ModelCheckpoint.FILE_EXTENSION
RETRY_SECONDS = 60
_STEPS_BETWEEN_LOOKS = 20
"""Several processes must agree on a save, which costs a message; they look at the clock every so many steps."""


class KeepWork(Checkpoint):
    """Saves ``last.ckpt`` where the recipe's own callbacks would leave work unsaved.

    That is: ``minutes`` after the last checkpoint (sooner when that one failed), at the end of the training, at Ctrl-C
    and SIGTERM, and after an exception of a run of one process. Signals wait for the end of the step, so that no
    checkpoint holds half of one. SIGUSR1 under SLURM saves and requeues the job.
    """

    def __init__(self, minutes: float = 10) -> None:
        if minutes <= 0:
            raise ValueError(f"minutes {minutes} between checkpoints must be positive")
        self.seconds = 60 * minutes
        self._clock, self._saved_step = time.monotonic(), 0
        self._signal: int | None = None
        self._ended_step, self._half_done = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and listen to signals."""
        self._clock, self._saved_step, self._signal = time.monotonic(), trainer.global_step, None
        self._ended_step, self._half_done = trainer.global_step, False
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.world_size == 1:
            signal.signal(signal.SIGINT, self._remember)
        if job() is not None:
            signal.signal(signal.SIGUSR1, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._signal = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whoever saves: the clock starts again."""
        self._clock, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and stop for a signal; never between the batches whose gradients make one step."""
        self._half_done = trainer.accumulate_grad_batches > 1 and trainer.global_step == self._ended_step
        self._ended_step = trainer.global_step
        if self._half_done:
            return
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        requeue = self._signal == signal.SIGUSR1
        if trainer.world_size > 1 and job() is not None:
            requeue = trainer.strategy.reduce_boolean_decision(requeue, all=False)
        if requeue:
            self._save(trainer)
            if trainer.is_global_zero:
                _requeue()
            raise SIGTERMException
        if trainer.world_size == 1 or trainer.global_step % _STEPS_BETWEEN_LOOKS == 0:
            wait = min(self.seconds, RETRY_SECONDS) if self._failing(trainer) else self.seconds
            due = time.monotonic() - self._clock >= wait
            if trainer.strategy.broadcast(due):
                self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was never saved, or what a full disk refused."""
        if self._saved_step != trainer.global_step or trainer.strategy.broadcast(self._failing(trainer)):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run stops; an error of one process of several leaves the others waiting, so not then."""
        stopped = isinstance(exception, SIGTERMException)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        whole = not self._half_done and (stopped or trainer.world_size == 1)
        if whole and self._saved_step != trainer.global_step:
            self._save(trainer)
        if stopped or isinstance(exception, KeyboardInterrupt):
            rank_zero_info(self._stopped(trainer))

    def _stopped(self, trainer: Trainer) -> str:
        """What a user who stopped the run needs to know."""
        saved = 0 if trainer.fast_dev_run else self._saved_step
        if saved and saved == trainer.global_step and not self._failing(trainer):
            return f"stopped after step {saved}; --ckpt_path last goes on from there"
        kept = f"the last checkpoint is of step {saved}" if saved else "nothing was saved"
        return f"stopped after step {trainer.global_step}; {kept}"

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        target = str(folder_of_checkpoints(trainer) / LAST)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last is True:
                callback.last_model_path = target  # its own file too, which it would else leave for last-v1.ckpt
        trainer.save_checkpoint(target, weights_only=False)

    @staticmethod
    def _failing(trainer: Trainer) -> bool:
        return bool(getattr(trainer.strategy.checkpoint_io, "failing", False))


def folder_of_checkpoints(trainer: Trainer) -> Path:
    """Where the recipe's ModelCheckpoint writes, else ``checkpoints`` in the run's folder; all processes must ask."""
    places = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(places[0]) if places else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def _requeue() -> None:
    """Ask SLURM to start this job again; the same command then goes on from the newest checkpoint."""
    number = str(job())
    try:
        code = subprocess.run(["scontrol", "requeue", number]).returncode
    except OSError as error:
        rank_zero_info(f"job {number} could not be requeued: scontrol: {error.strerror}")
        return
    done = "is requeued" if code == 0 else f"could not be requeued (scontrol ended with code {code})"
    rank_zero_info(f"job {number} {done}")
