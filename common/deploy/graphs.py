"""Stages as ONNX or torch.export graphs: exporting, running, and comparing them with their modules.

Shapes: B images, S image size.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from common.deploy.shared_weights import share_weights
from common.progress import bar
from common.stages import Stage, inputs_of, run_chain

Graph = Callable[..., tuple[Tensor, ...]]
"""An exported stage: flat tensors in, flat tensors out."""

_EXAMPLE = 2
"""The batch size of the example inputs; the exporter would treat 1 as a constant."""
_MEASURED = 0.5
"""The least time in seconds for which each chain is timed."""


WEIGHTS = "weights.bin"
"""The file of the weights of all ONNX graphs of one folder."""


@torch.no_grad()
def export_stages(chains: Sequence[tuple[Sequence[Stage], int]], form: str, files: Sequence[Path]) -> list[Graph]:
    """Write each stage's graph, for any batch size, to its file and read it back.

    chains: stages that run one after another, with the size of the images that the first of them reads; files and
        graphs follow in their order.
    form: "onnx" or "torch-export". ONNX graphs share one file of weights in the folder of the first.
    ValueError: a package is missing, or a stage cannot be exported, with the reason.
    """
    if form == "onnx":
        need_onnx()
    jobs = [
        (stage, given)
        for stages, size in chains
        for stage, given in zip(stages, inputs_of(stages, torch.randn(_EXAMPLE, 3, size, size)), strict=True)
    ]
    for (stage, given), file in bar(list(zip(jobs, files, strict=True)), "exporting"):
        try:
            _export(stage, given, form, file)
        except Exception as error:  # exporters raise their own types, RuntimeError, KeyError, ...
            other = "; --format torch-export has more operations" if form == "onnx" else ""
            raise ValueError(f"{stage.name} cannot be exported as {form}: {reason(error)}{other}") from error
    if form == "onnx" and files:
        share_weights(files, files[0].parent / WEIGHTS)
    return [onnx_graph(file) if form == "onnx" else torch.export.load(file).module() for file in files]


def reason(error: BaseException) -> str:
    """The first line of the error that an exporter failed with originally, without colour codes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    return next(filter(None, lines), type(error).__name__)


def _export(stage: Stage, given: tuple[Tensor, ...], form: str, file: Path) -> None:
    batch, shapes = torch.export.Dim("batch"), torch.export.ShapesCollection()
    for tensor in given:
        shapes[tensor] = {0: batch}
    if form == "onnx":
        write_onnx(stage, given, shapes, file)
    else:
        with quiet():
            torch.export.save(torch.export.export(stage.module, given, dynamic_shapes=shapes), file)


def write_onnx(stage: Stage, given: tuple[Tensor, ...], shapes: Any, file: Path) -> None:
    """Write a module's ONNX graph, with its weights beside it. shapes: dynamic ones, as of ``torch.export``."""
    names = {"input_names": list(stage.inputs), "output_names": list(stage.outputs)}
    with quiet():
        program = torch.export.export(stage.module, given, dynamic_shapes=shapes)
        settings = {"external_data": True, "verbose": False, "dynamo": True}
        torch.onnx.export(program, (), str(file), custom_translation_table=_translations(), **settings, **names)


def _translations() -> dict[Callable, Callable]:
    """ONNX translations of operations that torch's exporter does not know."""
    from onnxscript import opset18

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # TopK puts the lower index first where values are equal, so it is stable.
        size = opset18.Gather(opset18.Shape(x), opset18.Constant(value_ints=[dim]))
        return opset18.TopK(x, size, axis=dim, largest=descending, sorted=True)

    return {torch.ops.aten.sort.stable: stable_sort}


def onnx_graph(file: Path) -> Graph:
    """An ONNX file as a function of tensors. onnxruntime runs it on the CPU with torch's number of threads."""
    import onnxruntime

    from common.deploy.sessions import session_options

    options = session_options(torch.get_num_threads())
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensor.contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, given)))

    return run


@torch.no_grad()
def parity(stages: Sequence[Stage], graphs: Sequence[Graph], image_size: int, batches: Sequence[int]) -> float:
    """The greatest difference of any output between the chain of graphs and the chain of the stages' modules."""
    generator, greatest = torch.Generator().manual_seed(0), 0.0
    for batch in batches:
        images = torch.randn(batch, 3, image_size, image_size, generator=generator)
        expected, exported = run_chain([stage.module for stage in stages], images), run_chain(graphs, images)
        for expected_outputs, outputs in zip(expected, exported, strict=True):
            for x, y in zip(expected_outputs, outputs, strict=True):
                assert x.shape == y.shape, f"{tuple(x.shape)} and {tuple(y.shape)}"
                greatest = max(greatest, (x - y).abs().max().item())
    return greatest


@torch.no_grad()
def rates(
    stages: Sequence[Stage], graphs: Sequence[Graph], image_size: int, batches: Sequence[int]
) -> dict[str, dict[int, tuple[float, float]]]:
    """Images/s of the model's modules and of the graphs, by the last stage of the path and by batch size."""
    result: dict[str, dict[int, tuple[float, float]]] = {}
    for last, stage in enumerate(stages, 1):
        result[stage.name] = {}
        for batch in batches:
            images = torch.randn(batch, 3, image_size, image_size)
            chains: tuple[Sequence[nn.Module | Graph], ...] = [s.module for s in stages[:last]], graphs[:last]
            result[stage.name][batch] = tuple(batch / _seconds(chain, images) for chain in chains)
    return result


def _seconds(chain: Sequence[nn.Module | Graph], images: Tensor) -> float:
    """The median duration of a chain over at least half a second, after a warm-up."""
    run_chain(chain, images)
    taken: list[float] = []
    while sum(taken) < _MEASURED:
        start = time.perf_counter()
        run_chain(chain, images)
        taken.append(time.perf_counter() - start)
    return median(taken)


def need_onnx(*others: str) -> None:
    """ValueError: a package that ONNX graphs need, or another one, is missing."""
    for name in ("onnx", "onnxruntime", "onnxscript", *others):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--format onnx needs {name}: pip install '.[export]' in the checkout, or take --format torch-export"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings and log messages."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
