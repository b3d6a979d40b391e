"""`effclip calibrate`: what it saves, what classify makes of it, and held-out pictures within the interval."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import main
from common.clip import CLIP
from common.data.embedded import module as embedded
from common.data.embedded.folder import write_folder
from common.data.lookup import source
from common.deploy.calibrate import calibrate, observe
from common.deploy.calibration import Calibration, Wish, choose
from common.deploy.model import Deployed, load
from common.evaluate.tasks import Settings
from common.models import Model
from common.packaged import default_model
from common.preprocess import Preprocess
from tests.common.towers import NAMES, AttendedTower, tiny_directory
from waveclip import WaveTower

SETTINGS = Settings(batch_size=50, workers=0)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    return str(tiny_directory(tmp_path / "model"))


@pytest.fixture
def labelled(tmp_path):
    """A folder with one folder a class, named by words of the tiny vocabulary, 20 pictures of noise in each."""
    random = np.random.default_rng(0)
    for name in NAMES:
        for n in range(20):
            file = tmp_path / "labelled" / name / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            spread = random.integers(1, 256)
            Image.fromarray(random.integers(0, spread, (32, 32, 3), dtype=np.uint8)).save(file)
    return str(tmp_path / "labelled")


def test_a_budget_from_calibration_to_classification(model, labelled, capsys):
    first, last = load(model, device="cpu").costs
    budget = f"{(first + last) / 2:.9f}"
    line = ["calibrate", "--data", labelled, "--model", model, "--template", "{a} {}", "--device", "cpu"]
    assert main([*line, "--gmacs", budget, "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "threshold" in printed and "on as many new pictures" in printed and "calibration.json" in printed
    found = load(model, device="cpu").calibration
    assert found.pictures == 60 and found.point.gmacs <= float(budget) and found.wish["gmacs"] == float(budget)
    assert found.conditions["data"] == labelled and found.conditions["split"] == "all"
    for asked in ([], ["--gmacs", budget]):
        assert main(["classify", labelled, "--model", model, "--device", "cpu", *asked]) == 0
        said = capsys.readouterr()
        costs = [float(row["gmacs"]) for row in csv.DictReader(io.StringIO(said.out))]
        assert np.mean(costs) == pytest.approx(found.point.gmacs, rel=1e-4), "the same pictures, so the same mean"
        assert len(set(costs)) == 2
        assert f"calibrated: {found.point.gmacs:.4g} [" in said.err and "note:" not in said.err
    assert main(["classify", labelled, "--model", model, "--device", "cpu", "--labels", "cat,dog"]) == 0
    assert "note: the calibration was made with other labels" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_pictures_are_read(model, labelled, tmp_path, capsys):
    (tmp_path / "file").touch()
    line = ["calibrate", "--data", labelled, "--model", model, "--gmacs", "1", "--device", "cpu"]
    assert main([*line, "--calibration", str(tmp_path / "file" / "mine.json")]) == 1
    said = capsys.readouterr()
    assert "nothing can be written into" in said.err and "with --calibration" in said.err
    assert "observing" not in said.err and not said.out


def test_a_calibration_is_used_where_it_was_asked_for(labelled, tmp_path, monkeypatch, capsys):
    """Weights that lie in no model directory: their calibration is stored, and not followed unasked."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    wave, text = str(tmp_path / "wave.safetensors"), str(tmp_path / "clip.safetensors")
    clip = CLIP.tiny().eval()
    clip.save(text)
    WaveTower.from_image_tower(clip.image_tower).save(wave, clip.architecture)
    weights = ["--model", wave, "--text-model", text]
    first, last = load(wave, text_model=text, device="cpu").costs
    budget, template = ["--gmacs", f"{(first + last) / 2:.9f}"], ["--template", "{a} {}"]
    line = ["calibrate", "--data", labelled, *weights, *template, *budget, "--workers", "0"]
    for place in ([], ["--calibration", "nightly"], ["--calibration", str(tmp_path / "mine.json")]):
        assert main([*line, *place]) == 0
    stored = tmp_path / "runs" / "calibrations" / "nightly.json"
    assert Calibration.read(stored).point == Calibration.read(tmp_path / "mine.json").point
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # the working directory has no say
    for asked, said in (
        ([], "all levels: neither --gmacs"),
        (budget, ", by the calibration "),
        (["--calibration", "nightly"], "nightly.json, made for gmacs"),
        (["--calibration", "mine.json"], "by the calibration mine.json"),
    ):
        labels = ["--labels", ",".join(NAMES)]
        assert main(["classify", labelled, *weights, *template, *labels, "--device", "cpu", *asked]) == 0
        error = capsys.readouterr().err
        assert said in error.splitlines()[0] and ("calibrated: " in error) == bool(asked)


