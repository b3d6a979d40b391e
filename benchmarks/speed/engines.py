"""The image tower of one CLIP on every engine that is installed, interleaved in one process.

Shapes: B images, S pixels, E joint dim.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cells import table
from benchmarks.statistics import median_interval
from common.clip import CLIP
from common.deploy.graphs import Graph, export_stages
from common.flops import count_macs
from common.inference import BF16_PRODUCTS, optimize_for_inference
from common.stages import stages_of
from common.timing import alternate, rounds_ratio
from waveclip import WaveTower

Engine = Callable[[Tensor], Tensor]
"""images [B,3,S,S] -> embeddings [B,E] of length 1."""
BATCHES = (1, 8)
REFERENCE = "open_clip"
DENSE, COARSE = "ours", "WaveCLIP, level 0"
OPTIMIZED = ", optimised"
GOALS = (
    ("ONNX Runtime", "float32", {1: 0.98, 8: 0.98}),
    (REFERENCE, "float32", {1: 1.15, 8: 1.15}),
    (REFERENCE, "bfloat16", {1: 1.15, 8: 1.15}),
    ("OpenVINO", "bfloat16", {1: 0.95, 8: 0.95}),
)
"""Rival, dtype, and the least ratio to it by batch size, which the optimised dense tower was to reach on a CPU."""
COARSE_GOALS = {1: 0.85, 8: 0.92}
"""The least share of the counted saving that the optimised coarse level was to show in fp32, by batch size."""
COMPILED = "ours, torch.compile"
_INSTALL = "`pip install -e '.[export,rivals]'`"
OPTIONAL = {
    "transformers": _INSTALL,
    "ONNX Runtime": _INSTALL,
    "OpenVINO": _INSTALL,
    COMPILED: "`make speed COMPILE=1`",
}
"""The engines that a run may lack, and what adds each."""


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """float32, and bfloat16 where the device multiplies in it: an emulation takes minutes, and says nothing."""
    return (torch.float32, torch.bfloat16) if device != "cpu" or BF16_PRODUCTS else (torch.float32,)


def measure(architecture: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
    """A row for each dtype, batch size and engine.

    A row has seconds, their 95 % interval, the speed over open_clip's with its interval, and the greatest difference
    from open_clip's embeddings (None for an engine with other weights). bfloat16 is left out on a processor that does
    not multiply in it.
    """
    return {"rows": [row for dtype in dtypes(device) for row in _rows(architecture, dtype, device, rounds)]}


def _rows(architecture: dict[str, Any], dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    theirs, ours = open_clip.CLIP(**architecture).eval(), CLIP(architecture).eval()
    ours.load_weights(theirs.state_dict())
    size = architecture["vision_cfg"]["image_size"]
    wave = WaveTower.from_image_tower(ours.image_tower).eval()
    picture = torch.zeros(1, 3, size, size)
    gmacs = {DENSE: count_macs(ours.image_tower, picture).gmacs, COARSE: count_macs(_Coarse(wave), picture).gmacs}
    engines: dict[str, Engine] = _graph_engines(ours, size, dtype) if device == "cpu" else {}
    if installed("transformers"):
        engines["transformers"] = _transformers(architecture, device, dtype)
    theirs, ours, wave = (model.to(device, dtype) for model in (theirs, ours, wave))
    engines[REFERENCE] = lambda images: theirs.encode_image(images, normalize=True)
    engines |= _our_engines(ours, wave)
    with torch.inference_mode():
        batches = [torch.randn(batch, 3, size, size, device=device, dtype=dtype) for batch in BATCHES]
        measured = [_measured(engines, images, rounds) for images in batches]
    shared = {"dtype": str(dtype).removeprefix("torch.")}
    return [
        {"engine": name, **shared, "batch": batch, "gmacs": gmacs[COARSE if name.startswith(COARSE) else DENSE], **row}
        for batch, rows in zip(BATCHES, measured, strict=True)
        for name, row in rows.items()
    ]


def _measured(engines: Mapping[str, Engine], images: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Engine -> its durations, its speed over the reference's in each round, and its difference from it."""
    expected = engines[REFERENCE](images)
    rows = alternate({name: partial(engine, images) for name, engine in engines.items()}, rounds)
    for name, engine in engines.items():
        comparable = name != "transformers" and not name.startswith(COARSE)
        difference = (engine(images) - expected).abs().max().item() if comparable else None
        rows[name] |= {"ratios": rounds_ratio(rows[REFERENCE], rows[name]), "difference": difference}
    return rows


class _Coarse(torch.nn.Module):
    """The coarse level of a WaveTower alone."""

    def __init__(self, wave: WaveTower) -> None:
        super().__init__()
        self.wave = wave

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,S,S] -> z_0 [B,E]."""
        return F.normalize(self.wave.begin(images)[0], dim=-1)


def _our_engines(ours: CLIP, wave: WaveTower) -> dict[str, Engine]:
    """Dense tower and coarse level, plain and optimised; compiled too where COMPILE is set."""
    optimized, coarse = copy.deepcopy(ours.image_tower), _Coarse(copy.deepcopy(wave))
    engines = {
        DENSE: ours.encode_image,
        DENSE + OPTIMIZED: lambda images: F.normalize(optimized(images), dim=-1),
        COARSE: _Coarse(wave),
        COARSE + OPTIMIZED: coarse,
    }
    for tower in (optimized, coarse):
        optimize_for_inference(tower)
    if os.environ.get("COMPILE", "0") not in ("", "0"):
        engines[COMPILED] = torch.compile(ours.encode_image)
    return engines


def _graph_engines(ours: CLIP, size: int, dtype: torch.dtype) -> dict[str, Engine]:
    """ONNX Runtime (fp32 alone) and OpenVINO, which read the same ONNX graph, with torch's number of threads."""
    engines: dict[str, Engine] = {}
    if not installed("onnxscript") or not installed("onnxruntime"):
        return engines
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.onnx"
        (graph,) = export_stages([(stages_of(ours), size)], "onnx", [file])
        if dtype == torch.float32:
            engines["ONNX Runtime"] = _first_output(graph)
        if installed("openvino"):
            engines["OpenVINO"] = _first_output(openvino_graph(file, dtype))
    return engines


