"""A deployed model's stages on every engine that is installed here, all called alike.

Shapes: B images, S pixels, E joint dim.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.speed.engines import installed, openvino_graph, openvino_settings
from common.deploy.export import own_chains, write_graphs
from common.deploy.graphs import WEIGHTS, Graph, onnx_graph
from common.deploy.model import Deployed, load
from common.deploy.reduced import STATIC, reduce_graphs
from common.inference import BF16_PRODUCTS
from common.stages import Stage

REFERENCE, REFERENCE_INT8 = "PyTorch fp32", "ONNX Runtime int8"
PROMPT = ["{}"]
"""The template of the two classes of ``Prepared``."""
FOLDERS = ("fp32", "int8", STATIC)
INT8_PRODUCTS = torch.cpu._is_vnni_supported()
"""Whether this processor multiplies in int8. Where it does not, PyTorch's product of int8 matrices is a plain loop and
takes tens of times as long as that of fp32."""


@dataclass(frozen=True)
class Prepared:
    """A model with its exported folders, one for each of FOLDERS.

    Its pickle is without the model: another process loads that anew, and only where an engine asks for it.

    options: arguments of ``load`` that give it again.  labels: two class names that its text tower can spell.
    names: of its graphs in the folders.  scale: the model's logit scale.
    """

    options: dict[str, Any]
    labels: Sequence[str]
    folder: Path
    names: Sequence[str]
    scale: float

    @classmethod
    def of(
        cls,
        deployed: Deployed,
        options: dict[str, Any],
        labels: Sequence[str],
        folder: Path,
        names: Sequence[str] | None = None,
    ) -> Prepared:
        """Of a model that is loaded. names: None: those of its stages."""
        if names is None:
            names = [stage.name for stages, _ in own_chains(deployed, deployed.setting()) for stage in stages]
        prepared = cls(options, labels, folder, names, deployed.scale)
        prepared.__dict__["deployed"] = deployed
        return prepared

    @cached_property
    def deployed(self) -> Deployed:
        """The model, loaded where it is not."""
        return load(**self.options, device="cpu")

    def forget(self) -> None:
        """Let go of the model; whoever asks for it loads it anew."""
        self.__dict__.pop("deployed", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "deployed"}

    @property
    def stages(self) -> list[Stage]:
        """Its stages, at the setting that it is exported at; of a cascade those of both models."""
        return [stage for stages, _ in self._chains for stage in stages]

    def files(self, dtype: str) -> list[Path]:
        """The graphs of one exported folder."""
        return [self.folder / dtype / f"{name}.onnx" for name in self.names]

    def chains(self, dtype: str) -> list[tuple[list[Path], int]]:
        """The graphs of each model, which run one after another, with the size of its images."""
        files = iter(self.files(dtype))
        return [(list(islice(files, len(stages))), size) for stages, size in self._chains]

    @property
    def first(self) -> Prepared:
        """The first model of a cascade by itself; its graph is in the cascade's folders."""
        options, names = {"model": self.options["first"]}, self.names[:1]
        return Prepared.of(self.deployed.first, options, self.labels, self.folder, names)

    @property
    def _chains(self) -> list[tuple[Sequence[Stage], int]]:
        return own_chains(self.deployed, self.deployed.setting())


def prepare(
    deployed: Deployed, options: dict[str, Any], labels: Sequence[str], folder: Path, images: Sequence[Sequence[Tensor]]
) -> Prepared:
    """Export a model to ``folder`` in every dtype of FOLDERS.

    images: for each of its ``members``, [3,S,S] each, which choose the ranges of int8-static.
    """
    folder.mkdir(parents=True)
    prepared = Prepared.of(deployed, options, labels, folder)
    write_graphs(deployed, "onnx", folder / "fp32", labels, PROMPT, texts=False)
    for dtype in FOLDERS[1:]:
        shutil.copytree(folder / "fp32", folder / dtype)
        reduce_graphs([files for files, _ in prepared.chains(dtype)], dtype, images)
    return prepared


@dataclass(frozen=True)
class Engine:
    """What runs a model's stages.

    graphs: makes the stages' functions, in any process that gets it as a pickle.
    size: bytes of the weights that it reads.
    program: Python that answers 32 pictures by all levels in a process of its own; None: there is no such command.
    own_threads: whether it computes with threads of its own instead of torch's.
    """

    graphs: Callable[[Prepared], list[Graph]]
    size: Callable[[Prepared], int]
    program: Callable[[Prepared, str], str] | None = None
    own_threads: bool = False