def test_a_users_own_pictures_take_the_models_templates(model, labelled, tmp_path, capsys):
    """Here the model knows its words alone, so any other template would be refused."""
    line = ["--data", labelled, "--model", model, "--workers", "0", "--device", "cpu"]
    assert main(["calibrate", *line, "--gmacs", "1"]) == 0
    assert main(["evaluate", *line, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(", the model's own templates") == 2
    assert load(model, device="cpu").prepare().calibrated_on_these
    assert main(["evaluate", *line, "--template", "ensemble"]) == 1
    assert "is not in this model's vocabulary" in capsys.readouterr().err


def test_a_budget_beyond_the_dearest_path_needs_no_threshold(model, labelled, capsys):
    line = ["calibrate", "--data", labelled, "--model", model, "--gmacs", "100", "--device", "cpu", "--workers", "0"]
    assert main(line) == 0
    whole = f"{load(model, device='cpu').costs[-1]:.3g}"
    said = capsys.readouterr().out.splitlines()[0]
    assert f"for gmacs 100: every picture may take all levels ({whole}): no threshold is needed" in said


def test_held_out_pictures_cost_what_was_foretold(tmp_path, monkeypatch):
    """The embedded model, calibrated on val: the mean cost of test pictures, really run, lies in the interval."""
    monkeypatch.setitem(embedded.SPLITS, 2, {"val": (400, 200), "test": (400, 200)})
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    deployed = load(device="cpu")
    val, (first, last) = source("embedded", "zeroshot", "val"), deployed.costs
    found = calibrate(deployed, val, "embedded", Wish(gmacs=(2 * first + last) / 3), settings=SETTINGS)
    # 99.9 %, so that other weights or pictures do not fail by chance; that 95 % are 95 is tested on many draws.
    point = choose(observe(deployed, val, val.templates, SETTINGS), Wish(**found.wish), confidence=0.999)
    assert point.setting == found.point.setting
    write_folder(tmp_path / "test", "test", 400)
    answers = deployed.classify(tmp_path / "test", threshold=point.setting)
    costs = [answer.gmacs for answer in answers]
    assert len(costs) == 400 and set(costs) == {first, last}
    assert point.gmacs_interval[0] <= np.mean(costs) <= point.gmacs_interval[1]
    assert found.point.gmacs_interval[0] < found.point.gmacs < found.point.gmacs_interval[1]
    right = np.mean([answer.picture.split("/")[-2] == answer.label for answer in answers])
    assert point.accuracy_interval[0] <= right <= point.accuracy_interval[1]


def test_the_default_model_keeps_its_calibration_with_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(embedded.SPLITS, 2, {"val": (60, 30)})
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    assert main(["calibrate", "--data", "embedded", "--accuracy", "0.05", "--limit", "50", "--device", "cpu"]) == 0
    deployed = load(device="cpu")
    assert deployed.calibration.pictures == 50 and deployed.calibration.conditions["limit"] == 50
    assert deployed.calibration_file.is_relative_to(tmp_path / "calibrations")
    assert deployed.prepare().calibrated_on_these
    assert main(["convert", str(default_model().weights), str(tmp_path / "model")]) == 0
    converted = load(tmp_path / "model", device="cpu")
    assert converted.calibration_file == tmp_path / "model" / "calibration.json", "it goes along"
    assert converted.calibration.point == deployed.calibration.point and converted.prepare().calibrated_on_these


@torch.no_grad()
def test_keep_rates_are_calibrated_too(model, labelled, tmp_path):
    whole = load(model, device="cpu")
    tower = AttendedTower(random_tower(), 0.5)
    kept = Model("kept", "kept", Preprocess(32), tower, whole.model.texts, {"image": "a", "text": "b"}, {})
    deployed = Deployed(kept, NAMES, ["a {}"])
    of = source(labelled, "zeroshot")
    found = calibrate(deployed, of, labelled, Wish(gmacs=deployed.costs[3] * 1.01), ["a {}"], SETTINGS)
    assert (found.knob, found.point.setting) == ("keep", deployed.paths.rates[3])
    found.write(tmp_path / "kept.json")
    answers = Deployed(kept, NAMES, ["a {}"], calibration=tmp_path / "kept.json").classify(labelled)
    assert {answer.gmacs for answer in answers} == {deployed.costs[3]}
    right = np.mean([answer.picture.split("/")[-2] == answer.label for answer in answers])
    assert right == pytest.approx(found.point.accuracy)


def random_tower():
    torch.manual_seed(0)
    return CLIP.tiny().eval().image_tower


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--gmacs", "1e-9"], "the cheapest path costs"),
        (["--accuracy", "0.999"], "whose interval begins at"),
        (["--gmacs", "1", "--split", "tset"], "no split 'tset'"),
        (["--gmacs", "1", "--data", "imagnet"], "no data called 'imagnet'"),
    ],
)
def test_a_users_mistake_is_one_line(model, labelled, others, message, capsys):
    line = ["calibrate", "--data", labelled, "--model", model, "--workers", "0", "--template", "{}", "--device", "cpu"]
    assert main([*line, *others]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("effclip calibrate: error: ") and message in error


def test_there_must_be_something_to_set(tmp_path, labelled, capsys):
    plain = str(tiny_directory(tmp_path / "plain", levels=0))
    assert main(["calibrate", "--data", labelled, "--model", plain, "--gmacs", "1", "--workers", "0"]) == 1
    assert "has one cost" in capsys.readouterr().err
    assert main(["calibrate", "--data", "food101", "--root", "nowhere", "--gmacs", "1"]) == 1
    assert "has no val, and a test split is for reporting" in capsys.readouterr().err


def test_a_rate_that_costs_more_than_keeping_all_is_no_choice(labelled, monkeypatch):
    """A predictor costs something too: on few tokens, dropping some of them saves less than finding out which."""
    clip = CLIP.tiny().eval()
    tower = AttendedTower(clip.image_tower, 0.5)
    model = Deployed(
        Model("kept", "kept", Preprocess(32), tower, clip, {"image": "a", "text": "b"}, {}), NAMES, ["a {}"]
    )
    costs = zip(model.paths.rates, model.costs, strict=True)
    dear = [cost + 0.2 * model.costs[-1] * (rate < 1) for rate, cost in costs]
    monkeypatch.setattr(model, "costs", dear)
    of = source(labelled, "zeroshot", "all")
    outcomes = observe(model, of, ["a {}"], SETTINGS)
    assert list(outcomes.costs) == sorted(outcomes.costs) and max(outcomes.costs) == dear[-1] < max(dear)
    assert outcomes.paths[-1] == 1.0 and len(outcomes.paths) == outcomes.correct.shape[1] < len(dear)
    assert calibrate(model, of, labelled, Wish(gmacs=1.0), ["a {}"], SETTINGS).point.setting == 1.0
    assert model.setting(gmacs=1.0) == 1.0
