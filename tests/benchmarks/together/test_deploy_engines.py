"""The engines that run deployed models: which are there, how large a model is for them, and their programs."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from benchmarks.together.deploy_engines import (
    REFERENCE,
    REFERENCE_INT8,
    Engine,
    Prepared,
    _openvino_program,
    engines,
    first_answers,
)
from common.deploy.model import load
from tests.common.towers import NAMES, pictures, small_directory, tiny_directory


def test_every_engine_is_there_or_named_as_missing(monkeypatch):
    monkeypatch.setattr("benchmarks.together.deploy_engines.installed", lambda name: False)
    monkeypatch.delenv("COMPILE", raising=False)
    found, missing = engines()
    assert next(iter(found)) == REFERENCE and REFERENCE_INT8 in found and "ONNX Runtime int8-static" in found
    assert {"torch.compile", "torchao", "OpenVINO"} <= set(missing)


@pytest.mark.parametrize("multiplies", [True, False])
def test_torchao_runs_where_the_processor_multiplies_in_int8(monkeypatch, multiplies):
    monkeypatch.setattr("benchmarks.together.deploy_engines.installed", lambda name: True)
    monkeypatch.setattr("benchmarks.together.deploy_engines.INT8_PRODUCTS", multiplies)
    found, missing = engines()
    assert ("PyTorch int8, torchao" in found) is multiplies
    assert missing.get("torchao") == (None if multiplies else "a processor that multiplies in int8")


def test_first_answers_are_measured_in_a_process_of_their_own(tmp_path):
    def engine(program):
        return Engine(lambda prepared: [], lambda prepared: 0, program)

    found = first_answers(engine(lambda prepared, picture: f"print({picture!r})\n"), None, tmp_path / "a.png")
    assert found["seconds"] > 0 and 2**20 < found["peak_bytes"] < 2**26, "not that of this process, which has torch"
    assert first_answers(engine(None), None, tmp_path) is None
    with pytest.raises(ValueError, match="NameError: name 'gone' is not defined"):
        first_answers(engine(lambda *_: "gone\n"), None, tmp_path)


def test_a_models_size_on_pytorch_is_that_of_its_image_tower(tmp_path):
    deployed = load(tiny_directory(tmp_path / "model", 0), device="cpu")
    prepared = Prepared.of(deployed, {}, NAMES[:2], tmp_path)
    values = sum(parameter.numel() for parameter in deployed.model.images.image_tower.parameters())
    assert engines()[0][REFERENCE].size(prepared) == 4 * values


@pytest.fixture
def cascade(tmp_path):
    """A small model before a larger one, of which nothing is exported."""
    options = {"model": str(tiny_directory(tmp_path / "big", 0)), "first": small_directory(tmp_path / "small")}
    return Prepared.of(load(**options, device="cpu"), options, NAMES[:2], tmp_path)


def test_a_cascade_has_the_size_of_both_its_models(cascade, tmp_path):
    alone = [
        engines()[0][REFERENCE].size(Prepared.of(load(name, device="cpu"), {}, NAMES[:2], tmp_path))
        for name in cascade.options.values()
    ]
    assert engines()[0][REFERENCE].size(cascade) == sum(alone)


def test_a_cascade_starts_in_a_process_of_its_own(cascade, tmp_path):
    Image.effect_noise((32, 32), 64).convert("RGB").save(tmp_path / "picture.png")
    assert first_answers(engines()[0][REFERENCE], cascade, tmp_path / "picture.png")["seconds"] > 0


def test_another_process_loads_a_model_only_where_an_engine_asks_for_it(cascade, tmp_path, monkeypatch):
    again = pickle.loads(pickle.dumps(cascade))
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.together.deploy_engines.load", lambda **_: pytest.fail("it is loaded"))
        assert again.files("fp32") == cascade.files("fp32") and again.scale == cascade.scale
    assert len(again.stages) == 2


def test_the_first_model_of_a_cascade_is_itself_in_the_cascades_folder(cascade, tmp_path):
    first = pickle.loads(pickle.dumps(cascade.first))
    assert first.files("int8") == [tmp_path / "int8/level_0.onnx"] == cascade.files("int8")[:1]
    images = pictures(3, size=16)
    (stage,), small = first.stages, load(cascade.options["first"], device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(stage.module(images)[0], small.model.images.encode_image(images))


def test_the_program_of_openvino_begins_anew_with_each_model(cascade, tmp_path, monkeypatch):
    """A stand-in for openvino records what each file is run on; each graph gives z and what a next level would need."""
    ran = []

    class Request:
        def __init__(self, file):
            self.file = Path(file).name

        def infer(self, tensors):
            ran.append((self.file, [tensor.shape for tensor in tensors]))
            return {"z": numpy.zeros(1), "state": numpy.zeros((32, 7))}

    core = SimpleNamespace(compile_model=lambda file, *_: SimpleNamespace(create_infer_request=lambda: Request(file)))
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr("benchmarks.together.deploy_engines.openvino_settings", lambda dtype: {})
    exec(_openvino_program(cascade, "fp32", torch.float32), {})
    assert ran == [("level_0.onnx", [(32, 3, 16, 16)]), ("level_1.onnx", [(32, 3, 32, 32)])]
    wave = Prepared.of(load(tiny_directory(tmp_path / "wave"), device="cpu"), {}, NAMES[:2], tmp_path)
    ran.clear()
    exec(_openvino_program(wave, "fp32", torch.float32), {})
    assert ran == [("level_0.onnx", [(32, 3, 32, 32)]), ("level_1.onnx", [(32, 7)])], "levels follow one another"
