"""Phase III's learnable tokens of both encoders, layer by layer as in MaPLe, beside a frozen, pruned CLIP.

Shapes: B images or texts, N tokens, P prompts of one encoder, D width (text or image), L prompted layers, T text
tokens, E joint dim.

In the paper both encoders get learnable tokens, and the image's are a linear map of the text's; the rest is open.
Here, as in MaPLe, text prompts stand after start-of-text and image prompts after the patches. The first layer's prompts
enter with the tokens. The prompts of layers 2 to L replace the outputs of the layer before at their places. After
layer L they pass on like any token. Image prompts are exempt from pruning, and the predictor does not read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from common.reduction import ReductionContext
from common.tower import BlockTower, ImageTower, TextTower
from common.weights import load_saved, save_model

Kind = Literal["coupled", "independent", "text", "visual"]
"""Both encoders, with image prompts mapped from the text prompts; both, trained apart; or one encoder alone."""


class Prompts(nn.Module):
    """P prompts in each of the first L layers of one encoder or both.

    kind: see ``Kind``.  count: P of each prompted encoder; 0 is the model without prompts.  depth: L.
    text_width, image_width: D of the encoders.
    start: [L,P,D], initial text prompts of every layer, such as ``words_by_layer``; by default they are random, with
        MaPLe's deviation of 0.02.
    ValueError: an unknown kind, a negative count, no depth, or a start that does not fit.
    """

    def __init__(
        self,
        kind: Kind = "coupled",
        count: int = 2,
        depth: int = 9,
        text_width: int = 512,
        image_width: int = 768,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
        if count < 0 or depth < 1:
            raise ValueError(f"{count} prompts in {depth} layers: give 0 prompts or more, in one layer at least")
        self.settings = {
            "kind": kind, "count": count, "depth": depth, "text_width": text_width, "image_width": image_width,
        }  # fmt: skip
        self.kind, self.depth = kind, depth
        self.texts = 0 if kind == "visual" else count
        self.visuals = 0 if kind == "text" else count

        def fresh(width: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(depth, count, width))

        self.text = fresh(text_width) if kind != "visual" else None
        self.visual = fresh(image_width) if kind in ("visual", "independent") else None
        self.couplings = None
        if kind == "coupled":
            self.couplings = nn.ModuleList(nn.Linear(text_width, image_width) for _ in range(depth))
        if start is not None:
            if self.text is None or start.shape != self.text.shape:
                raise ValueError(f"a start of {tuple(start.shape)} for {self.texts} text prompts in {depth} layers")
            self.text.data.copy_(start)

    def text_at(self, layer: int) -> Tensor:
        """The text prompts [P,D] of a layer < L."""
        return self.text[layer]

    def visual_at(self, layer: int) -> Tensor:
        """The image prompts [P,D] of a layer < L; coupled ones are M P_t + b of that layer's text prompts."""
        return self.visual[layer] if self.couplings is None else self.couplings[layer](self.text[layer])

    @torch.no_grad()
    def evaluated(self) -> Prompts:
        """The same prompts without the couplings: coupled ones become independent ones, as inference needs them."""
        plain = Prompts(**{**self.settings, "kind": "independent" if self.kind == "coupled" else self.kind})
        plain = plain.to(next(self.parameters()))
        if self.text is not None:
            plain.text.copy_(self.text)
        if plain.visual is not None:
            plain.visual.copy_(torch.stack([self.visual_at(layer) for layer in range(self.depth)]))
        return plain

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the evaluated prompts as safetensors: 92 kB at ViT-B/16 with 2 + 2 prompts in 9 layers."""
        plain = self.evaluated()
        save_model(plain, path, {"prompts": plain.settings}, dtype)

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """Read a file that ``save`` wrote. ValueError for any other."""
        problem = "holds no prompts; a training checkpoint is exported with Prompts.save first"
        return load_saved(path, {"prompts"}, problem, lambda record: cls(**record["prompts"]))


@torch.no_grad()
def words_by_layer(tower: TextTower, ids: Tensor, depth: int) -> Tensor:
    """Hidden states [L,P,D] of words before each of the first ``depth`` layers; as prompts they equal the words.

    ids: [1,T], start-of-text, P words, end-of-text.  Words do not see what follows them, so their hidden states are
    the same in all texts that begin with them. (MaPLe starts from words in the first layer alone and at random in the
    others, which changes the CLIP's texts. Coupled image prompts start from random maps in both cases.)
    """
    x = tower.embed(ids)
    layers = [tower.token_embedding(ids)]  # the first layer's prompts get their positions with every text
    for layer in range(1, depth):
        x = tower.run_blocks(x, layer - 1, layer, mask="causal")
        layers.append(x)
    return torch.cat(layers)[:, 1:-1]


def check_depth(prompts: Prompts, tower: BlockTower) -> None:
    """ValueError: prompts in more layers than the tower has."""
    layers = len(tower.transformer.resblocks)
    if prompts.depth > layers:
        raise ValueError(f"prompts of depth {prompts.depth} for a tower of {layers} blocks; take {layers} at most")


def visual_reducers(prompts: Prompts, tower: ImageTower) -> dict[int, Callable]:
    """The image prompts as reducers of ``common.reduction``, by the block before which they enter.

    ValueError: prompts in more layers than the tower has, or a tower of another library.
    """
    if not prompts.visuals:
        return {}
    if not isinstance(tower, ImageTower):
        raise ValueError(f"image prompts go with this suite's ImageTower; {type(tower).__name__} is another library's")
    check_depth(prompts, tower)
    deeper = {layer: partial(_replace, prompts=prompts, layer=layer) for layer in range(1, prompts.depth)}
    return {0: partial(_append, prompts=prompts, norm=tower.ln_pre), **deeper}


def _append(x: Tensor, context: ReductionContext, prompts: Prompts, norm: nn.Module) -> tuple[Tensor, ReductionContext]:
    """Append the first layer's prompts to the patches. Like every entering token they pass ``ln_pre`` first."""
    assert context.bias is None and not context.trailing, "prompts come before whatever masks or appends tokens"
    visual = norm(prompts.visual_at(0))
    return torch.cat([x, _expand(visual, x)], dim=1), replace(context, trailing=len(visual))


def _replace(x: Tensor, context: ReductionContext, prompts: Prompts, layer: int) -> tuple[Tensor, ReductionContext]:
    """Replace the prompts by those of a deeper layer."""
    return torch.cat([x[:, : -context.trailing], _expand(prompts.visual_at(layer), x)], dim=1), context


def _expand(prompts: Tensor, x: Tensor) -> Tensor:
    """prompts [P,D] -> [B,P,D], one copy per row of x, in the type of x."""
    return prompts.to(x.dtype).expand(x.shape[0], -1, -1)  # not len(x), which an exported graph keeps as a constant


def prompted_text(tower: TextTower, ids: Tensor, prompts: Prompts) -> Tensor:
    """ids [B,T] -> z [B,E] of the text tower with prompts after start-of-text.

    The first layer's prompts get the positions at which they stand. Without text prompts this is the tower itself.
    ValueError: texts that leave no room for the prompts.
    """
    count = prompts.texts
    if not count:
        return tower(ids)
    length = int(ids.argmax(-1).max()) + 1  # what follows end-of-text may be cut
    if length + count > tower.context_length:
        raise ValueError(
            f"texts of {length} tokens and {count} prompts exceed the context of {tower.context_length}; shorten them"
        )
    # Placeholders make room for the prompts, and each prompted layer overwrites them.
    ids = torch.cat([ids[:, :1], ids.new_zeros(len(ids), count), ids[:, 1:length]], dim=1)
    x = tower.embed(ids)
    for layer in range(prompts.depth):
        text = prompts.text_at(layer)
        if not layer:
            text = text + tower.positional_embedding[1 : 1 + count]
        x = torch.cat([x[:, :1], _expand(text, x), x[:, 1 + count :]], dim=1)
        x = tower.run_blocks(x, layer, layer + 1, mask="causal")
    return tower.pool(tower.run_blocks(x, prompts.depth, mask="causal"), ids)
