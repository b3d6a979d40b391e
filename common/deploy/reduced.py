"""Exported graphs in fewer bits, held to the answers of the model in fp32 on labelled pictures.

Shapes: B images of a batch, M images in all, P levels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.data.lookup import version_within
from common.deploy.calibration import Calibration, Outcomes, Wish, choose, thinned
from common.deploy.graphs import WEIGHTS, Graph, onnx_graph, quiet
from common.deploy.runtime import EarlyExit, margins
from common.deploy.shared_weights import share_weights
from common.evaluate.accuracy import paired_difference
from common.evaluate.tasks import Settings, pictures_of_each
from common.progress import bar

if TYPE_CHECKING:
    from onnx import GraphProto

    from common.data.lookup import Labelled
    from common.deploy.model import Deployed

STATIC = "int8-static"
_RANGE_PICTURES, _RANGE_BATCH = 256, 16
"""How many pictures choose the ranges of int8-static's activations, and how many of them run at a time."""


@dataclass(frozen=True)
class Reduction:
    """How to write graphs in fewer bits, and the pictures on which they must answer as the model does.

    dtype: "int8": the products of linear maps, with a scale for each output of a weight and one for each tensor of
        activations, chosen as it comes; attention, norms and the patch embedding stay in fp32.
        "int8-static": the same products, with activations' ranges fixed beforehand, on pictures drawn from ``data``.
        "fp16", "bf16": weights are stored in 16 bits, and everything is computed in fp32.
    data: of the classes of the export.  min_agreement: the least share of equal labels, at each level.
    name: of the data, which a calibration that is chosen again records.
    """

    dtype: str
    data: Labelled
    min_agreement: float
    settings: Settings
    name: str = ""


def reduce_graphs(chains: Sequence[Sequence[Path]], dtype: str, images: Sequence[Sequence[Tensor]] = ()) -> None:
    """Rewrite the ONNX graphs of a folder and their shared weights in fewer bits; dtype: see ``Reduction``.

    chains: graphs that run one after another; those of each model.
    images: for each chain, float [3,S,S] each, which choose the ranges of int8-static; a graph sees what the ones
        before it in its chain make of them in fp32.
    """
    folder = chains[0][0].parent
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        with quiet():
            if dtype == STATIC:
                for files, own in zip(chains, images, strict=True):
                    _write_all_static(files, place, own)
            else:
                for file in chain.from_iterable(chains):
                    _write(file, place / file.name, dtype)
        written = [place / file.name for file in chain.from_iterable(chains)]
        share_weights(written, place / WEIGHTS)
        for path in (*written, place / WEIGHTS):
            path.replace(folder / path.name)


def _write_all_static(files: Sequence[Path], place: Path, images: Sequence[Tensor]) -> None:
    """Write the graphs of a chain to the folder ``place``, each with the ranges of what it sees."""
    graphs = [onnx_graph(file) for file in files]
    for step, file in enumerate(files):
        _write_static(file, place / file.name, _inputs(graphs[:step], images))


def _write(file: Path, target: Path, dtype: str) -> None:
    if dtype == "int8":
        _write_dynamic(file, target)
    else:
        _write_stored(file, target, dtype)


_PRODUCTS = ["MatMul", "Gemm"]


def _linear_maps(graph: GraphProto) -> list[str]:
    """The nodes that multiply by a weight matrix.

    A stack of matrices, as in the patch embedding of a WaveCLIP, is left out: ONNX Runtime multiplies by no stack that
    has a scale for each output.
    """
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node.name for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in matrices]