def _first_output(graph: Graph) -> Engine:
    return lambda images: graph(images)[0]


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def openvino_graph(file: Path, dtype: torch.dtype) -> Graph:
    """An ONNX file as a function of tensors; OpenVINO runs it on the CPU with torch's number of threads."""
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", openvino_settings(dtype))
    request = compiled.create_infer_request()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = request.infer([tensor.float().contiguous().numpy() for tensor in tensors])
        return tuple(torch.from_numpy(outputs[place]) for place in range(len(compiled.outputs)))

    return run


def openvino_settings(dtype: torch.dtype) -> dict[str, Any]:
    """OpenVINO's settings for single batches in one dtype."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return {**settings, "PERFORMANCE_HINT": "LATENCY"}


def _transformers(architecture: dict[str, Any], device: str, dtype: torch.dtype) -> Engine:
    """CLIP's image tower by transformers, with random weights of its own."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = architecture["vision_cfg"]
    config = CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision.get("head_width", 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        projection_dim=architecture["embed_dim"],
        hidden_act="quick_gelu" if architecture.get("quick_gelu") else "gelu",
    )
    model = CLIPVisionModelWithProjection(config).eval().to(device, dtype)
    return lambda images: F.normalize(model(pixel_values=images).image_embeds, dim=-1)


def parts(result: dict[str, Any]) -> list[str]:
    """The rows as Markdown: a table, how far cost becomes time, and the engines that are missing."""
    rows = result["rows"]
    head = ["engine", "weights", "batch", "images/s [95 %]", "× open_clip [95 %]", "difference"]
    lines = [
        [row["engine"], row["dtype"], row["batch"], _speed(row), _ratio(row["ratios"]), _difference(row)]
        for row in rows
    ]
    texts = [table(head, lines, left=(0, 1)), _realised(rows)]
    texts += [goals(rows)] if rows[0]["peak_bytes"] is None else []
    measured = {row["engine"] for row in rows}
    if missing := [f"{name} ({how})" for name, how in OPTIONAL.items() if name not in measured]:
        texts.append(f"Not measured: {'; '.join(missing)}.")
    return texts


def goals(rows: Sequence[dict[str, Any]]) -> str:
    """Whether the optimised towers reach what they were to reach, as a Markdown table; rivals that are missing are not.

    A goal is reached where the whole interval of the rounds' ratios reaches it, and missed where none of it does.
    """
    by_name = {(row["engine"], row["dtype"], row["batch"]): row for row in rows}
    lines = []

    def judge(what: str, dtype: str, batch: int, least: float, ratios: Sequence[float]) -> None:
        low, high = median_interval(ratios)
        verdict = "reached" if low >= least else "MISSED" if high < least else "neither shown"
        lines.append([what, dtype, batch, f"{least:.2f}", _ratio(ratios), verdict])

    for rival, dtype, least in GOALS:
        for batch in least:
            sides = (by_name.get((name, dtype, batch)) for name in (rival, DENSE + OPTIMIZED))
            if all(sides := list(sides)):
                judge(f"dense tower, × {rival}", dtype, batch, least[batch], rounds_ratio(*sides))
    for batch, least in COARSE_GOALS.items():
        dense, coarse = (by_name[name + OPTIMIZED, "float32", batch] for name in (DENSE, COARSE))
        counted = dense["gmacs"] / coarse["gmacs"]
        shares = [ratio / counted for ratio in rounds_ratio(dense, coarse)]
        judge("coarse level, share of its counted saving", "float32", batch, least, shares)
    head = ["goal on a CPU, optimised", "weights", "batch", "least", "found [95 %]", "verdict"]
    return table(head, lines, left=(0, 1, 5))


def _speed(row: dict[str, Any]) -> str:
    low, high = median_interval(row["rounds"])
    batch = row["batch"]
    return f"{batch / row['seconds']:.2f} [{batch / high:.2f}, {batch / low:.2f}]"


def _ratio(ratios: Sequence[float]) -> str:
    low, high = median_interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def _difference(row: dict[str, Any]) -> str:
    return "–" if row["difference"] is None else f"{row['difference']:.0e}"


def _realised(rows: Sequence[dict[str, Any]]) -> str:
    """What share of the counted saving of the coarse level is saved time."""
    by_name = {(row["engine"], row["dtype"], row["batch"]): row for row in rows}
    shares = []
    for (name, dtype, batch), coarse in by_name.items():
        if name.startswith(COARSE):
            dense = by_name[name.replace(COARSE, DENSE), dtype, batch]
            counted, timed = dense["gmacs"] / coarse["gmacs"], dense["seconds"] / coarse["seconds"]
            kind = "optimised" if name.endswith(OPTIMIZED) else "plain"
            shares.append(f"{100 * timed / counted:.0f} % ({kind}, {dtype}, batch {batch})")
            counts = f"{counted:.2f}"
    return (
        f"The coarse level costs {counts} times fewer multiply-adds than the dense tower. Of that ratio, its time "
        f"shows {'; '.join(shares)}. Differences are the greatest of unit embeddings from open_clip's; transformers "
        "has weights of its own."
    )
