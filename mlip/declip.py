"""DeCLIP (Li et al., 2022), a baseline of MLIP's tables: InfoNCE of two views with two captions, and three more terms.

Shapes: B pairs, S image size, T text tokens, D width of the text tower, E joint dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.contrastive import info_nce
from common.optim import OptimizerName
from common.self_supervision import SimSiam, views_of
from common.two_pass import in_parts
from mlip.pretraining import WITHOUT_ALIGNMENT, MLIPPretraining


class DeCLIPPretraining(MLIPPretraining):
    """Train a CLIP by DeCLIP's four terms on two views of the picture and two of the caption.

    - clip: the mean InfoNCE of each view with each caption.
    - neighbour: images choose among the nearest neighbours of both captions in a queue of earlier ones.
    - simsiam: each image embedding, before normalisation, predicts the other view's.
    - masking: words taken out of the caption are told from the others. The caption enters the other terms as it is
      after the corruption, as in DeCLIP; the rewritten one is whole.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: what text tower and scale start from: null (random), an open_clip tag, or a local weights file.
        image_layers: how many of the image tower's last layers start from those weights too; see MLIPPretraining.
        preprocess: as MLIPPretraining's.
        frequency_layers, keep_rates, guide, guide_heads: MLIP's tower in the place of CLIP's; by default there is none
            of it.
        clip_weight: weight of InfoNCE; this and the next three are DeCLIP's.
        neighbour_weight: weight of nearest-neighbour supervision. 0 leaves the term out; the others keep theirs, since
            DeCLIP does not say otherwise.
        simsiam_weight: weight of SimSiam; 0 leaves the term out.
        masking_weight: weight of masked language modelling; 0 leaves the term out, and captions are not corrupted.
        neighbour_queue: number of earlier captions on each rank that neighbours are chosen from.
        label_smoothing: share of each contrastive target spread over all candidates, in [0, 1).
        parts: number of parts in which a batch passes through the towers; see ``common.two_pass``.
        learning_rate: peak rate of the optimiser.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        optimizer: adamw or muon, as MLIPPretraining's; the heads are with AdamW.
    """

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        preprocess: str | dict[str, Any] | None = None,
        image_layers: int = 0,
        frequency_layers: int = 0,
        keep_rates: dict[int, float] | None = None,
        guide: str | None = None,
        guide_heads: int | None = None,
        clip_weight: float = 0.4,
        neighbour_weight: float = 0.2,
        simsiam_weight: float = 0.2,
        masking_weight: float = 0.2,
        neighbour_queue: int = 65_536,
        label_smoothing: float = 0.0,
        parts: int = 1,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 2500,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        _check_weights(clip_weight, neighbour_weight, simsiam_weight, masking_weight)
        super().__init__(
            architecture,
            weights,
            preprocess,
            image_layers=image_layers,
            frequency_layers=frequency_layers,
            keep_rates=keep_rates,
            guide=guide,
            guide_heads=guide_heads,
            spatial_weight=clip_weight,
            neighbour_weight=neighbour_weight,
            neighbour_queue=neighbour_queue,
            masking_weight=masking_weight,
            label_smoothing=label_smoothing,
            parts=parts,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            optimizer=optimizer,
            **WITHOUT_ALIGNMENT,
        )
        resolved = self.hparams.preprocess  # as the weights' source tells it
        self.hparams.clear()  # MLIPPretraining's
        self.save_hyperparameters()
        self.hparams.preprocess = resolved
        self.weights = {"clip": clip_weight, "neighbour": neighbour_weight}
        self.weights |= {"simsiam": simsiam_weight, "masking": masking_weight}
        self.simsiam = SimSiam(self.clip.architecture["embed_dim"]) if simsiam_weight else None

    def _embed(self, first: Tensor, second: Tensor, ids: Tensor, rewritten: Tensor, read: Tensor) -> tuple:
        """Embeddings [B,E] of two views [B,3,S,S], of the caption and of the rewritten one; the caption's tokens.

        ids [B,T]: the caption.  read [B,T]: the same after corruption; the last result is its tokens [B,T,D], None
        where captions are not corrupted.
        """
        tower, text = self.clip.image_tower, self.clip.text_tower
        views = tower.encode_image(first, False), tower.encode_image(second, False)
        if self.masked is None:
            return *views, text(ids), text(rewritten), None
        hidden = self.masked.hidden(text, read)
        return *views, self.masked.embedding(text, hidden, ids), text(rewritten), hidden

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The terms of one batch by name, without their weights; terms of weight 0 are left out.

        ValueError: the batch has not one further view of picture and caption.
        """
        (second,) = views_of(batch, 1, "DeCLIP")
        if "text_view" not in batch:
            raise ValueError("DeCLIP reads each caption twice, the batch has it once; set the data's text_view: eda")
        ids, chosen, read = batch["text"], None, batch["text"]
        if self.masked is not None:
            read, chosen = self.masked.corrupt(ids)
        inputs = batch["image"], second, ids, batch["text_view"], read
        *embeddings, hidden = in_parts(self._embed, self.parts, *inputs)
        views, texts = embeddings[:2], [F.normalize(text, dim=-1) for text in embeddings[2:]]
        images, scale = [F.normalize(view, dim=-1) for view in views], self.clip.logit_scale.exp()
        shared = {"same": batch["caption_id"], "label_smoothing": self.label_smoothing}
        terms = {"clip": sum(info_nce(image, text, scale, **shared) for image in images for text in texts) / 4}
        if self.neighbours is not None:
            terms["neighbour"] = self._neighbour_term(images, texts, scale)
        if self.simsiam is not None:
            terms["simsiam"] = self.simsiam(*views)
        if self.masked is not None:
            terms["masking"] = self.masked.loss(hidden, ids, chosen)
        return terms

    def _neighbour_term(self, images: list[Tensor], texts: list[Tensor], scale: Tensor) -> Tensor:
        """The mean over both views and both captions. The search comes first; then the rewritten captions enter."""
        places = [self.neighbours.nearest(text) for text in texts]
        losses = [
            self.neighbours.loss(image, chosen, scale, self.label_smoothing) for image in images for chosen in places
        ]
        if self.training:
            for text in reversed(texts):
                self.neighbours.push(text)
        return sum(losses) / len(losses)


def _check_weights(clip: float, neighbour: float, simsiam: float, masking: float) -> None:
    """ValueError: a negative weight, or none for the term that trains both towers."""
    if clip <= 0:
        raise ValueError(f"clip_weight {clip} must be positive: no other term trains both towers together")
    for name, weight in {"neighbour": neighbour, "simsiam": simsiam, "masking": masking}.items():
        if weight < 0:
            raise ValueError(f"{name}_weight {weight} is negative; 0 leaves the term out")
