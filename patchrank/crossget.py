"""CrossGET (Shi et al., ICML 2024), a baseline: the tower whose patches merge by their likeness and by cross tokens.

Shapes: B images or texts, S image size, N tokens, T text tokens, L blocks, D width, E joint dim.

A cross token of a picture and one of its text are pulled together in every block (``alignment_loss``), which teaches
the vectors that make them. ``patchrank.reducers.crossget`` has the matching and the merging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.clip import CLIP
from common.reducer_registry import setting_for
from common.reduction import ReducedTower, run_reduced
from common.tower import ImageTower, TextTower
from common.weights import load_saved, save_model
from patchrank.reducers.crossget import cross_reducers, cross_tokens


class CrossPass(NamedTuple):
    """The result of a training pass.

    z: [B,E], not normalised.  cross: [L,B,E], the cross token of every block in the joint space.
    """

    z: Tensor
    cross: Tensor


class CrossGETTower(ReducedTower):
    """An image tower that merges the same number of patches in every block; at keep 1 it equals the tower.

    The given tower is shared, not copied.

    tokens: the cross tokens by the number of their block; None: untrained ones.
    keep: over all blocks as many patches are gone as when this share of them enters the first one, see
        ``patchrank.reducers.base.spread``. 16 of ViT-B/16's 196 in every block, as released, are keep 0.47.
    ValueError: a rate out of range, or a tower of another library.
    """

    prunable = True

    def __init__(self, tower: ImageTower, tokens: nn.ModuleDict | None = None, keep: float = 0.47) -> None:
        if not isinstance(tower, ImageTower):
            raise ValueError(f"CrossGET trains this suite's ImageTower; {type(tower).__name__} is another library's")
        if tokens is None:
            tokens = cross_tokens(tower.width, len(tower.transformer.resblocks))
        super().__init__(tower, cross_reducers(setting_for(tower, keep, 0)._replace(trained=tokens)))
        self.keep = keep

    @property
    def tokens(self) -> nn.ModuleDict:
        """The cross tokens, by the number of their block."""
        return nn.ModuleDict({str(block): reducer.token for (block, _), reducer in self.reducers.items()})

    def at(self, keep: float) -> CrossGETTower:
        """This tower at another rate, with shared weights. ValueError: see the class."""
        return CrossGETTower(self.tower, self.tokens, keep).train(self.training)

    def crossed(self, images: Tensor) -> CrossPass:
        """The training pass of images [B,3,S,S], which merges as inference does.

        Cross tokens are projected as released: by the norm before the blocks and by the projection, at rest.
        """
        x, context = self.enter(images)
        tokens, entering = self.tokens, []
        for number, block in enumerate(self.tower.transformer.resblocks):
            entering.append(tokens[str(number)](x[:, 0]))
            x, context = run_reduced([block], x, context, self.reducers, number)
        return CrossPass(self.pool(x, context), projected(torch.stack(entering), self.tower.ln_pre, self.tower.proj))

    def save(self, path: str | Path, architecture: dict, dtype: torch.dtype = torch.float32) -> None:
        """Write a self-describing safetensors file. architecture: that of the CLIP whose image tower this is."""
        save_model(self, path, {"architecture": architecture, "crossget": {"keep": self.keep}}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> CrossGETTower:
        """Read a file that ``save`` wrote. ValueError for any other."""

        def build(record: dict[str, Any]) -> CrossGETTower:
            return cls(CLIP(record["architecture"]).image_tower, **record["crossget"])

        problem = "does not describe a CrossGETTower; convert its training checkpoint first"
        return load_saved(path, {"architecture", "crossget"}, problem, build)


def projected(cross: Tensor, norm: nn.LayerNorm, projection: Tensor) -> Tensor:
    """Cross tokens [L,B,D] in the joint space [L,B,E]; norm and projection [D,E] get no gradient."""
    normed = F.layer_norm(cross, norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps)
    return normed @ projection.detach()


def text_cross(tower: TextTower, tokens: nn.ModuleDict, ids: Tensor) -> Tensor:
    """The cross tokens [L,B,E] of texts ids [B,T] in the joint space.

    tokens: one for each of the L blocks, see ``cross_tokens``. That of a block begins with the end-of-text token that
    enters it. Released, it stands behind the text, where causal attention lets no other token see it; so the tower is
    left as it is here.
    """
    x, rows, ends = tower.embed(ids), torch.arange(ids.shape[0], device=ids.device), ids.argmax(-1)
    entering = []
    for number, block in enumerate(tower.transformer.resblocks):
        entering.append(tokens[str(number)](x[rows, ends]))
        x = block(x, "causal")
    return projected(torch.stack(entering), tower.ln_final, tower.text_projection)


def alignment_loss(image: Tensor, text: Tensor) -> Tensor:
    """The mean over blocks and pairs of (KL(m || p) + KL(m || q)) / 2 with m = (p + q) / 2.

    image: [L,B,E], whose softmax over E is p.  text: [L',B,E], whose softmax is q. A tower of another depth gives the
    block at the same share of its depth; released, both have 12 blocks.
    """
    text = text[[block * len(text) // len(image) for block in range(len(image))]]
    wide = torch.promote_types(image.dtype, torch.float32)
    logs = [cross.to(wide).flatten(0, 1).log_softmax(-1) for cross in (image, text)]
    mean = (logs[0].exp() + logs[1].exp()) / 2
    return sum(F.kl_div(log, mean, reduction="batchmean") for log in logs) / 2
