"""load("DIR").classify(...) against the same by hand, and the wishes that it grants and refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.clip import CLIP
from common.data.embedded.shapes import class_names
from common.data.transforms import eval_transform, to_batch
from common.deploy.calibration import Calibration, Point
from common.deploy.model import Deployed, load
from common.models import Model
from common.packaged import default_model
from common.preprocess import Preprocess
from common.zeroshot import embed_prompts
from tests.common.towers import NAMES, AttendedTower, tiny_directory
from waveclip import MarginGate, ProgressiveClassifier, WaveTower


@pytest.fixture
def model(tmp_path):
    return load(tiny_directory(tmp_path / "model"), device="cpu")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of noise, one of them cut off."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for n in range(10):
        pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n}.png")
    file = tmp_path / "pictures" / "3.png"
    file.write_bytes(file.read_bytes()[:900])
    return tmp_path / "pictures"


@torch.no_grad()
def expected(folder, threshold):
    """What a ProgressiveClassifier says of the sound pictures, put together by hand."""
    torch.manual_seed(0)
    clip = CLIP.tiny().eval()
    wave = WaveTower.from_image_tower(clip.image_tower).eval()
    classes = embed_prompts(clip, [f"a {name}" for name in NAMES])
    view = eval_transform(Preprocess(32))
    images = to_batch([view(Image.open(folder / f"{n}.png"), None) for n in range(10) if n != 3], Preprocess(32))
    return ProgressiveClassifier(wave, classes, clip.logit_scale.exp(), MarginGate(threshold))(images)


def middle(folder):
    """A threshold between the coarse margins of these pictures."""
    top = expected(folder, 0.0).scores.topk(2, dim=-1).values
    margins = (top[:, 0] - top[:, 1]).sort().values
    return margins[3:5].mean().item()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_those_of_the_progressive_classifier(model, folder, batch_size):
    threshold = middle(folder)
    answers = model.classify(folder, threshold=threshold, batch_size=batch_size, workers=2)
    assert [answer.picture for answer in answers] == [str(folder / f"{n}.png") for n in range(10)]
    damaged = answers.pop(3)
    assert "truncated" in damaged.error.lower() and damaged.label is damaged.probability is damaged.gmacs is None
    by_hand = expected(folder, threshold)
    assert [answer.level for answer in answers] == by_hand.exit_step.tolist()
    assert {answer.level for answer in answers} == {0, 1}
    assert [answer.label for answer in answers] == [NAMES[n] for n in by_hand.scores.argmax(-1)]
    assert [a.probability for a in answers] == pytest.approx(by_hand.scores.amax(-1).tolist(), abs=1e-5)
    assert [a.gmacs for a in answers] == [model.costs[level] for level in by_hand.exit_step]


def test_paths_pictures_and_labels_of_ones_own(model, folder):
    images = [Image.open(folder / "0.png"), folder / "1.png", str(folder / "2.png")]
    answers = model.classify(images, ["dog", "cat"], templates=["{a} red {}"])
    assert {answer.label for answer in answers} <= {"dog", "cat"}
    assert all(answer.level == 1 for answer in answers), "unasked, all levels"
    single = model.classify(str(folder / "1.png"), ["dog", "cat"], templates=["{a} red {}"])
    assert single[0].probability == pytest.approx(answers[1].probability, abs=1e-6)
    assert model.classify([], ["dog", "cat"]) == []


def test_labels_are_checked(model, folder):
    for labels, message in (
        (["cat"], "at least two different names, not 1 of them"),
        (["cat", "dog", "cat"], "not 'cat' twice"),
        ("cat,dog", "labels 'cat,dog' are one text; give a list of names"),
        (["cat", "zebra"], r"\['zebra'\] in 'a zebra' is not in this model's vocabulary of \d+ ids; use words that it"),
    ):
        with pytest.raises(ValueError, match=message):
            model.classify(folder, labels)
    with pytest.raises(ValueError, match="are one text; give a list of prompts"):
        model.classify(folder, ["cat", "dog"], templates="a {}")
    with pytest.raises(ValueError, match="no picture and no folder"):
        model.classify(folder / "nowhere")


def calibrated(model, prompts=None):
    """A calibration by hand: every tenth threshold, dearer the higher."""
    first, last = model.costs
    curve = [[tenth / 10, first + tenth / 10 * (last - first), 0.5] for tenth in range(11)]
    point = Point(0.3, curve[3][1], 0.5, (first, last), (0.4, 0.6))
    prompts = prompts or model.prompts_hash(model.class_names, model.templates)
    return Calibration("threshold", {}, point, curve, 100, model.costs, model.model.weights, prompts, {})


def test_budgets_come_from_the_calibration(tmp_path, model):
    first, last = model.costs
    between = (first + last) / 2
    with pytest.raises(ValueError, match=r"nothing was calibrated; run `effclip calibrate --data NAME --gmacs"):
        model.setting(gmacs=between)
    assert model.setting(gmacs=2 * last) > 1, "all levels are within this budget, whatever the pictures"
    assert model.setting() > 1 and model.setting(threshold=0.2) == 0.2
    calibrated(model).write(tmp_path / "model" / "calibration.json")
    model = load(tmp_path / "model", device="cpu")
    assert model.setting(gmacs=between) == 0.5 and model.setting() == 0.3
    moved = (tmp_path / "model" / "calibration.json").rename(tmp_path / "mine.json")
    named = load(tmp_path / "model", device="cpu", calibration=moved)
    assert named.setting() == 0.3 and load(tmp_path / "model", device="cpu").setting() > 1
    for wish, message in (
        ({"gmacs": first / 2}, "a picture costs .* GMACs at least"),
        ({"gmacs": between, "threshold": 0.1}, "two ways to say one thing"),
    ):
        with pytest.raises(ValueError, match=message):
            model.setting(**wish)


def test_a_calibration_says_when_it_may_not_hold(tmp_path, model, folder):
    file = tmp_path / "model" / "calibration.json"
    calibrated(model).write(file)
    model = load(tmp_path / "model", device="cpu")
    assert model.prepare().calibrated_on_these
    with pytest.warns(UserWarning, match="made with other labels or prompts"):
        assert model.prepare(["cat", "dog"]).setting == 0.3
    made = calibrated(model)
    Calibration(**{**made.__dict__, "weights": {"image": "other", "text": "other"}}).write(file)
    with pytest.raises(ValueError, match="was made for other weights"):
        load(tmp_path / "model", device="cpu").prepare()


def test_models_without_levels(tmp_path, folder):
    plain = load(tiny_directory(tmp_path / "plain", levels=0), device="cpu")
    answers = plain.classify(folder)
    assert {answer.level for answer in answers} == {None} and answers[0].gmacs == plain.costs[0]
    assert plain.setting(gmacs=plain.costs[0]) is None
    with pytest.raises(ValueError, match="has no levels to stop at"):
        plain.classify(folder, threshold=0.5)
    with pytest.raises(ValueError, match=r"costs .* GMACs at least"):
        plain.classify(folder, gmacs=plain.costs[0] / 2)


def test_a_keep_rate_follows_the_budget_without_calibration(folder):
    clip = CLIP.tiny().eval()
    tower = AttendedTower(clip.image_tower, 0.5)
    model = Deployed(
        Model("kept", "kept", Preprocess(32), tower, clip, {"image": "a", "text": "b"}, {}), NAMES, ["a {}"]
    )
    rates, costs = model.paths.rates, model.costs
    assert model.setting() == 0.5
    for place in (0, 4, 9):
        within = [rate for rate, cost in zip(rates, costs, strict=True) if cost <= costs[place]]
        assert model.setting(gmacs=costs[place]) == max(within)
    answers = model.classify(folder, gmacs=(costs[4] + costs[5]) / 2)
    assert all(answer.gmacs is None or answer.gmacs <= (costs[4] + costs[5]) / 2 for answer in answers)
    assert {answer.level for answer in answers} == {None}


def test_the_embedded_model_is_the_default(folder):
    model = load(device="cpu")
    assert model.model.type == "wave" and list(model.class_names) == list(class_names("seen"))
    by_name = load(default_model().weights, device="cpu")
    assert (by_name.class_names, by_name.templates) == (model.class_names, model.templates)
    assert by_name.model.weights == model.model.weights, "an image tower alone, which finds its own texts"
    with pytest.raises(ValueError, match="--text-model belong to a --model; name one"):
        load(weights="openai")
    answers = model.classify(folder)
    assert all(answer.error or answer.label in model.class_names for answer in answers)
    with pytest.raises(ValueError, match="is not in this model's vocabulary"):
        model.classify(folder, ["transformer", "convolution"])
    alone = Deployed(model.model)
    with pytest.raises(ValueError, match="has no class names of its own; give labels"):
        alone.prepare()
