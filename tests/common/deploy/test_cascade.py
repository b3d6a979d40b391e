"""A cascade of two models, classified, calibrated and exported, against what each of the two answers alone."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common.cli import main
from common.deploy import graphs, predict
from common.deploy.calibration import Calibration
from common.deploy.model import load
from common.deploy.runtime import EarlyExit
from tests.common.fresh import WITHOUT_TORCH
from tests.common.towers import NAMES, small_directory, tiny_directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The big and the small model's directories."""
    place = tmp_path_factory.mktemp("pair")
    return str(tiny_directory(place / "big", levels=0)), small_directory(place / "small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 pictures of many shapes in one folder a class."""
    place, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(30):
        height, width = random.integers(20, 90, 2)
        colours = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        file = place / NAMES[number % 3] / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(colours).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file)
    return place


def alone(model, pictures):
    """A model's own answers, and their margins (NaN for a damaged picture)."""
    answers = load(model, device="cpu").classify(pictures, topk=2)
    return answers, np.array([a.top[0][1] - a.top[1][1] if a.top else np.nan for a in answers])


def between(margins):
    """A threshold that some of the margins reach."""
    low, high = np.sort(margins[~np.isnan(margins)])[14:16]
    return float((low + high) / 2)


def test_each_model_sees_the_picture_as_it_does_alone(pair, photos, tmp_path):
    (big, small), pictures = pair, [photos, tmp_path / "broken.png"]
    pictures[1].write_bytes(b"no picture")
    (early, margins), (late, _) = alone(small, pictures), alone(big, pictures)
    threshold = between(margins)
    for chosen in (0.0, threshold, 1.0):
        found = load(big, first=small, device="cpu").classify(pictures, threshold=chosen, batch_size=7)
        for answer, first, second, margin in zip(found, early, late, margins, strict=True):
            expected = first if margin >= chosen else second
            assert (answer.picture, answer.label, answer.error) == (first.picture, expected.label, expected.error)
            if answer.error:
                continue
            assert answer.level == (0 if margin >= chosen else 1)
            assert answer.probability == pytest.approx(expected.probability, abs=1e-5)
            assert answer.gmacs == pytest.approx(first.gmacs + (0 if margin >= chosen else second.gmacs))
        assert len({answer.level for answer in found if answer.label}) == (2 if chosen == threshold else 1)


def test_a_budget_from_calibration_to_classification(pair, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    big, small = pair
    line, small_costs = ["--model", big, "--first", small, "--device", "cpu"], load(small, device="cpu").costs
    budget = ["--gmacs", f"{small_costs[0] + load(big, device='cpu').costs[0] / 2:.9f}"]
    assert main(["calibrate", "--data", str(photos), *line, *budget, "--workers", "0"]) == 0
    (file,) = (tmp_path / "calibrations").iterdir()
    written = json.loads(file.read_text())
    weights = {model: load(model, device="cpu").model.weights for model in pair}
    first = {f"first/{side}": weights[small][side] for side in ("image", "text")}
    assert written["weights"] == weights[big] | first and written["knob"] == "threshold"
    prepared = [written["conditions"][name] for name in ("preprocess", "first_preprocess")]
    assert [(how["size"], how["resize_mode"]) for how in prepared] == [(32, "shortest"), (16, "squash")]
    assert main(["classify", str(photos), *line, *budget]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out[said.out.index("picture,") :])))
    assert np.mean([float(row["gmacs"]) for row in rows]) == pytest.approx(written["point"]["gmacs"], rel=1e-4)
    right = np.mean([row["label"] == row["picture"].split("/")[-2] for row in rows])
    assert right == pytest.approx(written["point"]["accuracy"])
    assert {row["level"] for row in rows} == {"0", "1"} and "calibrated: " in said.err and "note:" not in said.err
    Calibration.read(file).write(tmp_path / "mine.json")
    other = small_directory(tmp_path / "other", seed=2)
    line = ["classify", str(photos), "--model", big, "--first", other, "--calibration", str(tmp_path / "mine.json")]
    assert main(line) == 1
    assert "mine.json was made for other weights" in capsys.readouterr().err