def _write_dynamic(file: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # 7 bits of a weight, since sums of 8 overflow on processors without VNNI.
    quantize_dynamic(
        file,
        target,
        op_types_to_quantize=_PRODUCTS,
        nodes_to_quantize=_linear_maps(onnx.load(file, load_external_data=False).graph),
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _write_static(file: Path, target: Path, inputs: Iterator[tuple[Tensor, ...]]) -> None:
    """As ``_write_dynamic``, with the range of each activation that the graph's ``inputs`` give."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    graph = onnx.load(file, load_external_data=False).graph
    names = [value.name for value in graph.input]

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            tensors = next(inputs, None)
            return tensors and {name: x.contiguous().numpy() for name, x in zip(names, tensors, strict=True)}

    quantize_static(
        file,
        target,
        Reader(),
        op_types_to_quantize=_PRODUCTS,
        nodes_to_quantize=_linear_maps(graph),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        # Biases, norms and attention follow, all in fp32.
        extra_options={"OpTypesToExcludeOutputQuantization": _PRODUCTS},
    )


def _inputs(graphs: Sequence[Graph], images: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The inputs of the graph that comes after ``graphs``, some images at a time."""
    for start in range(0, len(images), _RANGE_BATCH):
        tensors: tuple[Tensor, ...] = (torch.stack(list(images[start : start + _RANGE_BATCH])),)
        for graph in graphs:
            tensors = graph(*tensors)[1:]
        yield tensors


def _write_stored(file: Path, target: Path, dtype: str) -> None:
    import onnx

    model = onnx.load(file)
    _store(model.graph, dtype)
    onnx.save(model, target, save_as_external_data=True, location=f"{file.name}.data")


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


def draw(deployed: Deployed, reduction: Reduction) -> dict[int, list[Tensor]]:
    """Pictures that choose the ranges of int8-static, evenly at random, by their places in the data.

    A picture is an image [3,S,S] for each of the model's ``members``. At most half of the data is drawn, since the
    others are what ``compare`` is for. ValueError: fewer than two pictures.
    """
    random, kept, seen = np.random.default_rng(0), {}, 0
    for images, _ in _pictures(deployed, reduction, "drawing"):
        for views in zip(*images, strict=True):  # after n pictures each of them is kept with the same chance
            slot = seen if seen < _RANGE_PICTURES else int(random.integers(seen + 1))
            if slot < _RANGE_PICTURES:
                kept[slot] = seen, [image.clone() for image in views]
            seen += 1
    if seen < 2:
        raise ValueError(f"the data has {seen} picture(s), and {STATIC} needs two: for ranges, and for the comparison")
    return dict(kept[slot] for slot in random.permutation(len(kept))[: seen // 2])


def _pictures(
    deployed: Deployed, reduction: Reduction, what: str, left_out: Collection[int] = ()
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Images [B,3,S,S] for each of ``members`` and labels [B] of the data, without the places ``left_out``."""
    start = 0
    for images, labels in bar(pictures_of_each(deployed.preprocesses, reduction.data, reduction.settings), what):
        end = start + len(labels)
        rows = [place - start for place in range(start, end) if place not in left_out]
        start = end
        if rows:
            yield [x[rows] for x in images], labels[rows]


def check_classes(reduction: Reduction, names: Sequence[str]) -> None:
    """ValueError: the data has other classes than an export's ``names``."""
    classes = list(reduction.data.class_names)
    if classes != list(names):
        raise ValueError(
            f"the data has {len(classes)} classes, and the export {len(names)}, or others; export those of the data, "
            "one a line in --labels-file"
        )


def compare(
    deployed: Deployed, folder: Path, reduction: Reduction, left_out: Collection[int] = ()
) -> tuple[dict[str, Any], Outcomes]:
    """The answers of the model and of an exported folder on the same pictures at every level; the folder's outcomes.

    The levels of a cascade are its two models, so neither may change its answers behind the other one.
    left_out: places of pictures in the data that chose the ranges.
    ValueError: fewer labels of a level agree than the reduction asks for.
    """
    runtime = EarlyExit(folder)
    guess = _guesses(deployed, [torch.from_numpy(member.classes) for member in runtime.members])
    before, after, confidence, labels = [], [], [], []
    for images, truth in _pictures(deployed, reduction, "comparing", left_out):
        embedded = runtime.all_levels([x.numpy() for x in images])
        levels = [runtime.probabilities(z, level) for level, z in enumerate(embedded)]
        before.append(guess(images))
        after.append(torch.from_numpy(np.stack([level.argmax(-1) for level in levels], axis=1)))
        confidence += [np.stack([margins(level) for level in levels[:-1]], axis=1)] if len(levels) > 1 else []
        labels.append(truth)
    if not labels:
        raise ValueError("the data has no picture; check the path and the split")
    before, after, labels = torch.cat(before), torch.cat(after), torch.cat(labels)
    agreements = (before == after).double().mean(0).tolist()
    if min(agreements) < reduction.min_agreement:
        level = f" at level {agreements.index(min(agreements))}" if len(agreements) > 1 else ""
        raise ValueError(
            f"in {reduction.dtype} {100 * min(agreements):.2f} % of {len(labels):,} labels{level} are those of the "
            f"model, fewer than {100 * reduction.min_agreement:g} %; take another --dtype, or accept that by "
            "--min-agreement"
        )
    was_correct, correct = before == labels[:, None], after == labels[:, None]
    compared = [
        {
            "agreement": agreement,
            "accuracy": [right.double().mean().item() for right in (was, now)],
            "difference": paired_difference(now, was),
        }
        for agreement, was, now in zip(agreements, was_correct.T, correct.T, strict=True)
    ]
    certain = np.concatenate(confidence).astype(np.float64) if confidence else None
    costs = np.asarray(runtime.about["gmacs"] or [0.0] * runtime.levels)
    return {"pictures": len(labels), "levels": compared}, Outcomes(costs, correct.numpy(), certain)


def _guesses(deployed: Deployed, classes: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """The model's answers at every level of its export, long [B,P], as a function of images for each of ``members``.

    classes: class embeddings [C,E] of each of ``members``.
    """
    if deployed.setting_name == "threshold":
        observe = deployed.observer(classes)
        return lambda images: observe(*images)[0].argmax(-1).T
    run = deployed.runner(deployed.setting(), classes)
    return lambda images: run(*images)[0].argmax(-1)[:, None]


def recalibrated(
    calibration: Calibration, outcomes: Outcomes, prompts: str, reduction: Reduction, at: Mapping[str, Any]
) -> Calibration:
    """The calibration for the same wish on the outcomes of the graphs.

    prompts: the hash of their classes.  at: the conditions of the export.
    """
    wish, data, limit = Wish(**calibration.wish), reduction.data, reduction.settings.limit
    seen = {"data": reduction.name, "split": data.split, "data_version": version_within(data, limit), "limit": limit}
    return replace(
        calibration,
        point=choose(outcomes, wish),
        curve=thinned(outcomes),
        pictures=len(outcomes.correct),
        prompts=prompts,
        conditions={**calibration.conditions, **at, **seen, "dtype": reduction.dtype},
    )
