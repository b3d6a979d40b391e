"""Exported graphs in fewer bits, held to the answers of the model in fp32 on labelled pictures.

Shapes: B images of a batch, M images in all, P levels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.deploy.calibration import Calibration, Outcomes, Wish, choose, thinned
from common.deploy.graphs import WEIGHTS, quiet
from common.deploy.runtime import EarlyExit, margins
from common.deploy.shared_weights import share_weights
from common.evaluate.accuracy import paired_difference
from common.evaluate.tasks import Settings, first
from common.progress import bar

if TYPE_CHECKING:
    from onnx import GraphProto

    from common.data.lookup import Labelled
    from common.deploy.model import Deployed


@dataclass(frozen=True)
class Reduction:
    """How to write graphs in fewer bits, and the pictures on which they must answer as the model does.

    dtype: "int8": the products of linear maps, with a scale for each output of a weight and one for each tensor of
        activations, chosen as it comes; attention, norms and the patch embedding stay in fp32.
        "fp16", "bf16": weights are stored in 16 bits, and everything is computed in fp32.
    data: of the classes of the export.  min_agreement: the least share of equal labels.
    """

    dtype: str
    data: Labelled
    min_agreement: float
    settings: Settings


def reduce_graphs(files: Sequence[Path], dtype: str) -> None:
    """Rewrite ONNX graphs and their shared weights in fewer bits; dtype: see ``Reduction``."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = files[0].parent
    with tempfile.TemporaryDirectory(dir=folder) as place:
        written = [Path(place) / file.name for file in files]
        for file, target in zip(files, written, strict=True):
            if dtype == "int8":
                # Only products with weights. 7 bits of a weight, since sums of 8 overflow on processors without VNNI.
                with quiet():
                    quantize_dynamic(
                        file,
                        target,
                        op_types_to_quantize=["MatMul", "Gemm"],
                        per_channel=True,
                        reduce_range=True,
                        weight_type=QuantType.QInt8,
                        use_external_data_format=True,
                        extra_options={"MatMulConstBOnly": True},
                    )
            else:
                model = onnx.load(file)
                _store(model.graph, dtype)
                onnx.save(model, target, save_as_external_data=True, location=f"{file.name}.data")
        share_weights(written, Path(place) / WEIGHTS)
        for path in (*written, Path(place) / WEIGHTS):
            path.replace(folder / path.name)


def _store(graph: GraphProto, dtype: str) -> None:
    """Hold the fp32 weights of a graph in 16 bits, which it casts back."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        if dtype == "fp16":
            content = values.astype(np.float16).tobytes()
        else:
            bits = values.view(np.uint32)
            content = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()  # to nearest, to even
        tensor.CopyFrom(TensorProto(name=f"{name}_{dtype}", data_type=kind, dims=tensor.dims, raw_data=content))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    nodes: list[onnx.NodeProto] = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def compare(deployed: Deployed, folder: Path, reduction: Reduction) -> tuple[dict[str, Any], Outcomes]:
    """The answers of the model and of an exported folder on the same pictures, by all levels; the folder's outcomes.

    ValueError: fewer labels agree than the reduction asks for, or the data has other classes than the folder.
    """
    runtime, data, settings = EarlyExit(folder), reduction.data, reduction.settings
    if list(data.class_names) != runtime.names:
        raise ValueError(
            f"the data has {len(data.class_names)} classes, and the export {len(runtime.names)}, or others; export "
            "those of the data, one a line in --labels-file"
        )
    keep = None if deployed.setting_name == "threshold" else deployed.setting()
    run = deployed.paths.runner(keep, torch.from_numpy(runtime.classes), deployed.scale)
    before, after, confidence, labels = [], [], [], []
    for batch in bar(
        first(data.loader(deployed.model.preprocess, settings.batch_size, settings.workers), settings.limit),
        "comparing",
    ):
        levels = [runtime.probabilities(z) for z in runtime.all_levels(batch["image"].numpy())]
        before.append(run(batch["image"])[0].argmax(-1))
        after.append(torch.from_numpy(np.stack([level.argmax(-1) for level in levels], axis=1)))
        confidence += [np.stack([margins(level) for level in levels[:-1]], axis=1)] if len(levels) > 1 else []
        labels.append(batch["label"])
    if not labels:
        raise ValueError("the data has no picture; check the path and the split")
    before, after, labels = torch.cat(before), torch.cat(after), torch.cat(labels)
    agreement = (before == after[:, -1]).double().mean().item()
    if agreement < reduction.min_agreement:
        raise ValueError(
            f"in {reduction.dtype} {100 * agreement:.2f} % of {len(labels):,} labels are those of the model, fewer "
            f"than {100 * reduction.min_agreement:g} %; take another --dtype, or accept that by --min-agreement"
        )
    correct = after == labels[:, None]
    result = {
        "pictures": len(labels),
        "agreement": agreement,
        "accuracy": [right.double().mean().item() for right in (before == labels, correct[:, -1])],
        "difference": paired_difference(correct[:, -1], before == labels),
    }
    certain = np.concatenate(confidence).astype(np.float64) if confidence else None
    return result, Outcomes(np.asarray(runtime.about["gmacs"] or [0.0] * runtime.levels), correct.numpy(), certain)


def recalibrated(calibration: Calibration, outcomes: Outcomes, prompts: str) -> Calibration:
    """The calibration for the same wish on the outcomes of the graphs. prompts: the hash of their classes."""
    wish = Wish(**calibration.wish)
    return replace(
        calibration,
        point=choose(outcomes, wish),
        curve=thinned(outcomes),
        pictures=len(outcomes.correct),
        prompts=prompts,
    )