def test_two_models_that_make_no_cascade_are_refused_by_name(pair, photos, tmp_path, capsys):
    big, small = pair
    wave, none = str(tiny_directory(tmp_path / "wave")), str(tmp_path / "none.safetensors")
    for words, message in (
        (["--model", big, "--first", small], "needs --threshold, --gmacs or --calibration, which say when its answer"),
        (["--model", small, "--first", big, "--threshold", "0.5"], "--first: big costs"),
        (["--model", wave, "--first", small, "--threshold", "0.5"], "--first: wave has a threshold of its own"),
        (["--model", big, "--first", none, "--threshold", "0.5"], "no weights at"),
        (["--model", big, "--first", "ViT-B-32", "--threshold", "0.5"], "--first is a model directory, a weights file"),
        (["--model", big, "--first", "", "--threshold", "0.5"], "the name of a model is empty"),
        (["--model", big, "--first", str(photos), "--threshold", "0.5"], f"{photos} holds no model; name a model"),
        (["--model", big, "--first", big, "--threshold", "0.5"], "--first: big is the model itself"),
        (["--model", big, "--first", small, "--calibration", ""], "--calibration is empty"),
        (["--model", big, "--first", small, "--threshold", "1", "--labels", "cat,zebra"], "small: ['zebra'] in 'a zeb"),
        (["--first", small, "--threshold", "0.5"], "--first, --weights"),
    ):
        assert main(["classify", str(photos), *words]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_in_python_too_a_cascade_needs_to_know_when_the_first_answer_stands(pair, photos):
    cascade = load(pair[0], first=pair[1], device="cpu")
    with pytest.raises(ValueError, match="small then big: give a threshold, gmacs or a calibration"):
        cascade.classify(photos)
    assert {answer.level for answer in cascade.classify(photos, gmacs=1.0)} == {1}
    with pytest.raises(ValueError, match=r"no model at .*ViT-B-32; --first is a model directory"):
        load(pair[0], first="ViT-B-32")


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """The cascade's export as ONNX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_seconds", lambda chain, images: 0.5)
        out = tmp_path_factory.mktemp("export") / "onnx"
        assert main(["export", pair[0], "--first", pair[1], "--format", "onnx", "--out", str(out)]) == 0
    return out


def test_predict_answers_as_classify_where_there_is_no_torch(pair, photos, folder, tmp_path):
    big, small = pair
    threshold, out = between(alone(small, [photos])[1]), tmp_path / "rows.csv"
    line = [folder / "predict.py", photos, "--threshold", repr(threshold), "--out", out, "--batch-size", "7"]
    run = subprocess.run([sys.executable, "-I", "-c", WITHOUT_TORCH, *map(str, line)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(out.open()))
    answers = load(big, first=small, device="cpu").classify(photos, threshold=threshold)
    assert [row["picture"] for row in rows] == [answer.picture for answer in answers]
    assert [(row["label"], int(row["level"])) for row in rows] == [(a.label, a.level) for a in answers]
    assert {row["level"] for row in rows} == {"0", "1"}
    for row, answer in zip(rows, answers, strict=True):
        assert float(row["probability"]) == pytest.approx(answer.probability, abs=1e-5)
        assert float(row["gmacs"]) == pytest.approx(answer.gmacs, rel=1e-5)


def test_a_folder_holds_what_belongs_to_each_model(pair, folder):
    about = json.loads((folder / "export.json").read_text())
    files = "classes_0.npy classes_1.npy export.json level_0.onnx level_1.onnx predict.py text_0.bin text_0.onnx "
    files += "text_1.bin text_1.onnx tokenizer.json weights.bin"
    assert sorted(path.name for path in folder.iterdir()) == files.split()
    assert about["version"] == 2 and [stage["member"] for stage in about["stages"]] == [0, 1]
    sizes = [(member["preprocess"]["size"], member["embed_dim"]) for member in about["members"]]
    assert sizes == [(16, 24), (32, 32)]
    costs = [load(model, device="cpu").costs[0] for model in reversed(pair)]
    assert about["gmacs"] == pytest.approx([costs[0], sum(costs)])
    speeds = about["images_per_second"]
    assert [speeds[level]["1"] for level in ("level_0", "level_1")] == [[2, 2], [1, 1]], "half a second each"


@pytest.fixture
def copied(folder, monkeypatch):
    """The cascade's graphs in fp32 are taken from ``folder``: making them anew takes most of the time."""

    def copies(chains, form, files):
        for file in (*files, files[0].parent / graphs.WEIGHTS):
            shutil.copy(folder / file.name, file)
        return [graphs.onnx_graph(file) for file in files]

    monkeypatch.setattr(graphs, "export_stages", copies)
    monkeypatch.setattr(graphs, "_seconds", lambda chain, images: 0.5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "int8-static"])
