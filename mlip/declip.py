"""DeCLIP (Li et al., 2022), a baseline of MLIP's tables: InfoNCE of two views with two captions, and three more terms.

Shapes: B pairs, S image size, T text tokens, D width of the text tower, E joint dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from common.contrastive import info_nce_of_views
from common.self_supervision import SimSiam, views_of
from common.two_pass import in_parts
from mlip.baseline import BaselinePretraining


class DeCLIPPretraining(BaselinePretraining):
    """Train a CLIP by DeCLIP's four terms on two views of the picture and two of the caption.

    - clip: the mean InfoNCE of each view with each caption.
    - neighbour: images choose among the nearest neighbours of both captions in a queue of earlier ones.
    - simsiam: each image embedding, before normalisation, predicts the other view's.
    - masking: words taken out of the caption are told from the others. The caption enters the other terms as it is
      after the corruption, as in DeCLIP; the rewritten one is whole.

    Args:
        clip_weight: weight of InfoNCE; this and the next three are DeCLIP's.
        neighbour_weight: weight of nearest-neighbour supervision. 0 leaves the term out; the others keep theirs, since
            DeCLIP does not say otherwise.
        simsiam_weight: weight of SimSiam; 0 leaves the term out.
        masking_weight: weight of masked language modelling; 0 leaves the term out, and captions are not corrupted.
        neighbour_queue: number of earlier captions on each rank that neighbours are chosen from.
        settings: see ``BaselinePretraining``.
    """

    def __init__(
        self,
        *,
        clip_weight: float = 0.4,
        neighbour_weight: float = 0.2,
        simsiam_weight: float = 0.2,
        masking_weight: float = 0.2,
        neighbour_queue: int = 65_536,
        **settings: Any,
    ) -> None:
        _check_weights(clip_weight, neighbour_weight, simsiam_weight, masking_weight)
        terms = {"spatial_weight": clip_weight, "masking_weight": masking_weight}
        terms |= {"neighbour_weight": neighbour_weight, "neighbour_queue": neighbour_queue}
        super().__init__(terms, **settings)
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
        terms = {"clip": info_nce_of_views(images, texts, scale, **shared)}
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
