"""A cascade of two models in `effclip sweep` and `effclip evaluate`, against both models' own answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import directory
from common.cascade import Resized, cascaded
from common.cli import main
from common.clip import CLIP
from common.data.lookup import source
from common.early_exit import exit_at
from common.flops import count_macs
from common.models import load_model
from common.preprocess import Preprocess
from common.zeroshot import embed_prompts
from tests.common.towers import NAMES, tiny_directory


@pytest.fixture
def small(tmp_path):
    """A model directory of a CLIP for pictures of 16 px."""
    architecture = CLIP.tiny().architecture
    vision = {**architecture["vision_cfg"], "image_size": 16, "layers": 1}
    torch.manual_seed(1)
    directory.write(tmp_path / "small", CLIP({**architecture, "vision_cfg": vision}).eval(), None, NAMES, ["{a} {}"])
    return str(tmp_path / "small")


@torch.no_grad()
def probabilities(model, images):
    clip = load_model(model).images
    classes = embed_prompts(clip, [f"a {name}" for name in sorted(NAMES)])
    return (clip.logit_scale.exp() * clip.encode_image(images) @ classes.T).softmax(-1)


def test_a_first_model_needs_a_threshold_to_answer_behind(model, small, sweep, capsys):
    assert sweep(model, "--first", small, "--reducers", "divprune") == 1
    assert f"--first {small} answers behind a threshold; add own to --reducers divprune" in capsys.readouterr().err


def test_the_second_model_answers_where_the_first_has_a_small_margin(model, small, data, sweep, tmp_path):
    (batch,) = source(data, "zeroshot", "test").loader(load_model(model).preprocess, 64, 0)
    images, labels = batch["image"], batch["label"]
    resized = Resized(load_model(model).preprocess, load_model(small).preprocess)
    both = probabilities(small, resized(images)), probabilities(model, images)
    best = both[0].sort(-1).values
    margins = best[:, -1] - best[:, -2]
    thresholds = [0.0, float(margins.sort().values[11:13].mean()), 1.0]
    line = ["--first", small, "--threshold", ",".join(map(repr, thresholds))]
    assert sweep(model, *line) == 0
    whole, *rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    correct = torch.stack([one.argmax(-1) == labels for one in both])
    macs = [count_macs(load_model(name).images.image_tower, torch.zeros(1, 3, size, size)).gmacs
            for name, size in ((small, 16), (model, 32))]  # fmt: skip
    scaling = 3 * 4 * (32 * 16 * 2 + 16 * 16 * 2) / 1e9  # bicubic: four taps for each pixel that both sides share
    assert whole["top1"] == correct[1].double().mean() and whole["gmacs"] == pytest.approx(macs[1])
    assert [row["threshold"] for row in rows] == thresholds
    for row, threshold in zip(rows, thresholds, strict=True):
        answers, (_, asked) = exit_at(threshold, margins[None], correct)
        assert row["top1"] == answers.double().mean()
        assert row["gmacs"] == pytest.approx(macs[0] + scaling + asked * macs[1])
        assert asked == pytest.approx({0.0: 0, 1.0: 1}.get(threshold, 0.5))
    result = [*line[:3], repr(thresholds[1])]
    folder = tmp_path / "one"
    assert (
        main(["evaluate", "--model", model, "--data", data, "--template", "{a} {}", *result, "--out", str(folder)]) == 0
    )
    (file,) = folder.iterdir()
    written = json.loads(file.read_text())
    assert (written["metrics"]["top1"], written["metrics"]["gmacs"]) == (rows[1]["top1"], rows[1]["gmacs"])
    assert written["model"].startswith("small then model threshold") and written["metrics"]["exits"] == [0.5, 0.5]
    assert written["conditions"]["first"] == load_model(small).weights


def test_pictures_are_made_smaller_as_pil_does():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    given, wanted = Preprocess(48), Preprocess(24, mean=(0.5,) * 3, std=(0.5,) * 3)

    def prepared(array, how):
        values = torch.from_numpy(np.asarray(array).copy()).permute(2, 0, 1) / 255
        return (values - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]

    ours = Resized(given, wanted)(prepared(pixels, given)[None])[0]
    theirs = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
    assert (ours - prepared(theirs, wanted)).abs().max() < 2 * 1.5 / 255  # PIL rounds after each axis
    same = prepared(pixels, given)[None]
    torch.testing.assert_close(Resized(given, given)(same), same, atol=1e-6, rtol=1e-5)


def test_a_members_mistake_is_one_line(model, small, sweep, tmp_path, capsys):
    wave = str(tiny_directory(tmp_path / "wave"))
    for line, message in (
        ((small, "--first", model), "--first: model reads pictures of 32 px, small of 16; name the one of the smaller"),
        ((wave, "--first", small), "--first: wave has a threshold of its own; a cascade ends in a model without one"),
        ((model, "--first", str(tmp_path / "none.safetensors")), "no weights at"),
    ):
        assert sweep(*line) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["sweep", "--model", model, "--data", "embedded", "--first", small, "--task", "retrieval"]) == 1
    assert "small then model stops at a level by the classes of zeroshot" in capsys.readouterr().err
    assert main(["evaluate", "--model", model, "--data", "x", "--first", small]) == 1
    assert "needs --threshold, the margin at which its answer stands" in capsys.readouterr().err


def test_an_answer_that_is_no_number_is_asked_of_the_second_model():
    def answer(*scores):
        return lambda images: (torch.tensor(scores), torch.zeros(len(images), dtype=torch.long))

    run = cascaded(answer([0.9, 0.1], [torch.nan, torch.nan]), answer([0.2, 0.8]), 0.5)
    scores, path = run(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    assert path.tolist() == [0, 1] and torch.equal(scores, torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
