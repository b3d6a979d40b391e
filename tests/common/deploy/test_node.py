"""export.json is enough for another language: docs/early_exit.js answers in Node as the runtime does."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from common.deploy import graphs
from common.deploy.export import write_graphs
from common.deploy.model import load
from common.deploy.runtime import EarlyExit
from tests.common.towers import pictures, tiny_directory
from tests.readme import ROOT


def node(*words):
    """Run Node; its output as text."""
    return subprocess.run(["node", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of a tiny WaveCLIP of three levels."""
    if shutil.which("node") is None or node("-e", "require('onnxruntime-node')").returncode:
        # Its install script fetches libraries for GPUs; those for the CPU are in the package.
        pytest.skip("needs onnxruntime-node: npm install --ignore-scripts onnxruntime-node, its folder in NODE_PATH")
    place = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_seconds", lambda chain, images: 0.5)
        write_graphs(load(tiny_directory(place / "model", 2), device="cpu"), "onnx", place / "onnx", texts=False)
    return place / "onnx"


def test_node_gives_the_answers_of_the_runtime(folder, tmp_path):
    images, runtime = pictures(9).numpy(), EarlyExit(folder)
    images.astype("<f4").tofile(tmp_path / "images")
    first = np.sort(runtime.probabilities(runtime.all_levels(images)[0]), axis=1)
    threshold = float(np.median(first[:, -1] - first[:, -2])) + 1e-6
    for chosen in (threshold, None):
        run = node(ROOT / "docs/early_exit.js", folder, tmp_path / "images", *([] if chosen is None else [chosen]))
        assert run.returncode == 0, run.stderr
        answers, expected = [json.loads(line) for line in run.stdout.splitlines()], runtime(images, chosen)
        levels = [answer["level"] for answer in answers]
        assert levels == expected.levels.tolist() and (len(set(levels)) > 1) == (chosen is not None)
        best = expected.probabilities.argmax(1)
        assert [answer["label"] for answer in answers] == [runtime.names[place] for place in best]
        np.testing.assert_allclose([a["probability"] for a in answers], expected.probabilities.max(1), atol=1e-5)
