"""`effclip export`: graphs that give what the model gives, for batches they were not made from."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.adaptive import paths_of
from common.cli import main
from common.clip import CLIP
from common.deploy import graphs
from common.deploy.export import TOLERANCE, write_graphs
from common.deploy.model import Deployed, load
from common.deploy.text_export import write_texts
from common.models import Model
from common.preprocess import Preprocess
from common.stages import run_chain
from tests.common.towers import NAMES, AttendedTower, pictures, tiny_directory

measured = graphs._seconds  # before the fixture below stands in for it
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Speed is measured once in a while, not in tests."""
    monkeypatch.setattr(graphs, "_seconds", lambda chain, images: 0.5)


def loaded(report, folder):
    """The graphs of an export folder, read by their own runtimes."""
    files = [folder / stage["file"] for stage in report["stages"]]
    if report["format"] == "onnx":
        return [graphs.onnx_graph(file) for file in files]
    return [torch.export.load(file).module() for file in files]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("levels", [0, 2])
def test_a_directory_becomes_one_graph_a_level(tmp_path, form, levels, capsys):
    folder = tiny_directory(tmp_path / "model", levels)
    assert main(["export", str(folder), "--format", form, *["--no-text"] * (form == "onnx")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / form / "export.json").read_text())
    names = [f"level_{step}" for step in range(levels + 1)] if levels else ["image"]
    assert [stage["file"] for stage in report["stages"]] == [name + FORMATS[form] for name in names]
    assert report["difference"] <= TOLERANCE and "images/s" in printed and "to " + names[-1] in printed
    assert "left out: the text tower" in printed and ("the loop over levels" in printed) == (
        levels > 0 and form != "onnx"
    )
    model = load(folder, device="cpu")
    own, exported = [stage.module for stage in model.paths.stages(None)], loaded(report, folder / form)
    for batch in (1, 2, 5):
        for expected, found in zip(*(run_chain(chain, pictures(batch)) for chain in (own, exported)), strict=True):
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, atol=TOLERANCE, rtol=0)
    assert report["gmacs"] == pytest.approx(model.costs)
    classes = np.load(folder / form / "classes.npy", allow_pickle=False)
    assert report["class_names"] == NAMES and report["logit_scale"] == pytest.approx(model.scale.item())
    images = pictures(4)
    z = run_chain(exported, images)[-1][0].numpy()
    scores = model.paths.runner(None, torch.from_numpy(classes), model.scale)(images)[0].numpy()
    logits = report["logit_scale"] * z @ classes.T
    odds = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), scores, atol=TOLERANCE)


def deployed(model, kind):
    """A model that no directory holds."""
    clip = CLIP.tiny().eval()
    return Deployed(Model(kind, kind, Preprocess(32), model, clip, {"image": "a", "text": "b"}, {}), NAMES, ["a {}"])


@torch.no_grad()
def test_a_pruned_tower_at_its_keep_rate(tmp_path):
    """As torch-export; ``test_keep_rates`` has the ONNX graph."""
    torch.manual_seed(0)
    tower = AttendedTower(CLIP.tiny().eval().image_tower, 0.5)
    report = write_graphs(deployed(tower, "kept"), "torch-export", tmp_path / "out")
    assert report["setting"] == {"keep": 0.5} and len(report["stages"]) == 1
    paths = paths_of(tower)
    assert report["gmacs"] == [pytest.approx(paths.costs(32)[paths.rates.index(0.5)])]
    (graph,), images = loaded(report, tmp_path / "out"), pictures(7)
    found = graph(images)[0]
    torch.testing.assert_close(found, F.normalize(tower(images), dim=-1), atol=TOLERANCE, rtol=0)
    assert not torch.allclose(found, F.normalize(tower.tower(images), dim=-1), atol=1e-2), "it prunes"


class Undecided(nn.Module):
    """Its work depends on what it sees, which no graph can say."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 32)

    def encode_image(self, images):
        z = self.linear(images.mean((2, 3)))
        return z if z.sum() > 0 else -z


def test_what_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"image cannot be exported as onnx: .*\w.*; --format torch-export has more"):
        write_graphs(deployed(Undecided(), "undecided"), "onnx", tmp_path / "onnx")
    assert not list(tmp_path.iterdir()), "half an export is useless"


def test_graphs_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "parity", lambda *_: 2e-4)
    with pytest.raises(
        ValueError, match=r"the graphs differ from the model by 2\.0e-04, more than 0\.0001; try the other"
    ):
        write_graphs(load(tiny_directory(tmp_path / "model", 0), device="cpu"), "torch-export", tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "rest"),
    [
        (["classes.npy"], "the classes stay those of classes.npy"),
        ([], "no classes were named, and none can be named later"),
    ],
)
def test_what_a_folder_without_text_tower_knows_is_said(files, rest, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    assert write_texts([None], tmp_path, wanted=False) == ([None], [f"the text tower, by --no-text: {rest}"], 0.0)


def test_a_missing_runtime_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime: pip install '\.\[export\]' in the checkout, or take"):
        graphs.export_stages([], "onnx", [])


def test_mistakes(tmp_path, capsys):
    folder = tiny_directory(tmp_path / "model")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "mine").touch()
    for line, message in (
        ([str(folder), "--format", "onnx"], "is there already; name a new folder with --out"),
        ([str(folder), "--format", "torch-export", "--no-text"], "--no-text goes with --format onnx"),
        ([str(folder / "model.safetensors"), "--format", "onnx"], "--out must say where the graphs go"),
        ([str(folder / "model.safetensors"), "--format", "onnx", "--out", str(tmp_path / "x")], "has no text tower"),
    ):
        assert main(["export", *line]) == 1
        assert message in capsys.readouterr().err


def test_a_duration_is_the_median_over_half_a_second(monkeypatch):
    ran, clock = [], iter([0.0, 0.2, 1.0, 1.1, 2.0, 2.3])
    monkeypatch.setattr(graphs, "run_chain", lambda chain, images: ran.append(chain))
    monkeypatch.setattr(graphs.time, "perf_counter", lambda: next(clock))
    assert measured([], None) == pytest.approx(0.2) and len(ran) == 4, "of three, after one to warm up"


def test_speed_is_measured_for_every_path_and_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_seconds", lambda chain, images: len(chain) * len(images))
    model = load(tiny_directory(tmp_path / "model"), device="cpu")
    stages = model.paths.stages(None)
    found = graphs.rates(stages, [stage.module for stage in stages], 32, (1, 4))
    assert found == {"level_0": {1: (1.0, 1.0), 4: (1.0, 1.0)}, "level_1": {1: (0.5, 0.5), 4: (0.5, 0.5)}}
