"""The output file of `lightning predict`: keys and embeddings, which numpy reads.

Shapes: M images, E joint dim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class PredictionFile(Callback):
    """Writes the results of ``predict_step`` to ``predictions.npz`` in the run's folder, without pickle.

    The file holds "key", M strings, and the other entries of the module's dicts, such as "embedding", float32 [M,E].
    With several processes, each writes its own images to ``predictions-RANK.npz``.
    """

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Concatenate the batches and write them."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call: every process makes it
        batches = trainer.predict_loop.predictions
        if not batches:
            return  # --return_predictions false, or a process without images
        if not all(isinstance(batch, dict) and "key" in batch for batch in batches):
            rank_zero_warn(
                f"{type(pl_module).__name__}.predict_step gives no dicts with a 'key', so no file of predictions is "
                "written; they are what Trainer.predict returns"
            )
            return
        columns = {
            name: torch.cat([batch[name] for batch in batches]).float().cpu().numpy()
            for name in batches[0].keys() - {"key"}
        }
        columns["key"] = np.array([key for batch in batches for key in batch["key"]])
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = folder / f"predictions{rank}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, **columns)
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in sorted(columns.items()))
        print(f"{file}: {shapes}")
