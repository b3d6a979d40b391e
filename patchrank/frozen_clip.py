"""What trainings of a small part beside a frozen CLIP share: what their checkpoints hold, the data's class prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from common import optim
from common.clip import CLIP
from common.preprocess import prepare_data
from common.zeroshot import training_prompts


class FrozenCLIPTraining(LightningModule):
    """A training whose checkpoints hold the trained parameters alone; the arguments name the frozen CLIP again.

    A subclass sets ``final`` where the cosine does not end at 0.

    Args:
        architecture: an open_clip model name (ViT-B-16-quickgelu) or a .json architecture file.
        weights: null (random), an open_clip tag, or a local file.
        quick_gelu: the activation of a local weights file that does not record it.
        preprocess: how pictures were prepared for a local weights file of which it is not known: clip, a tag of the
            architecture that was trained alike, or open_clip's preprocess_cfg.
        learning_rate: peak rate of the optimiser.
        weight_decay: of matrices.
        warmup_steps: steps of linear warm-up before the cosine.
    """

    final: float = 0.0

    starts_from: ClassVar[dict[str, Any]] = {"weights": None}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16-quickgelu",
        weights: str | None = None,
        quick_gelu: bool | None = None,
        preprocess: str | dict[str, Any] | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__()
        optim.check_settings(learning_rate, weight_decay, warmup_steps)
        self.save_hyperparameters()
        clip = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu, preprocess=preprocess)
        self.clip = clip.requires_grad_(False)
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps

    def setup(self, stage: str) -> None:
        """Show pictures as the frozen CLIP was trained on them."""
        prepare_data(self.trainer, self.clip.preprocess)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out, unless they are random and nothing else would bring them back."""
        if self.hparams.weights is None:
            return
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen weights, so that loading stays strict."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]

    def test_step(self, batch: dict, batch_idx: int) -> None:
        """As validation, on the test split."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> dict:
        """AdamW, per-step warm-up and cosine over the trainer's whole run."""
        groups = optim.parameter_groups(self, self.learning_rate, self.weight_decay)
        return optim.configure(groups, self.warmup_steps, self.trainer.estimated_stepping_batches, final=self.final)


class ReducedTowerTraining(FrozenCLIPTraining):
    """A training of a tower with fewer tokens to reproduce a frozen CLIP's image embeddings.

    Shapes: B images, S image size, E joint dim. A subclass sets ``model``, the tower.
    """

    model: nn.Module

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.validation_cosine = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z [B,E], not normalised."""
        return self.model(images)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Mean cosine distance of the reduced tower from the whole one, in fp32: bf16 would round it to 0.004."""
        z, whole = self(batch["image"]), self.clip.image_tower(batch["image"])
        self.validation_cosine.update(1 - F.cosine_similarity(z.float(), whole.float(), dim=-1))
        self.log("val_cosine", self.validation_cosine, prog_bar=True)

    def predict_step(self, batch: dict, batch_idx: int) -> dict:
        """The keys of a batch and the normalised embeddings [B,E] of its images."""
        return {"key": batch["key"], "embedding": self.model.encode_image(batch["image"])}

    def deployable(self) -> tuple[nn.Module, CLIP]:
        """The reduced tower, and the CLIP whose text tower goes with it."""
        return self.model, self.clip


def class_prompts(trainer: Trainer) -> Sequence[str]:
    """The prompts of the classes that training batches are labelled with. ValueError: there are none."""
    prompts = training_prompts(trainer.datamodule)
    if prompts is None:
        raise ValueError("this training compares pictures with classes; give data that has them, such as few shots")
    return prompts