def test_fewer_bits_are_held_to_each_models_own_answers(dtype, pair, photos, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    (big, small), file, out = pair, str(tmp_path / "mine.json"), tmp_path / "onnx"
    (tmp_path / "labels.txt").write_text("\n".join(names := sorted(NAMES)))  # as the folders are ordered
    line = ["--model", big, "--first", small, "--data", str(photos), "--calibration", file, "--workers", "0"]
    budget = load(small, device="cpu").costs[0] + load(big, device="cpu").costs[0] / 2
    assert main(["calibrate", *line, "--gmacs", f"{budget:.9f}"]) == 0
    words = [big, "--first", small, "--format", "onnx", "--no-text", "--calibration", file, "--out", str(out)]
    words += ["--labels-file", str(tmp_path / "labels.txt"), "--dtype", dtype, "--min-agreement", "0.5"]
    words += ["--data", str(photos)]
    assert main(["export", *words]) == 0
    about = json.loads((out / "export.json").read_text())
    compared, found = about["compared"], EarlyExit(out)
    assert compared["pictures"] == (15 if dtype == "int8-static" else 30) and about["version"] == 2
    files = sorted(photos.rglob("*.png"))
    images = found.normalised([found.pixels(file) for file in files])
    truth = np.array([names.index(file.parent.name) for file in files])
    for level, (model, z) in enumerate(zip((small, big), found.all_levels(images), strict=True)):
        expected = [names.index(answer.label) for answer in alone(model, [photos])[0]]
        now, listed = found.probabilities(z, level).argmax(1), compared["levels"][level]
        if dtype != "int8-static":  # half of the pictures chose the ranges
            assert listed["agreement"] == pytest.approx((now == expected).mean())
            assert listed["accuracy"] == pytest.approx([(expected == truth).mean(), (now == truth).mean()])
        assert listed["agreement"] >= 0.5 and len(listed["difference"]) == 3
    assert about["bytes"][dtype] < 0.75 * about["bytes"]["fp32"]
    anew = about["calibration"]
    assert anew["pictures"] == compared["pictures"] and about["gate"]["threshold"] == anew["point"]["setting"]
    assert anew["point"]["gmacs"] <= budget * (1 + 1e-6) and about["calibrated_on_these_classes"]
    seen = {name: anew["conditions"][name] for name in ("data", "split", "limit", "dtype")}
    assert seen == {"data": str(photos), "split": "all", "limit": None, "dtype": dtype}
    said = capsys.readouterr().out
    assert f"{dtype}, compared on" in said and "to level_0: " in said and "to level_1: " in said


def test_other_classes_are_embedded_by_each_model(pair, photos, folder):
    runtime, names = EarlyExit(folder), ["red dog", "green bird"]
    runtime.name_classes(names)
    found = [answer.label for answer, _ in runtime.classify(sorted(photos.rglob("*.png")), threshold=0.05)]
    answers = load(pair[0], first=pair[1], device="cpu").classify(photos, names, threshold=0.05)
    assert found == [answer.label for answer in answers]


def test_a_calibration_goes_along(pair, photos, copied, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    big, small = pair
    line, file = ["--model", big, "--first", small, "--data", str(photos)], str(tmp_path / "mine.json")
    assert main(["calibrate", *line, "--accuracy", "0.05", "--calibration", file, "--workers", "0"]) == 0
    words = [big, "--first", small, "--format", "onnx", "--no-text", "--calibration", file]
    assert main(["export", *words, "--out", str(tmp_path / "onnx")]) == 0
    about, point = json.loads((tmp_path / "onnx" / "export.json").read_text()), Calibration.read(tmp_path / "mine.json")
    assert about["gate"]["threshold"] == point.point.setting and about["calibrated_on_these_classes"]
    assert about["calibration"]["weights"] == point.weights
    assert EarlyExit(tmp_path / "onnx").threshold_for(sum(about["gmacs"]) / 2) is not None


def test_without_text_towers_the_classes_are_those_of_two_files(pair, copied, tmp_path, capsys):
    big, small = pair
    words = [big, "--first", small, "--format", "onnx", "--no-text", "--out", str(tmp_path / "onnx")]
    assert main(["export", *words]) == 0
    said = "left out: the text towers, by --no-text: the classes stay those of classes_0.npy and classes_1.npy"
    assert said in capsys.readouterr().out


def test_what_a_cascade_has_not_is_said(pair, photos, folder, tmp_path, capsys):
    big, small = pair
    line = ["export", big, "--first", small, "--out", str(tmp_path / "out")]
    for words, message in (
        (["--format", "open-clip"], "a cascade is exported as graphs; export the models alone"),
        (["--format", "onnx", "--keep", "0.5"], "--keep: small then big has no keep rate to choose"),
    ):
        assert main([*line, *words]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert predict.main([str(photos), "--folder", str(folder), "--embeddings", str(tmp_path / "z.npy")]) == 1
    assert "those of a cascade's two models lie in two spaces" in capsys.readouterr().err


def test_an_incomplete_folder_is_refused(folder, tmp_path):
    about = json.loads((folder / "export.json").read_text())
    members, stages = about["members"], about["stages"]
    without_scale = [members[0], {name: value for name, value in members[1].items() if name != "logit_scale"}]
    for changed, damage in (
        ({"members": without_scale}, "without logit_scale"),
        ({"members": members[:1]}, "stages is .*"),
        ({"stages": stages[:1]}, "stages is .*"),
    ):
        (tmp_path / "export.json").write_text(json.dumps(about | changed))
        with pytest.raises(ValueError, match=rf"is damaged \({damage}\); export it anew"):
            EarlyExit(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"classes_0.npy cannot be read \(.*No such file.*\); export it anew"):
        EarlyExit(tmp_path)
