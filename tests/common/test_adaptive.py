"""Levels, keep rates and plain models seen alike: the path of every picture, its scores and its cost."""

import pytest
import torch
from torch.nn import functional as F

from common.adaptive import RATES, KeepRates, Levels, OnePath, paths_of
from common.clip import CLIP
from common.flops import count_macs
from tests.common.towers import AttendedTower, pictures
from waveclip import MarginGate, ProgressiveClassifier, WaveTower

SCALE = torch.tensor(20.0)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP.tiny().eval()


@pytest.fixture
def classes():
    return F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), dim=-1)


def softmax(z, classes):
    return (SCALE * F.normalize(z, dim=-1) @ classes.T).softmax(-1)


@torch.no_grad()
def test_a_plain_model_is_one_path(clip, classes):
    paths, images = paths_of(clip), pictures(3)
    assert type(paths) is OnePath and paths.setting_name is None and paths.default_setting is None
    scores, path = paths.runner(None, classes, SCALE)(images)
    torch.testing.assert_close(scores, softmax(clip.image_tower(images), classes))
    assert path.tolist() == [0, 0, 0]
    assert paths.costs(32) == [count_macs(clip.image_tower, images[:1]).gmacs]
    every, confidence = paths.probabilities_of_all_paths(images, classes, SCALE)
    assert torch.equal(every[0], scores) and confidence is None


@torch.no_grad()
@pytest.mark.parametrize("levels", [1, 2])
def test_levels_are_those_of_the_progressive_classifier(clip, classes, levels):
    wave = WaveTower.from_image_tower(clip.image_tower, levels).eval()
    paths, images = paths_of(wave), pictures(8)
    assert type(paths) is Levels and paths.setting_name == "threshold"
    every, confidence = paths.probabilities_of_all_paths(images, classes, SCALE)
    assert every.shape == (levels + 1, 8, 5) and confidence.shape == (levels, 8)
    middle = confidence[0].median().item()
    scores, path = paths.runner(middle, classes, SCALE)(images)
    expected = ProgressiveClassifier(wave, classes, SCALE, MarginGate(middle))(images)
    assert torch.equal(path, expected.exit_step) and torch.equal(scores, expected.scores)
    assert 0 < (path == 0).sum() < 8
    torch.testing.assert_close(scores, every[path, torch.arange(8)], atol=1e-5, rtol=0)
    assert paths.runner(None, classes, SCALE)(images)[1].tolist() == [levels] * 8, "unasked, all levels"
    costs = paths.costs(32)
    assert len(costs) == levels + 1 and costs == sorted(costs)


@torch.no_grad()
def test_keep_rates_are_one_path_each(clip, classes):
    tower, images = AttendedTower(clip.image_tower, 0.25), pictures(3)
    paths = paths_of(tower)
    assert type(paths) is KeepRates and (paths.setting_name, paths.default_setting) == ("keep", 0.25)
    assert paths.rates == sorted({*RATES, 0.25})
    costs = paths.costs(32)
    assert costs == sorted(costs) and costs[-1] == count_macs(clip.image_tower, images[:1]).gmacs
    every, confidence = paths.probabilities_of_all_paths(images, classes, SCALE)
    assert confidence is None
    for place, rate in enumerate(paths.rates):
        scores, path = paths.runner(rate, classes, SCALE)(images)
        torch.testing.assert_close(scores, softmax(tower.at(rate)(images), classes))
        assert torch.equal(scores, every[place]) and path.tolist() == [place] * 3
    torch.testing.assert_close(every[-1], softmax(clip.image_tower(images), classes), atol=1e-6, rtol=0)
    assert torch.equal(paths.runner(None, classes, SCALE)(images)[0], every[paths.rates.index(0.25)])
