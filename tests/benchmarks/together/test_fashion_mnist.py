"""The Fashion-MNIST benchmark on stand-in pictures, with untrained models in the place of trained ones."""

import json
from pathlib import Path

import pytest
from torchvision.datasets import FashionMNIST

from benchmarks import RESULTS
from benchmarks.together import fashion_mnist, photo_models, photos
from benchmarks.together.fashion_mnist import pictures, render, stand_in, stand_in_losses
from benchmarks.together.photo_models import CLIP, HALF, TRAINED_ON, WAVE, write_cards
from common.cli import main as lightning
from common.data.classification import classification_set
from tests.benchmarks.together.untrained import untrained

FILES = ["fashion_mnist_clip.safetensors", "fashion_mnist_waveclip.safetensors"]
PART = 60
"""Pictures of each split that the smoke run reads here; any number shows what it does."""
CONTROLS = ["fashion_mnist_clip_half.safetensors", "fashion_mnist_clip_trained_on.safetensors"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder of runs and the result of a smoke run."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFCLIP_RUNS", str(folder))
        patch.setattr(photo_models, "fit", untrained)
        patch.setattr(photos, "PART", PART)
        return folder, json.loads(json.dumps(fashion_mnist.run(smoke=True)))


def test_stand_in_pictures_are_a_whole_set(tmp_path):
    images = classification_set("fashion_mnist", stand_in(tmp_path), "test")
    assert images.labels[:12] == [*range(10), 0, 1] and len(images) == 10_000
    assert images.picture(0).tobytes() == images.picture(10).tobytes() != images.picture(1).tobytes()
    assert len(images.class_names) == len(FashionMNIST.classes)


def test_a_smoke_run_says_what_it_did_and_writes_into_the_run_directory(outcome):
    folder, result = outcome
    rows = result["rows"]
    assert [row["method"].split()[-1] for row in rows[:5]] == ["(dense)", "coarse-only", "quarter", "half", "full"]
    assert [rows[place]["tokens"] for place in (0, 1, 4)] == [65, 17, 66]  # 8², 4² and 3 x 4² patches, class tokens
    assert {row["method"] for row in rows[5:]} >= {"teacher trained on", "half-resolution CLIP"}
    for split in ("val", "test"):
        assert {level["pictures"] for level in result["levels"][split].values()} == {PART}
    assert sorted(path.name for path in (folder / "smoke/weights").iterdir()) == sorted(FILES + CONTROLS)
    assert not (folder / "smoke/results").exists(), "a smoke run is no finished run"
    names = [f"fashion-mnist-{model}" for model in (CLIP, WAVE, TRAINED_ON, HALF)]
    assert list(result["conditions"]["weights"]) == [run["name"] for run in result["runs"]] == names
    assert result["conditions"]["data"] == "stand-in pictures" and len(result["conditions"]["classes"]) == 10


def test_effclip_evaluate_finds_the_same_accuracies(outcome, monkeypatch, tmp_path):
    folder, result = outcome
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    clip, wave = (str(folder / "smoke/weights" / file) for file in FILES)
    data = ["--data", "fashion_mnist", "--root", str(folder / "smoke" / "fashion-mnist-data"), "--device", "cpu"]
    data += ["--template", "single"]
    for model, row in ((["--model", clip], 0), (["--model", wave, "--text-model", clip], 4)):
        out = tmp_path / str(row)
        assert lightning(["evaluate", *model, *data, "--limit", str(PART), "--out", str(out)]) == 0
        (file,) = out.glob("*.json")
        assert json.loads(file.read_text())["metrics"]["top1"] == result["rows"][row]["accuracy"]


def test_the_table_says_what_was_reached_and_how_it_was_trained(outcome):
    _, result = outcome
    text = render(result)["md"]
    assert "| WaveCLIP full | 100.0 % |" in text and "The CLIP above 85 %: NOT reached." in text
    assert "| fashion-mnist-clip | 4 | 7 | `lightning fit -c common/fashion_mnist_clip.yaml` |" in text
    assert "Zero-shot among 10 names by “a photo of a {}.”, on 60 test pictures" in text
    result = json.loads(json.dumps(result))
    result["rows"][0]["interval"], result["rows"][4]["against_teacher"] = [0.851, 0.87], [-0.01, -0.019, 0.0]
    text = render(result)["md"]
    assert "The CLIP above 85 %: reached. WaveCLIP's full level within 2 points of it: reached." in text


def test_cards_name_data_and_command(outcome, monkeypatch):
    folder, result = outcome
    monkeypatch.setenv("EFFCLIP_RUNS", str(folder))
    write_cards(pictures(str(folder / "smoke/fashion-mnist-data"), smoke=True), result["runs"], result)
    for file, levels in zip(FILES, (["teacher"], ["coarse", "fine"]), strict=True):
        text = (folder / "smoke/weights" / file).with_suffix(".md").read_text()
        assert "(`make reproduce-fashion-mnist`)" in text and "Zalando SE, MIT licence" in text
        assert [line.split()[2] for line in text.splitlines() if line.startswith("| test,")] == levels
        assert "of 60 pictures, zero-shot among 10 names" in text


def test_missing_data_is_said_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(photo_models, "fit", lambda *arguments, **others: pytest.fail("it trained"))
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
    stored = {run["name"]: run for run in json.loads((RESULTS / "fashion-mnist.json").read_text())["runs"]}
    runs = pictures(str(stand_in(tmp_path))).runs()
    for model in (CLIP, WAVE):
        losses = stored[runs[model].name]["first_losses"]
        assert stand_in_losses(runs[model].recipe, tmp_path) == pytest.approx(losses, rel=0.02)
    assert {run.steps % 250 for run in runs.values()} == {0}, "the last checkpoint is the last step"


def test_the_committed_result_still_has_its_table():
    text = render(json.loads((RESULTS / "fashion-mnist.json").read_text()))["md"]
    assert "| teacher (dense) | – | 86.4" in text and "3 training seeds." in text
