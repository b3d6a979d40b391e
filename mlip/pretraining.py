"""MLIP's pretraining: instance and token alignment in two domains (section 3, equation 2), and its ablations.

Shapes: B pairs, S image size, N and K frequency and spatial tokens, T text tokens, E joint dim.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from common.clip import CLIP, load_architecture
from common.contrastive import info_nce
from common.optim import OptimizerName
from common.preprocess import choose_preprocess
from common.pretrained import find_pretrained
from common.pretraining import ContrastivePretraining
from common.two_pass import in_parts
from mlip.alignment import caption_mask, late_interaction, one_to_many, one_to_one
from mlip.fourier import Spectrum
from mlip.guide import Guide
from mlip.masked_language import MaskedLanguage
from mlip.model import MLIP
from mlip.neighbours import Form, NearestCaptions
from mlip.tower import MLIPFeatures

Matching = Literal["one_to_many", "one_to_one", "filip"]
"""How the tokens of an image and a caption are aligned; filip compares all pairs of the batch."""


READ_BY = {
    "guide": ("guide_heads", "train_guide", "guide_tokens"),
    "frequency_layers": ("spectrum", "pieces"),
    "keep_rates": ("proportional_attention",),
    "frequency_token_weight": ("frequency_matching",),
    "spatial_token_weight": ("spatial_matching",),
    "neighbour_weight": ("neighbour_queue", "neighbour_form"),
    "label_smoothing": ("smoothing_grows",),
}
"""Settings that are read only where another one is set."""


class MLIPPretraining(ContrastivePretraining):
    """Train an MLIP by equation 2: InfoNCE and token alignment of the caption with frequency and spatial features.

    A term of weight 0 is not computed. With frequency_layers 0, no keep_rates and spatial_weight 1 alone this is
    plain CLIP pretraining. All contrastive terms share one temperature (the paper does not say), which starts at
    0.07; the scale stays within [1, 100]. Equations 1 and 12 are printed without InfoNCE's minus sign, and the
    numerator of 12 has z_k for z_j; both are read as in CLIP.

    Args:
        architecture: an open_clip model name (ViT-B-16) or a .json file in open_clip's model-config format.
        weights: what text tower and scale start from: null (random), an open_clip tag, or a local weights file of a
            CLIP of this architecture.
        preprocess: how pictures were prepared for a local weights file of which it is not known: clip, a tag of the
            architecture that was trained alike, or open_clip's preprocess_cfg.
        quick_gelu: whether both towers have QuickGELU; needed for a local weights file that does not record its
            activation. null: as the architecture.
        image_layers: how many of the image tower's last layers start from those weights too, with its embedding and
            read-out; 0: the whole image tower starts at random.
        frequency_layers: number of Fourier blocks, the tower's first ones.
        keep_rates: acceleration blocks, as a map of layer (from 1) to the share of patch tokens kept; null for none.
        guide: what the acceleration blocks attend to: null (nothing), random (an untrained DeiT-Tiny, for trials; not
            made without keep_rates), or a local weights file of a masked autoencoder, with ${VARIABLES}.
        guide_heads: attention heads of a Guide whose file does not record them: 12 for the paper's light MAE encoder.
        train_guide: whether the Guide learns too; the paper does not say.
        guide_tokens: all of the Guide's tokens, or its class token alone.
        spectrum: what the Fourier blocks filter, the power spectrum |Y|² or Y itself (linear).
        pieces: pieces of each filter, an even number.
        proportional_attention: whether merged tokens count for all their patches in attention.
        frequency_weight: weight of InfoNCE between frequency and text embeddings.
        spatial_weight: the same for the spatial embedding, which is the model's output after training.
        frequency_token_weight: weight of the alignment of frequency and text tokens.
        spatial_token_weight: the same for the spatial tokens.
        frequency_matching: how frequency tokens are aligned.
        spatial_matching: how spatial tokens are aligned.
        neighbour_weight: weight of InfoNCE between spatial embeddings and the nearest neighbours of their captions
            (DeCLIP, where it is half of InfoNCE's own weight).
        neighbour_queue: number of earlier captions that neighbours are chosen from.
        neighbour_form: declip, images choose among neighbours from a queue of each rank; or symmetric, both directions
            and one queue of all ranks. See ``NearestCaptions``.
        masking_weight: weight of masked language modelling on a corrupted copy of the captions (LightCLIP, which feeds
            the picture to it too; here the text tower alone).
        label_smoothing: share of each contrastive target spread over all candidates, in [0, 1).
        smoothing_grows: whether that share grows from 0 to its value over the training (LightCLIP, which publishes no
            schedule; linear here).
        parts: number of parts in which a batch passes through the towers, for batches larger than memory; see
            ``common.two_pass``. Embeddings and tokens of all pairs stay in memory.
        learning_rate: peak rate of the optimiser; the paper does not state it.
        weight_decay: of matrices; gains, biases and vectors do not decay.
        warmup_steps: steps of linear warm-up before the cosine.
        optimizer: adamw, or muon (``common.muon``) for the matrices of both towers' blocks, those of Fourier blocks and
            of attention to the Guide included, and AdamW for all else. AdamW steps the Lego-Filters: a piece multiplies
            each channel of each frequency by a number of its own, so it is no matrix with rows to make orthonormal. It
            also steps a Guide that learns, as in the Guide's pretraining.
    """

    clip: MLIP

    starts_from: ClassVar[dict[str, Any]] = {"weights": None, "image_layers": 0}
    """Arguments that a whole checkpoint makes unnecessary; see ``common.checkpoints``."""

    def __init__(
        self,
        architecture: str = "ViT-B-16",
        weights: str | None = None,
        preprocess: str | dict[str, Any] | None = None,
        quick_gelu: bool | None = None,
        image_layers: int = 0,
        frequency_layers: int = 4,
        keep_rates: dict[int, float] | None = None,
        guide: str | None = None,
        guide_heads: int | None = None,
        train_guide: bool = False,
        guide_tokens: Literal["all", "class"] = "all",
        spectrum: Spectrum = "power",
        pieces: int = 2,
        proportional_attention: bool = False,
        frequency_weight: float = 0.15,
        spatial_weight: float = 0.65,
        frequency_token_weight: float = 0.1,
        spatial_token_weight: float = 0.1,
        frequency_matching: Matching = "one_to_many",
        spatial_matching: Matching = "one_to_one",
        neighbour_weight: float = 0.0,
        neighbour_queue: int = 65_536,
        neighbour_form: Form = "declip",
        masking_weight: float = 0.0,
        label_smoothing: float = 0.0,
        smoothing_grows: bool = False,
        parts: int = 1,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 2000,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        _warn_of_idle(locals())  # not hparams, which hold what the command line names
        super().__init__(learning_rate, weight_decay, warmup_steps, label_smoothing, parts, optimizer)
        self.save_hyperparameters()
        self.weights = {"frequency": frequency_weight, "spatial": spatial_weight}
        self.weights |= {"frequency_token": frequency_token_weight, "spatial_token": spatial_token_weight}
        self.weights |= {"neighbour": neighbour_weight, "masking": masking_weight}
        self.smoothing_grows = smoothing_grows
        self.matching = {"frequency": frequency_matching, "spatial": spatial_matching}
        self._check(frequency_layers, weights, image_layers)
        sizes = _architecture(architecture, weights, preprocess, quick_gelu)
        self.hparams.preprocess = sizes.get("preprocess_cfg")
        self.clip = MLIP(
            sizes,
            frequency_layers=frequency_layers,
            keep_rates=keep_rates,
            guide=_guide(guide, keep_rates, train_guide, guide_heads),
            guide_tokens=guide_tokens,
            spectrum=spectrum,
            pieces=pieces,
            proportional_attention=proportional_attention,
        )
        if weights is not None:
            start = CLIP.from_open_clip(architecture, weights, quick_gelu=quick_gelu, preprocess=preprocess)
            self._start_from(start, image_layers)
        self._set_up_terms(neighbour_queue, neighbour_form)

    def _set_up_terms(self, queue: int, form: Form) -> None:
        """Make what the terms with a weight need beside the CLIP, and freeze what none of them reads."""
        weights, sizes = self.weights, self.clip.architecture
        self.neighbours = self.masked = None
        if weights["neighbour"]:
            self.neighbours = NearestCaptions(queue, sizes["embed_dim"], form)
        if weights["masking"]:
            text = sizes["text_cfg"]
            self.masked = MaskedLanguage(text["width"], text["vocab_size"], text["context_length"])
        head = self.clip.image_tower.frequency_head
        if head is not None and not (weights["frequency"] or weights["frequency_token"]):
            head.requires_grad_(False)  # DDP would wait for its gradient

    def _start_from(self, start: CLIP, image_layers: int) -> None:
        self.clip.text_tower, self.clip.logit_scale = start.text_tower, start.logit_scale
        if image_layers:
            self.clip.image_tower.start_from(start.image_tower, image_layers)

    def _check(self, frequency_layers: int, weights: str | None, image_layers: int) -> None:
        if image_layers and weights is None:
            raise ValueError(f"image_layers {image_layers} without weights that the layers could start from; name some")
        for name, value in self.weights.items():
            if value < 0:
                raise ValueError(f"{name}_weight {value} is negative; 0 leaves the term out")
            if value and not frequency_layers and name.startswith("frequency"):
                raise ValueError(f"{name}_weight {value} without Fourier blocks; set it to 0, or frequency_layers")
        for domain, matching in self.matching.items():
            if matching not in get_args(Matching):
                raise ValueError(f"{domain}_matching {matching!r} is none of {', '.join(get_args(Matching))}")
        if not self.weights["spatial"]:
            raise ValueError(
                "spatial_weight 0 would leave the embedding that the model gives untrained; the paper's weight is 0.65"
            )

    def smoothing(self) -> float:
        """The label smoothing of this step."""
        if not self.smoothing_grows or self._trainer is None:
            return self.label_smoothing
        return self.label_smoothing * self.trainer.global_step / self.trainer.estimated_stepping_batches

    def _embed(self, images: Tensor, ids: Tensor, corrupted: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The fields of ``MLIPFeatures`` of images [B,3,S,S]; of ids [B,T] the embedding [B,E], tokens [B,T,E].

        corrupted: ids [B,T] with masked words; the last result is their tokens [B,T,D], None without.
        """
        with_tokens = bool(self.weights["frequency_token"] or self.weights["spatial_token"])
        text = self.clip.text_tower(ids, return_tokens=with_tokens)
        hidden = None if corrupted is None else self.masked.hidden(self.clip.text_tower, corrupted)
        return *self.clip.image_tower(images), *(text if with_tokens else (text, None)), hidden

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """The terms of one batch by name, each a scalar without its weight; terms of weight 0 are left out.

        Instance terms are equation 12, token terms equation 15 (one_to_many) or 17 (one_to_one).
        """
        weights, clip = self.weights, self.clip
        ids, smoothing = batch["text"], self.smoothing()
        corrupted, chosen = (None, None) if self.masked is None else self.masked.corrupt(ids)
        inputs = [batch["image"], ids] + ([] if corrupted is None else [corrupted])
        *features, text, tokens, hidden = in_parts(self._embed, self.parts, *inputs)
        features, text = MLIPFeatures(*features), F.normalize(text, dim=-1)
        shared = {"same": batch["caption_id"], "label_smoothing": smoothing}
        terms = {}
        for domain in ("frequency", "spatial"):
            if weights[domain]:
                image = F.normalize(getattr(features, domain), dim=-1)
                terms[domain] = info_nce(image, text, clip.logit_scale.exp(), **shared)
            if weights[f"{domain}_token"]:
                pair = getattr(features, f"{domain}_tokens"), tokens, caption_mask(ids)
                terms[f"{domain}_token"] = self._align(self.matching[domain], *pair, **shared)
        if self.neighbours is not None:
            image = F.normalize(features.spatial, dim=-1)
            terms["neighbour"] = self.neighbours(image, text, clip.logit_scale.exp(), smoothing)
        if self.masked is not None:
            terms["masking"] = self.masked.loss(hidden, ids, chosen)
        return terms

    def _align(self, matching: Matching, image: Tensor, text: Tensor, mask: Tensor, **shared) -> Tensor:
        if matching == "filip":
            return late_interaction(image, text, mask, self.clip.logit_scale.exp(), **shared)
        return {"one_to_many": one_to_many, "one_to_one": one_to_one}[matching](image, text, mask)

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * value for name, value in terms.items())

    def loss(self, batch: dict) -> Tensor:
        """Equation 2: the weighted sum of the terms."""
        return self._total(self.losses(batch))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss of one batch, each term logged apart."""
        self._need_captions(batch)
        terms = self.losses(batch)
        self.log_dict({f"train_{name}_loss": value for name, value in terms.items()})
        return self.log_step(self._total(terms))


def _warn_of_idle(settings: Mapping[str, Any]) -> None:
    """Name what is set but not read, since what reads it is left out."""
    defaults = inspect.signature(MLIPPretraining).parameters
    for reader, names in READ_BY.items():
        for name in names if not settings[reader] else ():
            if settings[name] != defaults[name].default:
                rank_zero_warn(f"{name} {settings[name]!r} is ignored: nothing reads it while {reader} is not set")
    if settings["guide"] == "random" and settings["guide_heads"] is not None:
        rank_zero_warn(f"guide_heads {settings['guide_heads']} is ignored: a random guide has DeiT-Tiny's heads")


def _architecture(
    name: str, weights: str | None, preprocess: str | dict[str, Any] | None, quick_gelu: bool | None
) -> dict[str, Any]:
    """The architecture of a name, with the preprocessing of the weights that the training starts from."""
    sizes = load_architecture(name)
    if quick_gelu is not None:
        sizes = {**sizes, "quick_gelu": quick_gelu}
    size = sizes["vision_cfg"]["image_size"]
    if weights is not None:
        return find_pretrained(name, weights, size, quick_gelu, preprocess).preprocess.recorded_in(sizes)
    return sizes if preprocess is None else choose_preprocess(name, None, preprocess, size).recorded_in(sizes)


def _guide(setting: str | None, keep_rates: Mapping[int, float] | None, train: bool, heads: int | None) -> Guide | None:
    """The Guide that a setting names. ValueError: a variable that is not set, or no such file."""
    if setting is None or (setting == "random" and not keep_rates):  # one overlay of trials is for plain towers too
        return None
    if setting == "random":
        return Guide(train=train)
    path = os.path.expandvars(setting)
    unset = re.findall(r"\$\{(\w+)\}", path)
    try:
        return Guide.from_weights(path, train, heads)
    except ValueError as error:
        mend = f"set the environment variable {unset[0]} to" if unset else "name"
        raise ValueError(
            f"the Guide {setting}: {error}; {mend} a DeiT-Tiny pretrained as a masked autoencoder (mae-lite publishes "
            "one), or set guide: null to train without"
        ) from error
