"""The Fashion-MNIST benchmark on stand-in pictures, with untrained models in the place of trained ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision.datasets import FashionMNIST

from benchmarks import RESULTS
from benchmarks.embedded import PART
from benchmarks.together import fashion_mnist
from benchmarks.together.fashion_mnist import RUNS, render, stand_in, stand_in_losses
from common.cli import main as lightning
from common.data.classification import classification_set
from common.pretraining import CLIPPretraining
from waveclip import WaveCLIPDistillation

ARCHITECTURE = "common/fashion_mnist_clip.json"
CONDITIONS = {"clean": True, "seed": 0, "revision": "abc", "date": "2026", "device": "CPU", "threads": 2, "torch": "2"}


def untrained(run, folder, overlay, places):
    """What ``fit`` leaves in the folder and returns, without a training."""
    weights = places.get("model", {}).get("weights")
    torch.manual_seed(0)
    module = WaveCLIPDistillation(ARCHITECTURE, weights) if weights else CLIPPretraining(ARCHITECTURE)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    result = {"name": run.name, "command": f"lightning fit -c {run.recipe}", "conditions": CONDITIONS}
    return result | {"minutes": 6.7, "legs": 1, "steps": 4}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder of runs and the result of a smoke run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFCLIP_RUNS", str(folder))
        patch.setattr(fashion_mnist, "fit", untrained)
        return folder, json.loads(json.dumps(fashion_mnist.run(smoke=True)))


def test_stand_in_pictures_are_a_whole_set(tmp_path):
    images = classification_set("fashion_mnist", stand_in(tmp_path), "test")
    assert images.labels[:12] == [*range(10), 0, 1] and len(images) == 10_000
    assert images.picture(0).tobytes() == images.picture(10).tobytes() != images.picture(1).tobytes()
    assert len(images.class_names) == len(FashionMNIST.classes)


def test_a_smoke_run_says_what_it_did_and_writes_into_the_run_directory(outcome):
    folder, result = outcome
    rows = result["rows"]
    assert [row["method"].split()[-1] for row in rows] == ["(dense)", "coarse-only", "quarter", "half", "full"]
    assert [rows[place]["tokens"] for place in (0, 1, -1)] == [65, 17, 66]  # 8², 4² and 3 x 4² patches, class tokens
    for split in ("val", "test"):
        assert {level["pictures"] for level in result["levels"][split].values()} == {PART}
    assert {path.name for path in (folder / "smoke").glob("*.safetensors")} == {run.output.name for run in RUNS}
    assert set(result["conditions"]["weights"]) == {run.output.name for run in RUNS}
    assert result["conditions"]["data"] == "stand-in pictures" and len(result["conditions"]["classes"]) == 10


def test_effclip_evaluate_finds_the_same_accuracies(outcome, monkeypatch, tmp_path):
    folder, result = outcome
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    clip, wave = (str(folder / "smoke" / run.output.name) for run in RUNS)
    data = ["--data", "fashion_mnist", "--root", str(folder / "smoke" / "fashion-mnist-data"), "--device", "cpu"]
    data += ["--template", "single"]
    for model, row in ((["--model", clip], 0), (["--model", wave, "--text-model", clip], -1)):
        out = tmp_path / str(row)
        assert lightning(["evaluate", *model, *data, "--limit", str(PART), "--out", str(out)]) == 0
        (file,) = out.glob("*.json")
        assert json.loads(file.read_text())["metrics"]["top1"] == result["rows"][row]["accuracy"]


def test_the_table_says_what_was_reached_and_how_it_was_trained(outcome):
    _, result = outcome
    text = render(result)["md"]
    assert "| WaveCLIP full | 100.0 % |" in text and "The CLIP above 85 %: NOT reached." in text
    assert "| fashion-mnist-clip | 4 | 7 | `lightning fit -c common/fashion_mnist_clip.yaml` |" in text
    assert "Zero-shot among 10 names by “a photo of a {}.”, on 500 test pictures" in text
    result = json.loads(json.dumps(result))
    result["rows"][0]["interval"], result["rows"][-1]["against_teacher"] = [0.851, 0.87], [-0.01, -0.019, 0.0]
    text = render(result)["md"]
    assert "The CLIP above 85 %: reached. WaveCLIP's full level within 2 points of it: reached." in text


def test_cards_name_data_and_command(outcome, monkeypatch, tmp_path):
    _, result = outcome
    runs = [replace(run, output=tmp_path / run.output.name) for run in RUNS]
    for run in runs:
        run.output.write_bytes(b"0" * 1000)
    monkeypatch.setattr(fashion_mnist, "RUNS", runs)
    fashion_mnist._write_cards(result)
    clip, wave = (run.output.with_suffix(".md").read_text() for run in runs)
    for text, levels in ((clip, ["teacher"]), (wave, ["coarse", "fine"])):
        assert "(`make reproduce-fashion-mnist`)" in text and "Zalando SE, MIT licence" in text
        assert [line.split()[2] for line in text.splitlines() if line.startswith("| test,")] == levels
        assert "of 500 pictures, zero-shot among 10 names" in text


def test_missing_data_is_said_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "fit", lambda *arguments: pytest.fail("it trained"))
    monkeypatch.delenv("EFFCLIP_DATA", raising=False)
    with pytest.raises(ValueError, match=r"set EFFCLIP_DATA.*apt-get download dataset-fashion-mnist && dpkg -x"):
        fashion_mnist.run()
    monkeypatch.setenv("EFFCLIP_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no FashionMNIST/raw/train-images"):
        fashion_mnist.run()


def test_download_happens_on_request_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(FashionMNIST, "download", lambda self: asked.append(Path(self.root)))
    monkeypatch.setenv("EFFCLIP_DATA", str(tmp_path))
    for wanted in ("", "1"):
        monkeypatch.setenv("DOWNLOAD", wanted)
        with pytest.raises(ValueError, match="Fashion-MNIST"):
            fashion_mnist.run()
        assert asked == [tmp_path] * len(wanted)


def test_recipes_start_with_the_stored_losses(tmp_path):
    stored = RESULTS / "fashion-mnist.json"
    runs = json.loads(stored.read_text())["runs"] if stored.is_file() else []  # none before the first real run
    for run, made in zip(RUNS, runs, strict=bool(runs)):
        assert stand_in_losses(run.recipe, tmp_path) == pytest.approx(made["first_losses"], rel=0.02)
    assert [run.steps % 250 for run in RUNS] == [0, 0], "the last checkpoint is the last step"
