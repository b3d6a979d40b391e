"""MLIP's image tower: a Frequency Stage, then a Spatial Stage with acceleration blocks (section 3, Tables 12 and 13).

Shapes: B images, S image size, N patch tokens, K patch tokens after merging, D width, E joint dim, G Guide tokens,
W their width.

images -> embed -> run_frequency -> run_blocks -> pool. The class token stands first all the way; the Frequency Stage
mixes the patch tokens and leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.reduction import Place, Reducer, ReductionContext, run_reduced
from common.tower import ImageTower
from mlip.fourier import FourierBlock, Spectrum
from mlip.guide import Guide, GuideAttention
from mlip.merging import Merging, kept_tokens

PAPER_LAYERS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"embed_dim": 512, "frequency_layers": 4, "keep_rates": {9: 0.7, 11: 0.7}},
    "ViT-B-16": {"embed_dim": 512, "frequency_layers": 4, "keep_rates": {9: 0.5, 11: 0.5}},
    "ViT-L-14": {"embed_dim": 512, "frequency_layers": 8, "keep_rates": {13: 0.7, 16: 0.7, 19: 0.65, 22: 0.65}},
}
"""Tables 13 and 12 (joint dimension) by open_clip's model name, as options of ``MLIPTower.from_architecture``.

The text tower needs the same ``embed_dim``, and open_clip's ViT-L-14 has 768.
"""


class MLIPFeatures(NamedTuple):
    """What the losses read, all in the joint space and not normalised.

    frequency: [B,E], the mean of the frequency tokens; None without a Frequency Stage, as frequency_tokens.
    spatial: [B,E], of the class token; what ``encode_image`` gives.
    frequency_tokens: [B,N,E].
    spatial_tokens: [B,K,E], the patch tokens alone.
    """

    frequency: Tensor | None
    spatial: Tensor
    frequency_tokens: Tensor | None
    spatial_tokens: Tensor


class MLIPTower(nn.Module):
    """An image tower whose first blocks are Fourier blocks; some of the later ones merge tokens, led by a Guide.

    ``vit`` is an ``ImageTower`` with the other blocks: it holds the embedding, the Spatial Stage and the read-out.
    Without Fourier blocks and merging this tower equals it.

    An acceleration block is cross-attention to the Guide, self-attention, merging, MLP. The paper names
    cross-attention and merging, and leaves the rest and the order open. The fine class token C^f is CLIP's class
    token, embedded with its position; it joins the patch tokens where the Spatial Stage begins.

    image_size, patch_size, width, layers, heads, embed_dim, mlp_ratio, quick_gelu: as in ``ImageTower``; ``layers``
        counts both stages.
    frequency_layers: number of Fourier blocks, the first ones; 0 for none.
    keep_rates: acceleration blocks, layer (from 1, over both stages) -> share of the patch tokens kept, in [0.5, 1].
    guide: what the acceleration blocks attend to first; None leaves that step out.
    spectrum, pieces: of the Fourier blocks, see ``LegoFilter``.
    guide_tokens: "all" of the Guide's tokens, or its "class" token alone. The latter is section 3.4 to the letter,
        but adds one and the same vector to every token.
    proportional_attention: see ``Merging``.
    ValueError: layers that do not exist, rates out of range, a Guide that no block reads.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        *,
        frequency_layers: int,
        keep_rates: Mapping[int, float],
        guide: Guide | None,
        spectrum: Spectrum = "power",
        pieces: int = 2,
        guide_tokens: Literal["all", "class"] = "all",
        proportional_attention: bool = False,
    ) -> None:
        super().__init__()
        self.frequency_layers = frequency_layers
        self.keep_rates = {int(layer): float(keep_rates[layer]) for layer in keep_rates}
        self._check(layers, (image_size // patch_size) ** 2, guide, guide_tokens)
        spatial = layers - frequency_layers
        self.vit = ImageTower(image_size, patch_size, width, spatial, heads, embed_dim, mlp_ratio, quick_gelu)
        self.fourier = nn.ModuleList(
            FourierBlock(self.vit.grid, width, mlp_ratio, quick_gelu, pieces, spectrum) for _ in range(frequency_layers)
        )
        for block in self.fourier:  # CLIP's initial scales
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
        self.frequency_head = None
        if frequency_layers:
            self.frequency_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim, bias=False))
            nn.init.normal_(self.frequency_head[1].weight, std=width**-0.5)
        self.guide, self.guide_tokens = guide, guide_tokens
        self.guide_attention = nn.ModuleDict()
        if guide is not None:
            self.guide_attention.update(
                {str(layer): GuideAttention(width, heads, guide.width) for layer in self.keep_rates}
            )
        self.merging = {layer: Merging(rate, proportional_attention) for layer, rate in self.keep_rates.items()}

    def _check(self, layers: int, patches: int, guide: Guide | None, guide_tokens: str) -> None:
        if not 0 <= self.frequency_layers < layers:
            raise ValueError(f"frequency_layers {self.frequency_layers} of {layers} layers; use 0 to {layers - 1}")
        left = patches
        for layer, rate in sorted(self.keep_rates.items()):
            if not self.frequency_layers < layer <= layers:
                raise ValueError(
                    f"an acceleration block at layer {layer}: the Spatial Stage has layers "
                    f"{self.frequency_layers + 1} to {layers}"
                )
            if not kept_tokens(rate, left):
                raise ValueError(f"keep rate {rate} at layer {layer} leaves none of {left} tokens; raise a rate")
            left = kept_tokens(rate, left)
        if guide is not None and not self.keep_rates:
            raise ValueError("a Guide is read by acceleration blocks alone: name some in keep_rates, or give no Guide")
        if guide_tokens not in ("all", "class"):
            raise ValueError(f"guide_tokens {guide_tokens!r} is neither 'all' nor 'class'")

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], **options: Any) -> MLIPTower:
        """The tower of an architecture in open_clip's format (``common.clip.load_architecture``).

        options: keyword arguments of this class; where one is in the architecture too (embed_dim), the option counts.
        """
        vision = dict(architecture["vision_cfg"])
        vision["heads"] = vision["width"] // vision.pop("head_width", 64)
        shared = {"embed_dim": architecture["embed_dim"], "quick_gelu": bool(architecture.get("quick_gelu", False))}
        return cls(**{**vision, **shared, **options})

    @torch.no_grad()
    def start_from(self, tower: ImageTower, layers: int) -> None:
        """Copy embedding, read-out and the last ``layers`` blocks of a CLIP's tower of the same sizes.

        ValueError: more layers than the Spatial Stage has.
        """
        blocks = self.vit.transformer.resblocks
        if not 0 < layers <= len(blocks):
            raise ValueError(f"{layers} layers to start from: the Spatial Stage has {len(blocks)}; give no more")
        for block, source in zip(blocks[-layers:], tower.transformer.resblocks[-layers:], strict=True):
            block.load_state_dict(source.state_dict())
        state = {key: value for key, value in tower.state_dict().items() if not key.startswith("transformer.")}
        self.vit.load_state_dict(state, strict=False)

    def embed(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> tokens [B,1+N,D], class token first, as CLIP embeds them."""
        return self.vit.embed(images)

    def run_frequency(self, x: Tensor) -> Tensor:
        """The Frequency Stage: x [B,1+N,D] -> [B,1+N,D]; the class token stays as it is."""
        if not self.fourier:
            return x
        patches = x[:, 1:]
        for block in self.fourier:
            patches = block(patches)
        return torch.cat([x[:, :1], patches], dim=1)

    def look(self, images: Tensor) -> Tensor | None:
        """The Guide's tokens [B,G,W] of images [B,3,S,S], or None without a Guide."""
        if self.guide is None:
            return None
        tokens = self.guide(images)
        return tokens[:, :1] if self.guide_tokens == "class" else tokens

    def run_blocks(self, x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ReductionContext]:
        """The Spatial Stage: x [B,1+N,D] -> [B,1+K,D], and the context with the patches of each token.

        seen: the Guide's tokens [B,G,W] from ``look``.
        """
        assert (seen is None) == (self.guide is None), "the Guide's tokens come from look(images)"
        # shape[0], not len(x): an exported graph would keep len(x) as a constant.
        places = torch.arange(x.shape[1] - 1, device=x.device).expand(x.shape[0], -1)
        blocks = self.vit.transformer.resblocks
        return run_reduced(blocks, x, ReductionContext(places), self._reducers(seen), self.frequency_layers)

    def _reducers(self, seen: Tensor | None) -> dict[Place, Reducer]:
        """For every acceleration block: cross-attention before it, merging between its half steps."""
        reducers: dict[Place, Reducer] = {(layer - 1, "middle"): merging for layer, merging in self.merging.items()}
        for layer, attention in self.guide_attention.items():
            reducers[int(layer) - 1] = lambda x, context, attention=attention: (attention(x, seen), context)
        return reducers

    def pool(self, x: Tensor) -> Tensor:
        """x [B,1+K,D] -> the spatial embedding [B,E], read from the class token as CLIP does."""
        return self.vit.pool(x)

    def forward(self, images: Tensor) -> MLIPFeatures:
        """images [B,3,S,S] -> all that the losses read.

        A stage's tokens pass through the head of its embedding, so both are in one space. The frequency embedding is
        the mean of its tokens, since no class token goes through the Fourier blocks.
        """
        x = self.run_frequency(self.embed(images))
        frequency = frequency_tokens = None
        if self.frequency_head is not None:
            frequency_tokens = self.frequency_head(x[:, 1:])
            frequency = frequency_tokens.mean(1)
        x, _ = self.run_blocks(x, self.look(images))
        spatial = self.vit.ln_post(x) @ self.vit.proj
        return MLIPFeatures(frequency, spatial[:, 0], frequency_tokens, spatial[:, 1:])

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B,3,S,S] -> the spatial embedding [B,E], of length 1 unless ``normalize`` is off.

        The heads that only the losses read do not run.
        """
        z = self.penultimate(images) @ self.vit.proj
        return F.normalize(z, dim=-1) if normalize else z

    def penultimate(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> the class token [B,D] of the Spatial Stage, before projection."""
        return self.normalised_tokens(images)[:, 0]

    def normalised_tokens(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> the Spatial Stage's tokens [B,1+K,D], class token first, after the last norm."""
        x, _ = self.run_blocks(self.run_frequency(self.embed(images)), self.look(images))
        return self.vit.ln_post(x)
