"""The speed of our image tower, wavelet transform and MLIP training on this machine, each beside its reference.

Shapes: B images, S pixels.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch

from benchmarks.cells import table
from benchmarks.speed import engines
from benchmarks.speed import training as mlip_speed
from common.clip import CLIP, load_architecture
from common.conditions import conditions
from common.flops import count_macs
from common.inference import optimize_for_inference
from common.timing import alternate, ratio
from waveclip.wavelet import dwt2

BATCH, SIZE = 8, 224
ROUNDS = 15
MATMUL = (1576, 768, 3072)
"""Rows, inner and outer width of the reference product: the first linear map of ViT-B/16's MLP at batch 8."""

SMALLEST = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1},
}
"""The architecture of a smoke run."""


def run(smoke: bool = False) -> dict[str, Any]:
    """Speeds as medians over alternating rounds, all in this process.

    smoke: two rounds of two blocks of width 64 at 32 px; the numbers mean nothing.
    """
    rounds, batch, size = (2, 2, 32) if smoke else (ROUNDS, BATCH, SIZE)
    architecture = SMALLEST if smoke else load_architecture("ViT-B-16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = ", ".join(str(dtype).removeprefix("torch.") for dtype in engines.dtypes(device))
    run_conditions = conditions("paper", seeds=None, dtype=measured, batch=batch, rounds=rounds, pixels=size)
    return {
        "name": "speed",
        "conditions": run_conditions,
        "towers": [towers(architecture, batch, dtype, device, rounds) for dtype in engines.dtypes(device)],
        "engines": engines.measure(architecture, device, rounds),
        "wavelet": wavelet(batch, size, device, rounds),
        "mlip": mlip_speed.measure(device, rounds, smoke),
    }


@torch.inference_mode()
def towers(architecture: dict[str, Any], batch: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Images/s of both image towers with the same random weights of one dtype, all tokens computed; ours optimised.

    ``share`` is the tower's multiply-adds per second over those of the ``MATMUL`` product in the same dtype.
    """
    theirs = open_clip.CLIP(**architecture).eval()
    ours = CLIP(architecture).eval()
    ours.load_weights(theirs.state_dict())
    size = architecture["vision_cfg"]["image_size"]
    macs = count_macs(ours.image_tower, torch.zeros(1, 3, size, size)).gmacs * 1e9
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    forwards = {
        "ours": optimize_for_inference(ours.image_tower.to(device, dtype)),
        "open_clip": theirs.visual.to(device, dtype),
    }
    rows, inner, outer = MATMUL
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, outer)))
    calls = {name: lambda forward=forward: forward(images) for name, forward in forwards.items()}
    measured = alternate({**calls, "matmul": lambda: left @ right}, rounds)
    rate = rows * inner * outer / measured["matmul"]["seconds"]
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "matmul_gmacs_per_second": rate / 1e9}
    for name in forwards:
        speed = batch / measured[name]["seconds"]
        row[name] = {"images_per_second": speed, "share": speed * macs / rate, **measured[name]}
    return {**row, "ratio": ratio(measured["open_clip"], measured["ours"])}


@torch.inference_mode()
def wavelet(batch: int, size: int, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of one haar analysis in fp32, by our strided convolution and by ptwt's call, which takes no bf16."""
    images = torch.randn(batch, 3, size, size, device=device)
    calls = {name: lambda name=name: dwt2(images, "haar", name) for name in ("conv", "ptwt")}
    measured = alternate(calls, rounds, repeats=10)
    return {"dtype": "float32", **measured, "ratio": ratio(measured["ptwt"], measured["conv"])}


def render(result: dict[str, Any]) -> dict[str, Any]:
    """The result as {"md": Markdown, "figures": {}}."""
    run = result["conditions"]
    rows = []
    for row in result["towers"]:
        sides = [
            (f"{row[name]['images_per_second']:.1f}{_peak(row[name])}", f"{100 * row[name]['share']:.0f} %")
            for name in ("ours", "open_clip")
        ]
        rows.append(["ViT-B/16", row["dtype"], *sides[0], *sides[1], f"{row['ratio']:.2f}"])
    head = ["image tower", "weights", "images/s", "of the matrix rate", "open_clip images/s", "of the matrix rate"]
    haar = result["wavelet"]
    cells = [
        haar["dtype"],
        *(f"{1e3 * haar[name]['seconds']:.2f}" for name in ("conv", "ptwt")),
        f"{haar['ratio']:.1f}",
    ]
    parts = [
        f"On {run['device']}, {run['threads']} threads, torch {run['torch']}:",
        table([*head, "ratio"], rows, left=(0, 1)),
        table(["haar transform", "convolution, ms", "ptwt's call, ms", "ratio"], [cells]),
    ]
    parts += engines.parts(result["engines"]) if "engines" in result else []
    parts += mlip_speed.parts(result["mlip"]) if "mlip" in result else []
    rates = ", ".join(f"{row['matmul_gmacs_per_second']:.0f} ({row['dtype']})" for row in result["towers"])
    parts.append(
        f"Medians of {run['rounds']} alternating rounds in one process (of the ratios too), "
        f"batch {run['batch']}, {run['pixels']} px, all tokens. The matrix rate is that of a "
        f"{'x'.join(map(str, MATMUL))} product, in 10⁹ multiply-adds per second: {rates}."
    )
    return {"md": "\n\n".join(parts) + "\n", "figures": {}}


def _peak(measured: dict[str, Any]) -> str:
    return "" if measured["peak_bytes"] is None else f" ({measured['peak_bytes'] / 2**20:.0f} MiB)"
