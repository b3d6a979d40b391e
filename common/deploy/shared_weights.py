"""The weights of several ONNX graphs in one file, in which what several graphs hold stands once.

The levels of a model have most of their weights in common, and each exported graph holds them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

_SMALL = 1024
"""Tensors of fewer bytes stay in the graph."""
_ALIGNED = 4096
"""Tensors begin at multiples of so many bytes where they are large, so that the file can be mapped into memory."""


def share_weights(graphs: Sequence[Path], weights: Path) -> None:
    """Move the weights of ONNX files into the new file ``weights`` in the same folder, and rewrite the graphs.

    Weights files of single graphs are removed. What the exporter noted about the source code, with paths of this
    machine, is dropped.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    places: dict[bytes, tuple[int, int]] = {}
    single: set[Path] = set()
    with weights.open("xb") as file:
        for path in graphs:
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                if uses_external_data(tensor):
                    single |= {path.parent / entry.value for entry in tensor.external_data if entry.key == "location"}
                    load_external_data_for_tensor(tensor, str(path.parent))
                _move(tensor, file, places, weights.name)
            _forget_sources(model.graph)
            del model.metadata_props[:]
            path.write_bytes(model.SerializeToString())
    for old in single:
        old.unlink()


def _move(tensor: TensorProto, file: BinaryIO, places: dict[bytes, tuple[int, int]], name: str) -> None:
    """Replace the content of a tensor by its place in the file, where it is written if it is not there yet."""
    import onnx
    from onnx import numpy_helper

    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    content = tensor.raw_data
    if len(content) < _SMALL:
        return
    key = sha256(content).digest()
    if key not in places:
        step = _ALIGNED if len(content) >= 2**20 else 64
        file.write(b"\0" * (-file.tell() % step))
        places[key] = file.tell(), len(content)
        file.write(content)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for field, value in zip(("location", "offset", "length"), (name, *places[key]), strict=True):
        tensor.external_data.add(key=field, value=str(value))


def _forget_sources(graph: GraphProto) -> None:
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