def engines() -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines that run here by name, the reference first, and how to get each of the others."""
    found = {REFERENCE: _torch(torch.float32, program="float32")}  # a deployed model's linear maps are packed already
    missing = {}
    if BF16_PRODUCTS:
        found["PyTorch bf16"] = _torch(torch.bfloat16, program="bfloat16")
    else:
        missing["bf16"] = "a processor that multiplies in bf16"
    if os.environ.get("COMPILE", "0") not in ("", "0"):
        found["PyTorch fp32, compiled"] = _torch(torch.float32, _compiled)
    else:
        missing["torch.compile"] = "COMPILE=1 and a C++ compiler"
    if installed("torchao") and INT8_PRODUCTS:
        found["PyTorch int8, torchao"] = _torch(torch.float32, _torchao, bytes_of_linear=1)
    else:
        missing["torchao"] = "pip install torchao" if INT8_PRODUCTS else "a processor that multiplies in int8"
    for dtype in FOLDERS:
        found[f"ONNX Runtime {dtype}"] = Engine(partial(_onnx, dtype), _folder_size(dtype), _onnx_program(dtype), True)
    if installed("openvino"):
        for name, folder, dtype in (("fp32", "fp32", torch.float32), ("bf16", "fp32", torch.bfloat16)):
            if dtype == torch.float32 or BF16_PRODUCTS:
                found[f"OpenVINO {name}"] = _openvino(folder, dtype)
        found["OpenVINO int8"] = _openvino(STATIC, torch.float32)
    else:
        missing["OpenVINO"] = "pip install openvino"
    return found, missing


def _torch(
    dtype: torch.dtype,
    change: Callable[[nn.ModuleList], Sequence[nn.Module]] = list,
    program: str | None = None,
    bytes_of_linear: int | None = None,
) -> Engine:
    """Modules in one dtype.

    change: applied to the stages, which share their parts.  program: the dtype of `effclip classify`, if it runs this
    way.  bytes_of_linear: of a weight of an ``nn.Linear``; None: as in ``dtype``.
    """

    def size(prepared: Prepared) -> int:
        models = [member.model.images for member in prepared.deployed.members]
        towers = nn.ModuleList([getattr(images, "image_tower", images) for images in models])
        total = dtype.itemsize * sum(parameter.numel() for parameter in towers.parameters())
        linear = sum(module.weight.numel() for module in towers.modules() if isinstance(module, nn.Linear))
        return total if bytes_of_linear is None else total - (dtype.itemsize - bytes_of_linear) * linear

    return Engine(
        partial(_modules, dtype, change),
        size,
        None if program is None else lambda *given: _torch_program(program, *given),
    )


def _modules(
    dtype: torch.dtype, change: Callable[[nn.ModuleList], Sequence[nn.Module]], prepared: Prepared
) -> list[Graph]:
    modules = copy.deepcopy(nn.ModuleList([stage.module for stage in prepared.stages])).to(dtype)
    return [_cast(module, dtype) for module in change(modules)]


def _cast(module: nn.Module, dtype: torch.dtype) -> Graph:
    return lambda *tensors: tuple(module(*(tensor.to(dtype) for tensor in tensors)))


def _compiled(modules: nn.ModuleList) -> list[nn.Module]:
    return [torch.compile(module, dynamic=True) for module in modules]


def _torchao(modules: nn.ModuleList) -> nn.ModuleList:
    """Every ``nn.Linear`` with weights in int8 and activations quantised as they come, in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def plain(module: nn.Module, name: str) -> bool:  # levels share their maps, which are quantised once
        return isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter

    quantize_(modules, Int8DynamicActivationInt8WeightConfig(), filter_fn=plain)
    return modules


def _onnx(dtype: str, prepared: Prepared) -> list[Graph]:
    return [onnx_graph(file) for file in prepared.files(dtype)]


def _openvino(folder: str, dtype: torch.dtype) -> Engine:
    return Engine(
        partial(_openvino_graphs, folder, dtype),
        _folder_size(folder),
        lambda prepared, _: _openvino_program(prepared, folder, dtype),
        own_threads=True,
    )


def _openvino_graphs(folder: str, dtype: torch.dtype, prepared: Prepared) -> list[Graph]:
    return [openvino_graph(file, dtype) for file in prepared.files(folder)]


def _folder_size(dtype: str) -> Callable[[Prepared], int]:
    """The bytes of graphs and weights."""
    return lambda prepared: sum(
        file.stat().st_size for file in (*prepared.files(dtype), prepared.folder / dtype / WEIGHTS)
    )


def _torch_program(dtype: str, prepared: Prepared, picture: str) -> str:
    given = {**prepared.options, "device": "cpu", "dtype": dtype}
    classes = f"{list(prepared.labels)!r}, templates={PROMPT!r}"
    return (
        "import torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from common.deploy.model import load\n"
        f"load(**{given!r}).classify([{picture!r}] * 32, {classes}, gmacs=float('inf'), batch_size=32)\n"
    )


def _onnx_program(dtype: str) -> Callable[[Prepared, str], str]:
    return lambda prepared, picture: (
        "from common.deploy.runtime import EarlyExit\n"
        f"model = EarlyExit({str(prepared.folder / dtype)!r}, threads={torch.get_num_threads()})\n"
        f"list(model.classify([{picture!r}] * 32, threshold=2, batch_size=32))\n"
    )


def _openvino_program(prepared: Prepared, folder: str, dtype: torch.dtype) -> str:
    chains = [([str(file) for file in files], size) for files, size in prepared.chains(folder)]
    return (
        "import numpy, openvino\n"
        "core = openvino.Core()\n"
        f"for files, size in {chains!r}:\n"
        "    tensors = [numpy.zeros((32, 3, size, size), numpy.float32)]\n"
        "    for file in files:\n"
        f"        request = core.compile_model(file, 'CPU', {openvino_settings(dtype)!r}).create_infer_request()\n"
        "        _, *tensors = request.infer(tensors).values()\n"
    )


# A process begins with its parent's ru_maxrss, but with a VmHWM of its own, which Linux has.
_PEAK = """
import os, re, resource, sys
if os.path.exists("/proc/self/status"):
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def ending(code: int) -> str:
    """An exit code of a process in words; a negative one is a signal's number."""
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


def first_answers(engine: Engine, prepared: Prepared, picture: Path) -> dict[str, float] | None:
    """Seconds from the start of a process to its answers for 32 pictures, and its peak memory in bytes.

    None: the engine has no program. ValueError: the program failed.
    """
    if engine.program is None:
        return None
    script, start = engine.program(prepared, str(picture)) + _PEAK, time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise ValueError(f"ended with {ending(done.returncode)}; it said last: {said[-1]}")
    return {"seconds": seconds, "peak_bytes": int(done.stdout.splitlines()[-1])}
