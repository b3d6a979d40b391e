"""A tiny WaveCLIP and its export, which several files read and none changes."""

import pytest

from common.deploy import graphs
from common.deploy.export import write_graphs
from common.deploy.model import load
from tests.common.towers import tiny_directory


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny WaveCLIP of two levels."""
    return load(tiny_directory(tmp_path_factory.mktemp("wave") / "model"), device="cpu")


@pytest.fixture(scope="session")
def folder(model):
    """Its export as ONNX in fp32, with its text tower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_seconds", lambda chain, images: 0.5)
        write_graphs(model, "onnx", model.model.folder / "onnx")
    return model.model.folder / "onnx"
