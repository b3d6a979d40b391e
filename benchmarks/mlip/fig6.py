"""MLIP's Figure 6: the Lego-Filter's gain by frequency.

Shapes: K pieces, G×G frequencies, V = G/2 + 1 columns of the half spectrum, D channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.cells import table
from benchmarks.mlip.models import MODEL, Subject, folder, not_run, shown
from mlip.fourier import LegoFilter

__all__ = ["folder", "render", "rings", "run", "spectra", "whole"]

CHANNELS = 6
"""The figure shows so many channels, those whose gain differs most between frequencies."""


def whole(half: Tensor) -> Tensor:
    """Moduli of a real signal's half spectrum [...,G,V] -> of the whole [...,G,G], equal at (u,v) and (-u,-v)."""
    grid = half.shape[-2]
    rest = torch.arange(half.shape[-1], grid)
    mirrored = half[..., -torch.arange(grid) % grid, :][..., grid - rest]
    return torch.cat([half, mirrored], dim=-1)


def rings(gain: Tensor) -> dict[str, float]:
    """The mean of moduli [G,G,D] at each distance from frequency 0, rounded to whole numbers."""
    along = torch.fft.fftfreq(len(gain), 1 / len(gain))
    radius = (along[:, None] ** 2 + along**2).sqrt().round().long()
    return {str(ring): gain[radius == ring].mean().item() for ring in range(int(radius.max()) + 1)}


def uneven(gain: Tensor) -> Tensor:
    """Each channel's standard deviation between frequencies, over its mean: moduli [G,G,D] -> [D]."""
    return gain.flatten(0, 1).std(0) / gain.flatten(0, 1).mean(0)


@torch.no_grad()
def untrained(layer: LegoFilter) -> dict[str, Any]:
    """Rings and deviation of a filter of this shape before training, with random pieces.

    The gain is smaller at frequencies that a real kernel ties to others.
    """
    torch.manual_seed(0)
    fresh = LegoFilter(layer.grid, layer.pieces.shape[3], len(layer.pieces))
    gain = whole(fresh.gain().abs().movedim(-1, 0)).movedim(0, -1)
    return {"rings": rings(gain), "deviation": uneven(gain).mean().item()}


@torch.no_grad()
def spectra(layer: LegoFilter) -> dict[str, Any]:
    """A filter's gain by distance from frequency 0, and for some channels the spectra of its pieces and the filter."""
    pieces, gain = (
        whole(half.abs().movedim(-1, -3)).movedim(-3, -1)  # [K,G,G,D] and [G,G,D]
        for half in (torch.view_as_complex(layer.pieces.float()), layer.gain())
    )
    deviation = uneven(gain)
    channels = deviation.topk(min(CHANNELS, gain.shape[-1])).indices
    shown = {f"piece {number + 1}": piece for number, piece in enumerate(pieces)} | {"filter": gain}
    return {
        "pieces": len(pieces),
        "rings": rings(gain),
        "deviation": deviation.mean().item(),
        "start": untrained(layer),
        "channels": channels.tolist(),
        "shown": {
            name: np.round(part[..., channels].movedim(-1, 0).numpy(), 5).tolist() for name, part in shown.items()
        },
        "mean": np.round(gain.mean(-1).numpy(), 5).tolist(),
    }


def run(smoke: bool = False) -> dict[str, Any]:
    """The filters of the committed weights, or of MLIP; see ``shown``. smoke: the same."""
    return shown("mlip-fig6", {"mlip": MODEL}, _measure, needs_data=False)


def _measure(subject: Subject) -> dict[str, Any]:
    blocks = getattr(subject.models["mlip"].image_tower, "fourier", ())
    if not len(blocks):
        raise ValueError("MLIP names a model without Fourier blocks; this figure shows their filters")
    return {"layers": [spectra(block.filter.cpu()) for block in blocks]}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {name: Figure}}."""
    if absent := not_run(result):
        return absent
    distances = list(result["layers"][0]["rings"])
    rows = []
    for number, layer in enumerate(result["layers"], 1):
        for when, values in (("trained", layer), ("at the start", layer["start"])):
            gains = [f"{values['rings'][distance]:.4f}" for distance in distances]
            rows.append([number, layer["pieces"], when, *gains, f"{values['deviation']:.2f}"])
    grid = len(result["layers"][0]["mean"])
    committed = {"mlip": "Embedded scale, scenes of shape, the row `mlip`, seed 0"}
    whose = result.get("subject", committed)["mlip"]
    note = (
        f"{whose}: mean modulus of the filter over all channels, by "
        f"distance from frequency 0 on the {grid}×{grid} grid, beside a filter of random pieces. Uneven: the deviation "
        "of a channel's gain between frequencies over its mean, averaged over channels. The figure shows the "
        f"{CHANNELS} channels that deviate most, frequency 0 in the middle. The paper shows B/32's."
    )
    head = ["Fourier layer", "pieces", "", *(f"gain at distance {distance}" for distance in distances), "uneven"]
    return {
        "md": f"{table(head, rows, left=(0, 2))}\n\n{note}\n",
        "figures": {result["name"]: _draw(result)},
    }


def _draw(result: dict[str, Any]) -> Figure:
    layer = result["layers"][0]
    columns = len(layer["channels"])
    figure = Figure(figsize=(1.25 * columns, 1.35 * len(layer["shown"])), layout="constrained")
    panels = figure.subplots(len(layer["shown"]), columns, squeeze=False)
    for row, (name, spectra) in zip(panels, layer["shown"].items(), strict=True):
        row[0].set_ylabel(name)
        for panel, spectrum in zip(row, spectra, strict=True):
            image = panel.imshow(np.fft.fftshift(spectrum), vmin=0, cmap="magma")
            panel.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=list(row), shrink=0.8)
    for panel, channel in zip(panels[0], layer["channels"], strict=True):
        panel.set_title(f"channel {channel}", fontsize=8)
    return figure
