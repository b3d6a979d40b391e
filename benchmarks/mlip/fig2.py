"""MLIP's Figure 2: the similarity of tokens after each layer, and the cost of random removal.

Shapes: B images of a batch, M images in all, N tokens, K patch tokens among them, D width, S image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cells import accuracy, accuracy_of, points, table
from benchmarks.embedded import PART
from benchmarks.mlip.models import BASELINE, MODEL, TITLES, Subject, compared, folder, not_run, shown
from common.clip import CLIP
from common.evaluate.accuracy import paired_difference
from common.reduction import ReducedTower, ReductionContext
from common.tower import ImageTower
from common.zeroshot import embed_prompts, fill, similarity
from mlip.tower import MLIPTower

__all__ = ["folder", "layer_similarity", "removal", "render", "run", "token_similarity"]

KEEP = (0.75, 0.5, 0.25)
PICTURES = 10 * PART


def token_similarity(x: Tensor) -> Tensor:
    """The mean cosine over pairs of different tokens: x [B,N,D] -> [B]."""
    tokens = x.shape[1]
    together = F.normalize(x, dim=-1).sum(1).square().sum(-1)  # the sum over all pairs, also of each token with itself
    return (together - tokens) / (tokens * (tokens - 1))


@torch.no_grad()
def layer_similarity(tower: MLIPTower | ImageTower, images: Tensor) -> list[float]:
    """``token_similarity`` of the patch tokens after each layer, averaged over images [B,3,S,S]."""
    similarities: list[float] = []
    entered: list[Tensor] = []
    hooks = []
    fourier = tower.fourier if isinstance(tower, MLIPTower) else ()
    for block in (*fourier, *_vit(tower).transformer.resblocks):
        class_tokens = 0 if block in fourier else 1

        def leave(module, given, change, class_tokens=class_tokens) -> None:
            x = entered.pop() + change
            similarities.append(token_similarity(x[:, class_tokens:]).mean().item())

        # A block's output is the input of its MLP's residual branch plus what the MLP adds.
        hooks.append(block.ln_2.register_forward_pre_hook(lambda module, given: entered.append(given[0])))
        hooks.append(block.mlp.register_forward_hook(leave))
    try:
        tower.encode_image(images) if isinstance(tower, MLIPTower) else tower(images)
    finally:
        for hook in hooks:
            hook.remove()
    return similarities


def _vit(tower: MLIPTower | ImageTower) -> ImageTower:
    """The transformer of a tower."""
    return tower.vit if isinstance(tower, MLIPTower) else tower


class RandomRemoval:
    """Keeps a random share of the patch tokens, drawn anew for every picture."""

    def __init__(self, keep: float, seed: int = 0) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> the leading tokens and round(keep · K) of the K patch tokens, at least one."""
        positions = context.positions
        order = torch.rand(positions.shape, generator=self.generator).argsort(1).to(positions.device)
        return context.select(x, order[:, : max(round(self.keep * positions.shape[1]), 1)])


@torch.no_grad()
def removal(clip: CLIP, loader: Iterable[Mapping[str, Any]], prompts: list[str]) -> dict[str, Any]:
    """Zero-shot accuracy of a plain CLIP with all tokens, and with some removed before one layer, for each layer."""
    tower, classes = _vit(clip.image_tower), embed_prompts(clip, prompts)
    layers = range(len(tower.transformer.resblocks))
    towers = {(keep, layer): ReducedTower(tower, {layer: RandomRemoval(keep)}) for keep in KEEP for layer in layers}
    right: dict[Any, list[Tensor]] = {key: [] for key in ("all", *towers)}
    for batch in track(loader, "removing tokens"):
        for key, encoder in {"all": tower, **towers}.items():
            right[key].append(similarity(encoder(batch["image"]), classes).argmax(1) == batch["label"])
    dense, *others = (torch.cat(parts).cpu() for parts in right.values())
    rows = [
        {"keep": keep, "layer": layer + 1, **_accuracy(correct), "against_all": paired_difference(correct, dense)}
        for (keep, layer), correct in zip(towers, others, strict=True)
    ]
    return {"all": _accuracy(dense), "removed": rows}


