"""One exported folder with a graph for each of several keep rates, on one file of weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.adaptive import paths_of
from common.cli import main
from common.clip import CLIP
from common.deploy import graphs, predict
from common.deploy.export import lines, write_graphs
from common.deploy.model import Deployed
from common.deploy.runtime import EarlyExit
from common.models import Model
from common.preprocess import Preprocess
from tests.common.towers import NAMES, AttendedTower, pictures, tiny_directory


@pytest.fixture(scope="module")
def tower():
    """A tiny tower that keeps half of its tokens."""
    torch.manual_seed(0)
    return AttendedTower(CLIP.tiny().eval().image_tower, 0.5)


@pytest.fixture(scope="module")
def report(tower, tmp_path_factory):
    """What its export at two further keep rates says; the folder's name is under "folder"."""
    model = Model("kept", "kept", Preprocess(32), tower, CLIP.tiny().eval(), {"image": "a", "text": "b"}, {})
    folder = tmp_path_factory.mktemp("kept") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_seconds", lambda chain, images: 0.5)
        report = write_graphs(Deployed(model, NAMES, ["a {}"]), "onnx", folder, texts=False, keep=[1.0, 0.25, 0.5])
    return report | {"folder": folder}


@torch.no_grad()
def test_every_rate_answers_as_the_model_at_that_rate(tower, report):
    assert report["setting"] == {"keep": 0.5} and len(report["stages"]) == 1
    images = pictures(5)
    for keep in (None, 0.25, 0.5, 1.0):
        expected = tower.at(keep or 0.5).encode_image(images)
        found = EarlyExit(report["folder"], keep=keep).all_levels(images.numpy())[-1]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    half, whole = (tower.at(keep).encode_image(images) for keep in (0.5, 1.0))
    assert not torch.allclose(half, whole, atol=1e-2), "it prunes"


def test_a_rate_costs_a_graph_and_no_weights(tower, report):
    rates, paths = report["keep_rates"], paths_of(tower)
    assert report["gmacs"] == [pytest.approx(paths.costs(32)[paths.rates.index(0.5)])]
    assert [(entry["keep"], entry["file"]) for entry in rates] == [
        (0.25, "keep_0.25.onnx"), (0.5, "image.onnx"), (1.0, "keep_1.onnx")
    ]  # fmt: skip
    costs = [entry["gmacs"] for entry in rates]
    assert costs == sorted(costs) and costs[1] == report["gmacs"] and costs[0] < costs[2]
    weights = sum(parameter.nbytes for parameter in tower.parameters())
    assert (report["folder"] / "weights.bin").stat().st_size < 1.1 * weights
    assert lines(report)[0].startswith("3 graph(s)") and "to keep_0.25" in "\n".join(lines(report))


def test_predict_takes_a_rate_of_the_folder_and_names_them_otherwise(report, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    line = [str(tmp_path / "red.png"), "--folder", str(report["folder"]), "--jsonl"]
    assert predict.main([*line, "--keep", "0.25"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["gmacs"] == pytest.approx(report["keep_rates"][0]["gmacs"][0])
    assert "every picture takes the whole way, at keep rate 0.25" in printed.err
    assert predict.main([*line, "--keep", "0.3"]) == 1
    assert "keep 0.3: this folder has the rates 0.25, 0.5, 1.0; `effclip export" in capsys.readouterr().err


def test_a_budget_takes_the_greatest_rate_within_it(report, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    line = [str(tmp_path / "red.png"), "--folder", str(report["folder"]), "--jsonl", "--gmacs"]
    quarter, half, whole = (entry["gmacs"][0] for entry in report["keep_rates"])
    for budget, expected in ((quarter, quarter), ((half + whole) / 2, half), (2 * whole, whole)):
        assert predict.main([*line, str(budget)]) == 0
        assert json.loads(capsys.readouterr().out)["gmacs"] == pytest.approx(expected)
    assert predict.main([*line, str(quarter / 2)]) == 1
    assert f"a picture costs {quarter:.4g} GMACs at least, at keep rate 0.25" in capsys.readouterr().err


def test_a_model_without_a_rate_is_told_so(tmp_path, capsys):
    folder = str(tiny_directory(tmp_path / "model"))
    for line, message in (
        (["--format", "torch-export", "--keep", "0.5"], "several keep rates in one folder are of onnx"),
        (["--format", "onnx", "--keep", "0.5"], "has no keep rate to choose; leave it out"),
    ):
        assert main(["export", folder, *line]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", [0.0, 1.5, float("nan")])
def test_a_rate_is_a_share(rate, tower, tmp_path):
    model = Model("kept", "kept", Preprocess(32), tower, CLIP.tiny().eval(), {"image": "a", "text": "b"}, {})
    with pytest.raises(ValueError, match=r"--keep .* must be a share of the tokens in \(0, 1\]"):
        write_graphs(Deployed(model, NAMES, ["a {}"]), "onnx", tmp_path / "x", keep=[rate])
