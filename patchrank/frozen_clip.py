"""Trainings of a small part beside a frozen CLIP: what their checkpoints hold."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


class TrainedPart(LightningModule):
    """Checkpoints hold the parameters that train; the frozen CLIP comes back by the arguments that named it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out, unless they are random and nothing else would bring them back."""
        if self.hparams.weights is None:
            return
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen weights in, so that loading stays strict."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