def _accuracy(right: Tensor) -> dict[str, Any]:
    return accuracy_of(right) | {"pictures": len(right)}


def run(smoke: bool = False) -> dict[str, Any]:
    """Both panels on ``test`` (smoke: its first 250), or the commands that train the embedded models; see ``shown``."""
    weights = {"clip": BASELINE, "mlip": MODEL}
    return shown("mlip-fig2", weights, lambda subject: _measure(subject, smoke), dtype="float32")


def _measure(subject: Subject, smoke: bool) -> dict[str, Any]:
    pictures, similarities = subject.pictures("zeroshot"), {}
    limit = 250 if smoke else PICTURES if subject.names is None else None
    for name, model in subject.models.items():
        batches = subject.batches(name, pictures, min(limit or 2 * PART, 2 * PART))
        by_batch = [layer_similarity(model.image_tower, batch["image"]) for batch in batches]
        similarities[name] = [fmean(layer) for layer in zip(*by_batch, strict=True)]
    depths = {name: len(layers) for name, layers in similarities.items()}
    if len(set(depths.values())) > 1:
        raise ValueError(f"CLIP has {depths['clip']} layers, MLIP {depths['mlip']}; name models of one depth")
    prompts = [fill(pictures.templates[0], name) for name in pictures.class_names]
    return {
        "similarity": similarities,
        **removal(subject.models["clip"], subject.batches("clip", pictures, limit), prompts),
    }


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if absent := not_run(result):
        return absent
    layers, dense = range(1, len(result["similarity"]["clip"]) + 1), result["all"]
    alike = [(TITLES[name], *(f"{value:.3f}" for value in values)) for name, values in result["similarity"].items()]
    removed = []
    for keep in KEEP:
        rows = [row for row in result["removed"] if row["keep"] == keep]
        cells = [f"{100 * row['accuracy']:.1f} ({points(row['against_all'])})" for row in rows]
        removed.append([f"{100 * keep:.0f} % kept", *cells])
    note = (
        f"{compared(result)}. Zero-shot on {dense['pictures']:,} test pictures, with all tokens "
        f"{accuracy(dense['accuracy'], dense['interval'])}; in brackets the paired difference from that with its "
        "bootstrap interval. Which tokens go is drawn anew in every picture; the class token stays. MLIP's similarity "
        "is of the tokens that are left after merging. The paper draws CLIP ViT-B/32 on ImageNet, without numbers."
    )
    parts = [
        table(["mean cosine of patch tokens after layer", *layers], alike),
        table(["CLIP, removed at random before layer", *layers], removed),
        note,
    ]
    return {"md": "\n\n".join(parts) + "\n", "figures": {result["name"]: _draw(result)}}


def _draw(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in result["similarity"].items():
        left.plot(range(1, len(values) + 1), values, "o-", label=TITLES[name])
    left.set(title="(a) similarity of patch tokens", xlabel="after layer", ylabel="mean cosine")
    right.axhline(100 * result["all"]["accuracy"], color="gray", linestyle="--", label="all tokens")
    for keep in KEEP:
        rows = [row for row in result["removed"] if row["keep"] == keep]
        values = [100 * row["accuracy"] for row in rows]
        errors = [[abs(100 * (row["interval"][side] - row["accuracy"])) for row in rows] for side in (0, 1)]
        label = f"{100 * keep:.0f} % kept"
        right.errorbar([row["layer"] for row in rows], values, errors, fmt="o-", capsize=2, label=label)
    right.set(title="(b) random removal in CLIP", xlabel="before layer", ylabel="zero-shot top-1, %")
    for panel in (left, right):
        panel.set_xticks(range(1, len(result["similarity"]["clip"]) + 1))
        panel.legend()
    return figure
